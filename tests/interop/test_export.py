"""An exported folder gives the same vectors here, in transformers and in sentence-transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from test_weights import randomize
from tokenizers import processors

from conftest import TEXTS, make_reference, write_tokenizer
from llm2vec_min import LLM2Vec
from llm2vec_min.interop import export as export_module
from llm2vec_min.interop.export import export_model, main
from llm2vec_min.lora import add_lora, merge_lora
from llm2vec_min.tokenizer import Encoded

TOLERANCE = dict(rtol=1e-5, atol=1e-5)
SOME = [text for text in TEXTS if text] + ["🙂 first", "1984", "_x"]
INSTRUCTION = "Retrieve texts that mean the same:"


def make(tmp_path, kind="llama-2", variant="llama", **options):
    """An encoder over a random model and a tokenizer of a kind, with a merged random adapter."""
    folder = tmp_path / "base"
    folder.mkdir()
    make_reference(variant, vocab_size=600).save_pretrained(folder)
    write_tokenizer(folder, kind)
    l2v = LLM2Vec.from_pretrained(folder, device="cpu", **options)
    add_lora(l2v.decoder, r=4, alpha=4)
    randomize(l2v.decoder)
    merge_lora(l2v.decoder)
    return l2v


@pytest.mark.parametrize("kind", ["llama-2", "mistral", "llama-3", "smollm2"])
@pytest.mark.parametrize("pooling", ["mean", "max", "last", "first"])
def test_sentence_transformers(tmp_path, kind, pooling):
    l2v = make(tmp_path, kind, pooling=pooling)
    export_model(l2v, tmp_path / "out", prompts={"query": INSTRUCTION})
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    expected, told = l2v.encode(SOME), l2v.encode(SOME, INSTRUCTION)
    for batch_size in (1, 3, 32):
        np.testing.assert_allclose(theirs.encode(SOME, batch_size=batch_size), expected, **TOLERANCE)
        np.testing.assert_allclose(theirs.encode(SOME, prompt_name="query", batch_size=batch_size), told, **TOLERANCE)
    np.testing.assert_allclose(theirs.encode_query(SOME), told, **TOLERANCE)
    np.testing.assert_allclose(theirs.encode_document(SOME), expected, **TOLERANCE)


def test_weighted_mean(tmp_path):
    """Counted from a text's first token; before version 6 from the row's, so that an export pads on the right."""
    l2v = make(tmp_path, "smollm2", pooling="weighted_mean")
    export_model(l2v, tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(theirs.encode(SOME), l2v.encode(SOME), **TOLERANCE)
    assert theirs.tokenizer.padding_side == "right"


@pytest.mark.parametrize("kind", ["llama-2", "mistral", "llama-3", "smollm2"])
@pytest.mark.parametrize("prompts", [None, {"other": INSTRUCTION}, {"query": INSTRUCTION, "document": INSTRUCTION}])
def test_queries_and_documents_with_and_without_prompts(tmp_path, kind, prompts):
    l2v = make(tmp_path, kind)
    export_model(l2v, tmp_path / "out", prompts=prompts)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    short = ["a", "Why?", "two words"]
    for encode, name in ((theirs.encode_query, "query"), (theirs.encode_document, "document")):
        np.testing.assert_allclose(encode(short), l2v.encode(short, (prompts or {}).get(name)), **TOLERANCE)
    np.testing.assert_allclose(theirs.encode(short), l2v.encode(short), **TOLERANCE)


@pytest.mark.parametrize("variant", ["llama", "mistral", "mistral-window", "qwen2", "llama-llama3-rope", "llama-tied"])
@pytest.mark.parametrize("causal", [False, True])
def test_transformers_and_this_project(tmp_path, variant, causal):
    kind = "smollm2" if variant == "qwen2" else "llama-2"  # transformers forces a byte-level tokenizer on a Qwen2 model
    l2v = make(tmp_path, kind, variant, causal=causal, max_length=64)
    export_model(l2v, tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(SOME, return_tensors="pt", padding=True)
    states = model(**batch).last_hidden_state
    for row, mask, expected in zip(states, batch.attention_mask, l2v.encode(SOME, pooling=None), strict=True):
        np.testing.assert_allclose(row[mask.bool()][len(expected) * -1 :].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    again = LLM2Vec.from_pretrained(tmp_path / "out", device="cpu")
    assert (again.causal, again.pooling, again.max_length) == (causal, "mean", 64)
    np.testing.assert_allclose(again.encode(TEXTS), l2v.encode(TEXTS), **TOLERANCE)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(theirs.encode(SOME), l2v.encode(SOME), **TOLERANCE)


def test_normalize_length_and_similarity(tmp_path):
    l2v = make(tmp_path, max_length=9)
    export_model(l2v, tmp_path / "out", normalize=True)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert theirs.max_seq_length == 9 and theirs.similarity_fn_name == "cosine"
    np.testing.assert_allclose(theirs.encode(SOME), l2v.encode(SOME, normalize=True), **TOLERANCE)


def test_save_merges_an_adapter_in_training(tmp_path):
    l2v = make(tmp_path)
    add_lora(l2v.decoder, r=2, alpha=2)
    randomize(l2v.decoder, seed=5)
    l2v.save(tmp_path / "out")
    np.testing.assert_allclose(LLM2Vec.from_pretrained(tmp_path / "out").encode(SOME), l2v.encode(SOME), **TOLERANCE)
    assert any("lora_" in name for name, _ in l2v.decoder.named_parameters()), "the one in training keeps its adapter"


def test_shards_bfloat16_and_card(tmp_path):
    l2v = make(tmp_path)
    export_model(l2v, tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=50_000, scores={"STS-B dev": 71.5})
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    half = LLM2Vec.from_pretrained(tmp_path / "out", device="cpu")
    cosines = (half.encode(SOME, normalize=True) * l2v.encode(SOME, normalize=True)).sum(1)
    assert cosines.min() > 0.999
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name") and "bidirectional" in card and "STS-B dev: 71.50" in card
    assert "Do not use it with transformers before 5.2" in card and "Behind a server" in card


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (dict(pooling="weighted_mean"), {}, "counts positions from the beginning"),
        ({}, dict(template=("[INST] ", " [/INST]")), "it pools the chat template"),
    ],
)
def test_refused_where_equality_is_impossible(tmp_path, options, change, message):
    l2v = make(tmp_path, **options)
    for name, value in change.items():
        setattr(l2v, name, value)
    with pytest.raises(ValueError, match=message):
        export_model(l2v, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_model(l2v, tmp_path / "out", sentence_transformers=False)
    np.testing.assert_allclose(LLM2Vec.from_pretrained(tmp_path / "out").encode(SOME), l2v.encode(SOME), **TOLERANCE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SentenceTransformer(" not in card and "library_name: transformers" in card
    assert 'LLM2Vec.from_pretrained("this folder")' in card and "Not made for sentence-transformers" in card
    for more in (dict(normalize=True), dict(prompts={"query": "Find:"})):
        with pytest.raises(ValueError, match="--no-sentence-transformers leaves out"):
            export_model(l2v, tmp_path / "more", sentence_transformers=False, **more)


def test_what_changes_the_vectors_is_mapped_or_refused(tmp_path, monkeypatch):
    l2v = make(tmp_path)
    said = l2v.settings() | {"prefix": True}
    monkeypatch.setattr(LLM2Vec, "settings", lambda self: said)
    with pytest.raises(ValueError, match="no one else would know of prefix"):
        export_model(l2v, tmp_path / "out", sentence_transformers=False)


def test_nothing_half_written(tmp_path, monkeypatch):
    l2v = make(tmp_path)

    def fail(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_write_tokenizer", fail)
        with pytest.raises(ValueError, match="cannot be written .no space left"):
            export_model(l2v, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    export_model(l2v, tmp_path / "out")
    with pytest.raises(ValueError, match="already exists"):
        export_model(l2v, tmp_path / "out")
    export_model(l2v, tmp_path / "out", overwrite=True)
    trained = LLM2Vec.from_pretrained(tmp_path / "base", device="cpu")
    add_lora(trained.decoder, r=2)
    trained.save_run(tmp_path / "run", "simcse")
    for precious in ("base", "run"):
        with pytest.raises(ValueError, match="exists and is no export"):
            export_model(l2v, tmp_path / precious, overwrite=True)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_scores_for_the_card_from_damaged_metrics(tmp_path):
    lines = ['{"step": 1, "spearman": 41.5}', "5", '"spearman"', '["spearman"]', '{"spearman": null}', '{"spearman": "x"}',
             '{"spearman": NaN}', '{"step": 2, "spear', "", '{"step": 3, "spearman": 43}', "[" * 10**5]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n")
    assert export_module.read_spearman(tmp_path / "metrics.jsonl") == [41.5, 43]
    assert export_module.read_spearman(tmp_path / "none.jsonl") == []


def test_command(tmp_path, capsys):
    make(tmp_path)
    main(["--model", str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--prompt", f"query={INSTRUCTION}"])
    prompts = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"plain": "\x1f", "query": INSTRUCTION + "\x1f", "document": "\x1f"}
    with pytest.raises(ValueError, match="expected NAME=INSTRUCTION"):
        main(["--model", str(tmp_path / "base"), "--output", str(tmp_path / "x"), "--prompt", "query"])
    for prompts, message in ((["a=x", "a=y"], "the name 'a' is empty or there twice"), (["=x"], "the name '' is empty"),
                             ([f"long={'word ' * 600}"], "leaves no room for the text")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            main(["--model", str(tmp_path / "base"), "--output", str(tmp_path / "x"), "--prompt", *prompts])
    with pytest.raises(ValueError, match="'plain' stands for a text without an instruction"):
        main(["--model", str(tmp_path / "base"), "--output", str(tmp_path / "x"), "--prompt", "plain=Find:"])


def test_what_other_libraries_read_in_an_exports_files(tmp_path):
    l2v = make(tmp_path, max_length=77)
    export_model(l2v, tmp_path / "out", dtype="bfloat16")
    config, tokenizer = (json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert tokenizer["model_max_length"] == 77
    assert config["pad_token_id"] == l2v.tokenizer.pad_id and config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_refused_where_a_special_token_ends_every_text(tmp_path):
    l2v = make(tmp_path)
    ids = {token: l2v.tokenizer.backend.token_to_id(token) for token in ("<s>", "</s>")}
    l2v.tokenizer.backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[*ids.items()])
    with pytest.raises(ValueError, match="ends every text with a special token, which it pools"):
        export_model(l2v, tmp_path / "out")


def test_refused_where_prompts_cannot_be_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_with_marker", lambda l2v: None)
    with pytest.raises(ValueError, match="its prompts cannot be told from the text with this tokenizer"):
        export_model(make(tmp_path), tmp_path / "out")


def test_a_weighted_mean_counts_the_instruction_too(tmp_path):
    """Without BOS it is exported, but not with an instruction."""
    l2v = make(tmp_path, kind="smollm2", pooling="weighted_mean")
    export_model(l2v, tmp_path / "out")
    with pytest.raises(ValueError, match="counts positions from the beginning, BOS and instruction included"):
        export_model(l2v, tmp_path / "more", prompts={"query": INSTRUCTION})


def test_refused_where_an_instruction_is_read_otherwise_alone(tmp_path, monkeypatch):
    l2v = make(tmp_path)
    encode = l2v.tokenizer.encode

    def merged(texts, **options):  # as if the instruction's last token went with the text's first
        rows = encode(texts, **options)
        return [Encoded(row.ids[1:], row.pooled[1:]) for row in rows] if isinstance(options.get("instruction"), str) else rows

    monkeypatch.setattr(l2v.tokenizer, "encode", merged)
    with pytest.raises(
        ValueError, match=f"the tokenizer reads the instruction {INSTRUCTION!r} otherwise before a text than alone"
    ):
        export_model(l2v, tmp_path / "out", prompts={"query": INSTRUCTION})


def test_spaces_around_a_prompt_change_nothing(tmp_path):
    l2v = make(tmp_path)
    export_model(l2v, tmp_path / "out", prompts={"query": " Find texts: "})
    vectors = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["the cat"], prompt_name="query")
    np.testing.assert_allclose(vectors, l2v.encode(["the cat"], " Find texts: "), rtol=1e-5, atol=1e-5)
