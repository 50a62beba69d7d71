"""Masking statistics and the label shift, against transformers' own loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import random_batch, run_reference
from llm2vec_min import LLM2Vec
from llm2vec_min.tokenizer import Tokenizer
from llm2vec_min.training import mntp
from llm2vec_min.training.mntp import IGNORED, chosen_states, explain, held_out_score, mask_tokens, mntp_loss
from llm2vec_min.training.settings import Settings

FIXED = dict(mask_id=5, special_ids={0, 1}, vocab_size=1000)


def test_bert_style_statistics():
    ids = torch.randint(2, 1000, (400, 200), generator=torch.Generator().manual_seed(0))
    ids[ids == 5] = 6
    ids[:, 50] = 1
    masked, labels = mask_tokens(ids, **FIXED, probability=0.2, generator=torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    assert not chosen[:, 0].any() and not chosen[:, 50].any(), "position 0 and special tokens are never chosen"
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert chosen.sum() / (400 * 198) == pytest.approx(0.2, abs=0.005)
    shown, true = masked[chosen], ids[chosen]
    assert (shown == 5).float().mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == true).float().mean() == pytest.approx(0.1, abs=0.01)
    rest = shown[(shown != 5) & (shown != true)]
    assert len(rest) / len(shown) == pytest.approx(0.1, abs=0.01)
    assert rest.float().mean() == pytest.approx(500, abs=15), "uniform over the vocabulary"


def test_all_style():
    ids = torch.randint(2, 1000, (50, 100))
    masked, labels = mask_tokens(ids, **FIXED, probability=0.8, style="all")
    chosen = labels != IGNORED
    assert (masked[chosen] == 5).all()
    assert chosen.float().mean() == pytest.approx(0.8 * 0.99, abs=0.02)


@pytest.mark.parametrize("options", [dict(style="span"), dict(probability=0.0), dict(probability=1.5)])
def test_bad_masking(options):
    with pytest.raises(ValueError, match="mask (style|probability) is"):
        mask_tokens(torch.zeros(1, 4, dtype=torch.long), **FIXED, **options)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "mistral-window"])
def test_loss_is_transformers_shifted_cross_entropy(both, variant):
    theirs, mine = both(variant)
    ids, _ = random_batch(B=4, T=20)
    masked, labels = mask_tokens(ids, mask_id=5, special_ids=set(), vocab_size=257, probability=0.4)
    labels[:, 0] = ids[:, 0]  # a chosen position 0 has no predictor and must add nothing
    expected = run_reference(theirs, masked, causal=False, labels=labels).loss
    torch.testing.assert_close(mntp_loss(mine.model, mine.lm_head, masked, labels), expected, rtol=1e-5, atol=1e-5)
    unshifted = F.cross_entropy(run_reference(theirs, masked, causal=False).logits.flatten(0, 1), labels.flatten())
    assert (unshifted - expected).abs() > 1e-3, "a hundred times the tolerance"


def test_only_masked_positions_get_logits(both):
    _, mine = both("llama")
    ids, _ = random_batch()
    generator = torch.Generator().manual_seed(0)
    _, labels = mask_tokens(ids, mask_id=5, special_ids=set(), vocab_size=257, probability=0.5, generator=generator)
    hidden, targets = chosen_states(mine.model, ids, labels)
    assert hidden.shape == ((labels != IGNORED).sum(), 64) and targets.tolist() == labels[labels != IGNORED].tolist()
    position = int((labels[0] != IGNORED).nonzero()[0])
    expected = mine(ids, causal=False)[0, position - 1]
    torch.testing.assert_close(mine.lm_head(hidden[0]), expected, rtol=1e-5, atol=1e-5)


def test_nothing_masked_gives_zero_not_nan(both):
    _, mine = both("llama")
    mine.requires_grad_(True)
    ids, _ = random_batch()
    loss = mntp_loss(mine.model, mine.lm_head, ids, torch.full_like(ids, IGNORED))
    loss.backward()
    assert loss.item() == 0


def test_explanation(model_folder):
    tokenizer = Tokenizer(model_folder)
    ids = torch.from_numpy(tokenizer.encode(["the cat sat"])[0].ids)
    masked, labels = ids.clone(), torch.full_like(ids, IGNORED)
    masked[2], labels[2] = tokenizer.mask_id(), ids[2]
    words = explain(tokenizer, ids, masked, labels)
    pieces = tokenizer.pieces(ids)
    assert f"position 1 ({pieces[1]!r}) predicts position 2: {pieces[2]!r} (shown as '_')" in words


def test_the_loss_is_float32_over_bfloat16(both):
    """Logits of thousands of words, summed in 8 bits, would be off by a percent."""
    _, mine = both("llama")
    mine = mine.bfloat16()
    ids, _ = random_batch(B=4, T=32)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) > 0.5, IGNORED)
    with torch.no_grad():
        loss = mntp_loss(mine.model, mine.lm_head, ids, labels)
        hidden, targets = chosen_states(mine.model, ids, labels)
        expected = F.cross_entropy(mine.lm_head(hidden).double(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_only_a_chunk_of_logits_is_kept_at_a_time(both, monkeypatch):
    _, mine = both("llama")
    ids, _ = random_batch(B=4, T=32)
    calls = []
    monkeypatch.setattr(mntp, "checkpoint", lambda function, *arguments, **_: calls.append(1) or function(*arguments))
    whole = mntp_loss(mine.model, mine.lm_head, ids, ids)
    assert not calls
    monkeypatch.setattr(mntp, "LOGITS_AT_ONCE", 50 * mine.lm_head.out_features)
    torch.testing.assert_close(mntp_loss(mine.model, mine.lm_head, ids, ids), whole)
    assert len(calls) == -(-4 * 31 // 50)


def test_what_is_masked_and_with_what(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    found = mntp.masking(l2v, Settings(mask_probability=0.4, mask_style="all"))
    vocab, tokenizer = l2v.tokenizer.backend.get_vocab(), l2v.tokenizer
    assert found == {
        "mask_id": vocab["_"], "special_ids": {vocab[token] for token in ("<unk>", "<s>", "</s>")},
        "vocab_size": len(vocab), "probability": 0.4, "style": "all",
    }  # fmt: skip
    assert tokenizer.pad_id != found["mask_id"]


def test_held_out_accuracy_is_the_share_of_what_was_predicted(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", lm_head=True)
    l2v.lm_head = nn.Linear(64, 600)  # says token 9 everywhere
    with torch.no_grad():
        l2v.lm_head.weight.zero_(), l2v.lm_head.bias.zero_()
        l2v.lm_head.bias[9] = 1
    blocks = np.repeat([[9], [9], [9], [8]], 11, axis=1)
    score = held_out_score(l2v, blocks, Settings(mask_probability=1.0, mask_style="all", batch_size=3))
    assert score["held_out_accuracy"] == 0.75
