"""SmolLM2-135M, a real pretrained Llama (see build_smollm2.py): ours equals transformers there too."""

import copy

import pytest
import torch

from build_smollm2 import FOLDER
from conftest import TEXTS, run_reference
from llm2vec_min import LLM2Vec
from llm2vec_min.weights import load_language_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="run tests/build_smollm2.py first"),
]


@pytest.fixture(scope="module")
def pair():
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return theirs, transformers.AutoTokenizer.from_pretrained(FOLDER, padding_side="left"), load_language_model(FOLDER)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS[:4]], ids=["one", "padded"])
def test_logits(pair, causal, texts):
    theirs, tokenizer, mine = pair
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    real = batch.attention_mask.bool()
    expected = run_reference(theirs, batch.input_ids, batch.attention_mask, causal=causal).logits[real]
    logits = mine(batch.input_ids, None if real.all() else real, causal=causal)[real]
    # After 30 layers float32 itself is good to about 1e-5 of the largest logit: ours may be no farther from float64
    # than twice transformers' own distance.
    exact = run_reference(copy.deepcopy(theirs).double(), batch.input_ids, batch.attention_mask, causal=causal).logits[real]
    distance, their_distance = ((x - exact).abs().max() / exact.abs().max() for x in (logits, expected))
    assert distance < max(1e-5, 2 * their_distance) and distance < 1e-4


def test_ids(pair):
    _, tokenizer, _ = pair
    rows = LLM2Vec.from_pretrained(FOLDER, device="cpu").tokenizer.encode(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        assert not text or row.ids.tolist() == tokenizer(text)["input_ids"]


def test_it_speaks(pair):
    _, tokenizer, mine = pair
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(mine(ids, causal=True)[0, -1].argmax()) == " Paris"
