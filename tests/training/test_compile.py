"""Compiled training: GradCache sees the same noise in both of its passes, whatever else was compiled before."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import TEXTS
from llm2vec_min import LLM2Vec, model
from llm2vec_min.fast import compile_layers, dropout
from llm2vec_min.lora import add_lora
from llm2vec_min.model import set_attention_dropout
from llm2vec_min.training.simcse import embed_twins

BATCHES = [TEXTS[:2], TEXTS[:3], [TEXTS[0]] * 2, [TEXTS[1]] * 3, TEXTS[4:], TEXTS[3:4]]  # padded or not, of several shapes


@pytest.fixture
def l2v(model_folder, monkeypatch):
    """Two layers (the first one's input needs no gradient) with noise and the random numbers that a GPU draws."""
    torch._dynamo.reset()
    for room in ("model", "lora"):
        monkeypatch.setattr(f"llm2vec_min.{room}.dropout", F.dropout)
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    del l2v.decoder.layers[2:]
    add_lora(l2v.decoder, r=2, dropout=0.1)
    set_attention_dropout(l2v.decoder, 0.3)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # torch's own, before and after
        yield l2v
    torch._dynamo.reset()


def attend_as_a_gpu_does(q, k, v, mask, causal, dropout_p):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal and mask is None)


def two_passes(l2v, texts) -> list:
    """The twins' vectors as GradCache computes them first, without a graph, and then, with one; after an evaluation."""
    l2v.encode(texts)
    l2v.train()
    passes = []
    for with_gradient in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(with_gradient):
            passes.append(torch.cat(embed_twins(l2v, l2v.tokenize(texts))))
    passes[1].square().sum().backward()
    assert (passes[0][: len(texts)] - passes[0][len(texts) :]).abs().max() > 1e-3, "the noise is on"
    return [vectors.detach() for vectors in passes]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_layer_runs_eagerly(l2v, monkeypatch, checkpointing):
    """Past torch's own limit of graphs one would, with other random numbers than a compiled one."""
    graphs, eager = [], []

    def attend(*arguments):
        if not torch.compiler.is_compiling():
            eager.append(arguments)
        return attend_as_a_gpu_does(*arguments)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(model, "attend", attend)
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module, backend=backend))
    l2v.decoder.gradient_checkpointing = checkpointing
    compile_layers(l2v.decoder)
    for texts in BATCHES:
        torch.testing.assert_close(*two_passes(l2v, texts))
    assert not eager and len(graphs) > 8


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_both_passes_draw_the_same_noise(l2v, monkeypatch, device):
    """With the CPU's own attention and dropout, or as on a GPU."""
    if device == "gpu":
        monkeypatch.setattr(model, "attend", attend_as_a_gpu_does)
    else:
        for room in ("model", "lora"):
            monkeypatch.setattr(f"llm2vec_min.{room}.dropout", dropout)
    compile_layers(l2v.decoder)
    for texts in BATCHES[:2]:
        torch.testing.assert_close(*two_passes(l2v, texts), rtol=1e-4, atol=1e-4)
