"""What must hold for any input, tried on hundreds that hypothesis makes up."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import TOKENIZER_CONFIGS, write_tokenizer
from llm2vec_min import LLM2Vec
from llm2vec_min.data import batches, pack_blocks
from llm2vec_min.encoder import sorted_batches
from llm2vec_min.lora import LoRALinear, add_lora
from llm2vec_min.model import attention_mask
from llm2vec_min.tokenizer import MARGIN, Tokenizer
from llm2vec_min.training.mntp import mask_tokens
from llm2vec_min.weights import adapter_of, load_adapter, load_decoder, save_adapter

settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("here")
SEEDS = st.integers(0, 2**32 - 1)
ALPHABET = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ab_<>[]:\n\t▁Ġ\u0301\u200d🙂"))
TEXT = st.text(ALPHABET, max_size=30)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    return {kind: Tokenizer(write_tokenizer(tmp_path_factory.mktemp(kind), kind)) for kind in TOKENIZER_CONFIGS}


@pytest.fixture(scope="module")
def l2v(model_folder):
    return LLM2Vec.from_pretrained(model_folder, device="cpu")


# ---- text ----


@settings(max_examples=150)
@given(text=TEXT, instruction=TEXT, prefix=TEXT, suffix=TEXT)
@example(text="e cat", instruction="", prefix="th", suffix="")  # one token across the seam
@example(text="1984", instruction="Find:", prefix="", suffix="")  # a token for the joining space alone
@pytest.mark.parametrize("kind", TOKENIZER_CONFIGS)
def test_pooled_tokens_cover_the_text_and_nothing_else(tokenizers, kind, text, instruction, prefix, suffix):
    """Character by character: every token that stands for a character of the text is pooled, and only those."""
    tokenizer = tokenizers[kind]
    (row,) = tokenizer.encode([text], instruction=instruction, prefix=prefix, suffix=suffix)
    head = prefix + (instruction.strip() + " " if instruction.strip() else "")
    encoding = tokenizer.backend.encode(head + text + suffix)
    if not encoding.ids:
        assert not row.pooled.any()
        return
    assert row.ids.tolist() == encoding.ids
    own = set(range(len(head), len(head) + len(text)))
    joint = {len(head) - 1} if head.endswith(" ") else set()
    for (start, end), inserted, pooled in zip(encoding.offsets, encoding.special_tokens_mask, row.pooled, strict=True):
        characters = set(range(start, end))
        if inserted:
            assert not pooled
        elif characters & own:
            assert pooled
        elif characters:  # a token without characters is a space that was trimmed off
            assert pooled == bool(characters & joint and text)


@settings(max_examples=60)
@given(text=st.text(ALPHABET, max_size=200), limit=st.integers(8, 40))
@pytest.mark.parametrize("kind", TOKENIZER_CONFIGS)
def test_cut_texts_begin_as_whole_ones(tokenizers, kind, text, limit):
    whole, cut = (tokenizers[kind].encode([text], max_length=n, prefix="[", suffix="]")[0] for n in (None, limit))
    assert len(cut.ids) == min(limit, len(whole.ids))
    kept = int(cut.pooled.sum())
    assert cut.ids[cut.pooled].tolist() == whole.ids[whole.pooled][:kept].tolist()
    assert cut.ids[~cut.pooled].tolist() == whole.ids[~whole.pooled].tolist()


@settings(max_examples=25)
@given(piece=st.text(ALPHABET, min_size=1, max_size=12), begin=TEXT, limit=st.integers(8, 20))
@pytest.mark.parametrize("kind", TOKENIZER_CONFIGS)
def test_the_end_of_a_very_long_text_is_not_read(tokenizers, kind, piece, begin, limit, monkeypatch):
    """And the tokens kept are those of the whole text."""
    tokenizer, around = tokenizers[kind], dict(max_length=limit, prefix="[", suffix="]")
    text = begin + piece * 400
    (cut,) = tokenizer.encode([text], **around)
    ((_, read, _),) = tokenizer._encodings(["["], [text], "]", limit)
    vars(tokenizer)["_longest"], longest = 10**6, tokenizer._longest
    (whole,) = tokenizer.encode([text], **around)
    vars(tokenizer)["_longest"] = longest
    assert cut.ids.tolist() == whole.ids.tolist() and cut.pooled.tolist() == whole.pooled.tolist()
    assert len(read) == min(len(text), (limit + MARGIN) * longest)


@settings(max_examples=40)
@given(lines=st.lists(TEXT, min_size=1, max_size=20), size=st.integers(1, 12))
def test_packing_loses_and_repeats_no_token(tokenizers, lines, size):
    tokenizer = tokenizers["llama-2"]  # begins every line with BOS
    ids = [id for line in lines for id in tokenizer.backend.encode(line).ids]
    if len(ids) < size:
        with pytest.raises(ValueError, match=f"has {len(ids)} tokens, at least one block of {size} is needed"):
            pack_blocks(tokenizer, lines, size)
        return
    blocks = pack_blocks(tokenizer, lines, size)
    assert blocks.shape[1] == size and 0 <= len(ids) - blocks.size < size
    assert blocks.flatten().tolist() == ids[: blocks.size]


# ---- masks ----


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 9)),
    left=st.booleans(),
)
def test_who_sees_whom(lengths, causal, window, left):
    """Pair by pair, from the definition."""
    T = max(lengths)
    real = torch.tensor([[(t >= T - n) if left else (t < n) for t in range(T)] for n in lengths])
    padding = None if real.all() else real
    mask = attention_mask(padding, T, causal=causal, sliding_window=window)
    if mask is None:
        assert padding is None and (window is None or window >= T)
        return
    mask = mask.expand(len(lengths), 1, T, T)
    for b in range(len(lengths)):
        for q in range(T):
            if not real[b, q]:
                assert mask[b, 0, q].any(), "a padding query sees something, or softmax gives NaN"
                continue
            for k in range(T):
                near = window is None or T <= window or (q - k < window if causal else abs(q - k) <= window)
                expected = bool(real[b, k]) and (k <= q or not causal) and near
                assert bool(mask[b, 0, q, k]) == expected, (b, q, k)


@given(
    ids=st.lists(st.lists(st.integers(0, 19), min_size=5, max_size=5), min_size=1, max_size=6),
    probability=st.floats(0.01, 1),
    style=st.sampled_from(["bert", "all"]),
    seed=SEEDS,
)
def test_masking(ids, probability, style, seed):
    ids, special = torch.tensor(ids), {0, 1}
    options = dict(mask_id=7, special_ids=special, vocab_size=20, probability=probability, style=style)
    masked, labels = mask_tokens(ids, **options, generator=torch.Generator().manual_seed(seed))
    again = mask_tokens(ids, **options, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(masked, again[0]) and torch.equal(labels, again[1])
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]), "the label is the true token"
    assert torch.equal(masked[~chosen], ids[~chosen]), "what is not asked is not touched"
    assert not chosen[:, 0].any(), "nothing precedes the first token"
    assert not any(int(id) in special for id in ids[chosen])
    if style == "all":
        assert (masked[chosen] == 7).all()
    if probability == 1:
        assert chosen[:, 1:].sum() == sum(int(id) not in special for id in ids[:, 1:].flatten())


# ---- order ----


@given(count=st.integers(1, 60), batch_size=st.integers(1, 20), seed=SEEDS, start=st.integers(0, 40), grouped=st.booleans())
def test_resuming_at_any_batch(count, batch_size, seed, start, grouped):
    lengths = np.random.default_rng(seed).integers(1, 50, count) if grouped else None
    if batch_size > count:
        with pytest.raises(ValueError, match="fewer than one batch"):
            batches(count, batch_size, seed)
        return
    whole, rest = batches(count, batch_size, seed, lengths=lengths), batches(count, batch_size, seed, start, lengths)
    rows = [next(whole) for _ in range(start + 3)]
    for expected in rows[start:]:
        np.testing.assert_array_equal(next(rest), expected)
    per_epoch = count // batch_size
    for epoch in range(len(rows) // per_epoch):
        seen = np.concatenate(rows[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(set(seen.tolist())) == len(seen) == per_epoch * batch_size


@given(lengths=st.lists(st.integers(1, 300), max_size=60), batch_size=st.integers(1, 9), most=st.integers(1, 600))
def test_sorted_batches_hold_each_text_once(lengths, batch_size, most):
    groups = list(sorted_batches(lengths, batch_size, most))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) <= batch_size for group in groups)
    assert all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= most for group in groups)


@settings(max_examples=25)
@given(texts=st.lists(TEXT, min_size=1, max_size=9), data=st.data())
def test_a_vector_does_not_depend_on_its_company(l2v, texts, data):
    alone = np.stack([l2v.encode(text) for text in texts])
    order = data.draw(st.permutations(range(len(texts))))
    size = data.draw(st.integers(1, 9))
    together = l2v.encode([texts[i] for i in order], batch_size=size)
    np.testing.assert_allclose(together, alone[order], rtol=1e-5, atol=1e-5)


# ---- files ----


@settings(max_examples=12)
@given(
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 100),
    dropout=st.floats(0, 0.9),
    targets=st.sets(st.sampled_from(["q_proj", "k_proj", "o_proj", "down_proj", "up_proj"]), min_size=1),
    seed=SEEDS,
)
def test_adapters_come_back_as_they_were(model_folder, tmp_path_factory, r, alpha, dropout, targets, seed):
    folder, generator = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(seed)
    decoder = load_decoder(model_folder)
    add_lora(decoder, r, alpha, dropout, targets)
    for name, parameter in decoder.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    save_adapter(folder, *adapter_of(decoder, "the base"))
    again = load_decoder(model_folder)
    load_adapter(again, folder)
    assert decoder.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in decoder.state_dict().items())
    layers = [m for m in again.modules() if isinstance(m, LoRALinear)]
    assert {(layer.r, layer.alpha, layer.dropout) for layer in layers} == {(r, alpha, dropout)}
    assert set(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == targets
