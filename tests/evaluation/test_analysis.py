"""Analyses against a few lines by hand, and the probe's file."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import TEXTS
from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import analysis, compare

SOME = [text for text in TEXTS if len(text) > 3]


@pytest.fixture(scope="module")
def l2v():
    return LLM2Vec.from_pretrained("tiny", device="cpu", lm_head=True)


def test_direction_cosines(l2v):
    found = analysis.direction_cosines(l2v, SOME, parts=4, batch_size=2)
    values = [[[] for _ in range(4)] for _ in range(len(found))]
    for text in SOME:
        ids = torch.from_numpy(l2v.tokenizer.encode([text])[0].ids)[None]
        a, b = (l2v.decoder(ids, causal=c, all_layers=True) for c in (True, False))
        n = ids.shape[1] - 1  # without BOS
        for layer in range(len(found)):
            for i in range(n):
                values[layer][int(4 * i / n)].append(F.cosine_similarity(a[layer][0, 1 + i], b[layer][0, 1 + i], dim=0).item())
    np.testing.assert_allclose(found, [[np.mean(v) for v in row] for row in values], atol=1e-4)
    assert np.allclose(found[0], 1) and found[-1].mean() < 0.98


def test_logit_lens(l2v):
    causal = LLM2Vec.from_pretrained("tiny", device="cpu", lm_head=True, causal=True)
    tokens, layers = analysis.logit_lens(causal, "The capital of the country is", top=2)
    ids = torch.from_numpy(causal.tokenizer.encode(["The capital of the country is"])[0].ids)[None]
    logits = causal.lm_head(causal.decoder(ids, causal=True))[0]
    best = [causal.tokenizer.pieces(row.topk(2).indices) for row in logits]
    assert layers[-1] == best and len(layers) == causal.decoder.config.num_hidden_layers + 1
    assert len(tokens) == ids.shape[1] == len(layers[0]) and layers[0] != layers[-1]
    with pytest.raises(ValueError, match="lm_head=True"):
        analysis.logit_lens(LLM2Vec.from_pretrained("tiny", device="cpu"), "x")


def test_triples():
    """At least 120, each another beginning; the answer does not lie in shared words."""
    triples = analysis.read_triples()
    assert len(triples) >= 120 and len({a for a, *_ in triples}) == len(triples)
    small = set("a an and as at be by for from had has her him his in is it left of on than that the to was were with".split())

    def content(text):
        return set(re.findall("[a-z]+", text.lower())) - small

    assert not [t for t in triples if content(t[1]) & (content(t[2]) | content(t[3]))]


def test_future_margins(l2v):
    triples = analysis.read_triples()[:12]
    causal = LLM2Vec.from_pretrained("tiny", device="cpu", causal=True)
    assert np.abs(analysis.future_margins(causal, triples)).max() < analysis.SAME, "A cannot see what follows"
    by_hand = []
    for a, *rest in triples:
        n = l2v.tokenizer.encode([a])[0].pooled.sum()
        ids = [torch.from_numpy(l2v.tokenizer.encode([f"{a} {r}"])[0].ids)[None] for r in rest]
        q, like, unlike = (l2v.decoder(i, causal=False)[0, 1 : 1 + n].mean(0) for i in ids)
        by_hand.append((F.cosine_similarity(q, like, dim=0) - F.cosine_similarity(q, unlike, dim=0)).item())
    margins = analysis.future_margins(l2v, triples)
    np.testing.assert_allclose(margins, by_hand, atol=1e-5)


def test_the_probe_refuses_what_rounds_more_than_it_tells_apart():
    with pytest.raises(ValueError, match="load the encoder with dtype='float32'"):
        analysis.future_margins(LLM2Vec.from_pretrained("tiny", device="cpu", dtype="bfloat16"))


def test_the_paired_test_on_the_probe():
    blind, knowing = np.zeros(144), np.where(np.arange(144) % 5 == 0, -0.1, 0.1)
    scores = [compare.resample(analysis.future_score(m)) for m in (blind, knowing)]
    assert compare.interval(*scores[0]) == {"value": 50, "low": 50, "high": 50}
    assert scores[1][0] == pytest.approx(100 * 115 / 144) and compare.paired(*scores)["p"] < 0.01


def test_bad_triples(tmp_path):
    (tmp_path / "t.tsv").write_text("a\tb\tc\td\na\tb\tc\n")
    with pytest.raises(ValueError, match="t.tsv:2: found .*expected A<tab>B<tab>C<tab>D"):
        analysis.read_triples(tmp_path / "t.tsv")


def test_the_lens_looks_the_encoders_way():
    both = LLM2Vec.from_pretrained("tiny", device="cpu", lm_head=True)
    text = "The capital of the country is"
    ids = torch.from_numpy(both.tokenizer.encode([text])[0].ids)[None]
    with torch.no_grad():
        last = both.lm_head(both.decoder(ids, causal=False))[0]
    assert analysis.logit_lens(both, text, top=2)[1][-1] == [both.tokenizer.pieces(row.topk(2).indices) for row in last]
