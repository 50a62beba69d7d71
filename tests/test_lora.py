"""LoRALinear by its definition."""

import weakref

import pytest
import torch
from torch import nn

from llm2vec_min.lora import TARGET_MODULES, LoRALinear, add_lora, merge_lora


def layer(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    return LoRALinear(nn.Linear(10, 6, dtype=dtype), r=3, alpha=6, dropout=dropout)


def test_fresh_adapter_is_the_identity_and_the_formula_holds():
    lora = layer()
    x = torch.randn(2, 5, 10)
    assert torch.equal(lora(x), nn.functional.linear(x, lora.weight, lora.bias))
    nn.init.normal_(lora.lora_B.weight)
    A, B, W = (m.weight.double() for m in (lora.lora_A, lora.lora_B, lora))
    expected = x.double() @ (W + 2.0 * B @ A).T + lora.bias.double()
    torch.testing.assert_close(lora(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.merged()(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_adapter_stays_float32_over_bfloat16():
    lora = layer(torch.bfloat16)
    assert lora.weight.dtype == torch.bfloat16 and lora.lora_A.weight.dtype == torch.float32
    assert lora(torch.randn(2, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_is_on_activations_and_only_on_the_adapter():
    lora = layer(dropout=0.5)
    x = torch.ones(4, 10)
    same = dict(rtol=1e-6, atol=1e-6)  # not equal: where a row lies in memory may decide its last bit
    torch.testing.assert_close(lora(x)[0], lora(x)[1], **same)  # B is zero: dropout cannot be seen
    nn.init.normal_(lora.lora_B.weight)
    rows = lora(x)
    assert torch.pdist(rows).min() > 1e-3, "each row its own noise"
    lora.eval()
    torch.testing.assert_close(lora(x)[0], lora(x)[1], **same)


def test_add_lora(decoder):
    chosen = add_lora(decoder, r=2)
    assert len(chosen) == 7 * 3 and {name.rpartition(".")[2] for name in chosen} == set(TARGET_MODULES)
    trainable = [name for name, p in decoder.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(chosen) and all("lora_" in name for name in trainable)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(decoder)


def test_a_second_adapter_does_not_freeze_the_first(decoder):
    add_lora(decoder, r=2, targets=["q_proj"])
    with pytest.raises(ValueError, match="q_proj has an adapter already"):
        add_lora(decoder, r=2, targets=["v_proj"])
    assert any(p.requires_grad for p in decoder.parameters())


def test_new_layers_are_in_the_mode_of_those_they_replace(decoder):
    add_lora(decoder.eval(), r=2, targets=["q_proj"])
    assert not any(module.training for module in decoder.modules())
    merge_lora(decoder)
    add_lora(decoder, r=2, targets=["q_proj"])
    assert not any(module.training for module in decoder.modules()), "on what was merged, too"
    merge_lora(decoder)
    add_lora(decoder.train(), r=2, targets=["k_proj"])
    assert all(module.training for module in decoder.modules())


def test_the_rest_is_frozen(decoder):
    decoder.requires_grad_(True)
    add_lora(decoder, r=2, targets=["q_proj"])
    assert {name.split(".lora_")[0] for name, p in decoder.named_parameters() if p.requires_grad} == {
        f"layers.{i}.self_attn.q_proj" for i in range(3)
    }


def test_bad_targets(decoder):
    decoder.norm.requires_grad_()
    with pytest.raises(ValueError, match="no linear layer is named c_attn"):
        add_lora(decoder, targets=["q_proj", "c_attn"])
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(decoder, r=0)
    with pytest.raises(ValueError, match="alpha is 0, expected a number above 0"):
        add_lora(decoder, alpha=0)
    with pytest.raises(ValueError, match="dropout is 1.0, expected at least 0 and below 1"):
        add_lora(decoder, dropout=1.0)
    assert decoder.norm.weight.requires_grad, "what was refused changed nothing"
    assert add_lora(decoder, r=2, targets="q_proj") == [f"layers.{i}.self_attn.q_proj" for i in range(3)]


def test_merging_lets_each_unmerged_weight_go_at_once(decoder, monkeypatch):
    """Held to the end they would be a second copy of the model."""
    chosen = add_lora(decoder, r=2)
    before = [weakref.ref(decoder.get_submodule(name)) for name in chosen]
    alive, merged = [], LoRALinear.merged

    def counted(module):
        alive.append(sum(ref() is not None for ref in before))
        return merged(module)

    monkeypatch.setattr(LoRALinear, "merged", counted)
    merge_lora(decoder)
    assert alive == list(range(len(chosen), 0, -1))


def test_a_fresh_A_is_as_wide_as_pefts():
    torch.manual_seed(0)
    A = LoRALinear(nn.Linear(256, 8), r=64, alpha=1, dropout=0.0).lora_A.weight
    assert 0.95 * 256**-0.5 < A.abs().max() <= 256**-0.5
