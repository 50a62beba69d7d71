"""InfoNCE by hand in float64; twins that differ; sentences grouped by length."""

import math

import numpy as np
import pytest
import torch

from llm2vec_min import LLM2Vec
from llm2vec_min.lora import add_lora
from llm2vec_min.model import set_attention_dropout
from llm2vec_min.tokenizer import Tokenizer
from llm2vec_min.training import Loop, simcse
from llm2vec_min.training.settings import Settings
from llm2vec_min.training.simcse import backward, embed_twins, explain, info_nce, train_simcse, twin_mask


def by_hand(queries, candidates, temperature):
    queries, candidates = queries.double().numpy(), candidates.double().numpy()
    total = 0.0
    for i, q in enumerate(queries):
        scores = [q @ c / np.linalg.norm(q) / np.linalg.norm(c) / temperature for c in candidates]
        total += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    return total / len(queries)


@pytest.mark.parametrize("extra", [0, 3])
def test_info_nce_by_hand(extra):
    a, b = torch.randn(5, 8), torch.randn(5 + extra, 8)
    assert info_nce(a, b, 0.05).item() == pytest.approx(by_hand(a, b, 0.05), rel=1e-5)


def test_info_nce_of_identical_and_of_useless_vectors():
    assert info_nce(torch.eye(4), torch.eye(4), 0.01).item() == pytest.approx(0, abs=1e-5)
    assert info_nce(torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(math.log(4), rel=1e-5)


@pytest.fixture
def l2v(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    add_lora(l2v.decoder, r=4, dropout=0.1)
    return l2v


@pytest.mark.parametrize("parts", [1, 2])
def test_a_weight_in_the_loss_learns_too(parts):
    """A temperature that is trained, say: as if there were no parts."""
    texts, weight, scale = torch.randn(4, 3), torch.randn(3, 5), torch.tensor(0.3)
    leaves = [x.clone().requires_grad_() for x in (weight, scale)]
    vectors = texts @ leaves[0]
    info_nce(vectors, vectors.roll(1, 0), 1.0).add(leaves[1] * vectors.square().sum()).backward()
    weight, scale = weight.requires_grad_(), scale.requires_grad_()
    loss_of = lambda v: info_nce(v, v.roll(1, 0), 1.0) + scale * v.square().sum()  # noqa: E731
    backward(lambda part: texts.chunk(parts)[part] @ weight, parts, loss_of)
    torch.testing.assert_close([weight.grad, scale.grad], [leaf.grad for leaf in leaves])


def test_twins_differ_by_dropout_only(l2v):
    encoded = l2v.tokenize(["the cat sat", "a dog"])
    first, second = embed_twins(l2v, encoded)
    torch.testing.assert_close(first, second)
    np.testing.assert_allclose(first.detach(), l2v.encode(["the cat sat", "a dog"]), rtol=1e-5, atol=1e-5)
    set_attention_dropout(l2v.decoder, 0.3)
    l2v.train()
    first, second = embed_twins(l2v, encoded)
    assert (first - second).abs().max() > 1e-3


def test_twins_of_equal_sentences_differ_too(l2v):
    """Every row draws its own noise: two copies in a batch are not given the same."""
    set_attention_dropout(l2v.decoder, 0.3)
    l2v.train()
    first, _ = embed_twins(l2v, l2v.tokenize(["the cat sat"] * 2))
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_explanation(l2v):
    words = explain(l2v, ["the cat sat", "a dog barks"], 32)
    assert "A: the cat sat\nB: a dog barks\ncosine of A and B " in words
    assert not l2v.training
    l2v.template = ("[INST] ", " [/INST]")
    assert explain(l2v, ["the cat sat", "a dog barks"], 32) == words, "no template, as in training"
    assert explain(l2v, ["the cat sat", "the cat ran"], 3).splitlines()[-1].startswith("cosine of A and B 1.000"), (
        "cut as there"
    )


def test_equal_sentences_are_not_negatives(l2v, monkeypatch):
    """In a batch of a, a, b the query a is compared with its twin and b's, not with the other a's."""
    compared = twin_mask(torch.tensor([7, 7, 2]))
    assert compared.tolist() == [[True, False, True], [False, True, True], [True, True, True]]
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    expected = np.mean(
        [by_hand(a[[0]], b[[0, 2]], 0.05), by_hand(a[[1]], b[[1, 2]], 0.05), by_hand(a[[2]], b[[2, 0, 1]], 0.05)]
    )
    assert info_nce(a, b, 0.05, compared).item() == pytest.approx(expected, rel=1e-5)
    seen = []

    def spy(queries, candidates, temperature, compared=None):
        seen.append(compared)
        return info_nce(queries, candidates, temperature, compared)

    monkeypatch.setattr("llm2vec_min.training.simcse.info_nce", spy)
    settings = Settings(steps=1, batch_size=4, max_length=16)
    train_simcse(l2v, ["the cat sat", "a dog barks", "the cat sat", "it rains"], settings, quiet=True)
    assert seen[0].sum() == 16 - 2, "training asks for it"


def test_sentences_that_are_all_one(l2v):
    with pytest.raises(ValueError, match="all 2 sentences are the same to the model: there is nothing to tell apart"):
        train_simcse(l2v, ["the cat sat"] * 4, Settings(steps=1, batch_size=2), quiet=True)


def test_dropout_ends_with_the_training_even_if_it_fails(l2v):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_simcse(
            l2v, ["the cat sat", "a dog barks", "it rains"], Settings(steps=1, batch_size=2), quiet=True, evaluate=fail
        )
    assert {m.dropout for m in l2v.decoder.modules() if type(m).__name__ == "Attention"} == {0.0}


def test_sentences_are_drawn_from_all_and_meet_their_like(l2v, monkeypatch):
    sentences = [f"{i} " + "word " * (i % 7) for i in range(200)]
    seen, ordered = [], []
    encode, draw = l2v.tokenizer.encode, simcse.batches
    monkeypatch.setattr(l2v.tokenizer, "encode", lambda texts, **options: seen.extend(texts) or encode(texts, **options))
    monkeypatch.setattr(simcse, "batches", lambda *a, **options: ordered.append(options["lengths"]) or draw(*a, **options))
    train_simcse(l2v, sentences, Settings(steps=2, batch_size=8), quiet=True)
    numbers = [int(text.split()[0]) for text in seen[:16]]
    assert len(set(numbers)) == 16 and max(numbers) > 100, "not the first of the file, which may be sorted"
    assert ordered == [[len(row.ids) for row in encode(seen[:16], max_length=128)]]


@pytest.mark.parametrize("parts, expected", [(1, [True]), (2, [False, False, True, True])])
def test_several_parts_are_first_read_without_a_graph(parts, expected):
    """Which is what GradCache is for: the memory of one part."""
    weight, seen = torch.ones(4, requires_grad=True), []
    embed = lambda part: seen.append(torch.is_grad_enabled()) or weight[None] * (part + 1)  # noqa: E731
    backward(embed, parts, lambda vectors: vectors.square().sum())
    assert seen == expected
    assert weight.grad.tolist() == [2.0 * sum((part + 1) ** 2 for part in range(parts))] * 4


def test_the_seed_decides_which_sentences_are_read_and_both_twins_count(monkeypatch):
    encode, update, seen, tokens = Tokenizer.encode, Loop.update, [], []
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, texts, **options: seen.append(texts) or encode(self, texts, **options)
    )
    monkeypatch.setattr(Loop, "update", lambda self, loss, count: tokens.append(count) or update(self, loss, count))
    for seed in (0, 1):
        l2v = LLM2Vec.from_pretrained("tiny", device="cpu")
        add_lora(l2v.decoder, r=2)
        sentences = [f"sentence {i}" for i in range(200)]
        simcse.train_simcse(l2v, sentences, Settings(steps=1, batch_size=8, seed=seed), quiet=True)
    assert set(seen[0]) != set(seen[1])
    assert tokens[0] == 2 * sum(len(row.ids) for row in encode(l2v.tokenizer, seen[0], max_length=128))
