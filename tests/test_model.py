"""The decoder equals transformers, piece by piece; and known bugs do not."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from conftest import VARIANTS, random_batch, run_reference
from llm2vec_min import model as ours
from llm2vec_min.model import attention_mask, rotary_tables, rotate

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["by_hand", "kernel"])
def attention(request, monkeypatch):
    """Written out, as for a CPU's short rows; and by torch's kernel, as for its long ones."""
    if request.param == "kernel":
        monkeypatch.setattr(ours, "SHORT", {})


@pytest.mark.parametrize("variant", ["llama", "llama-linear-rope", "llama-llama3-rope", "llama-head-dim"])
def test_rotary(both, variant):
    theirs, mine = both(variant)
    D = mine.config.head_dim
    x = torch.randn(2, 4, 9, D)
    cos, sin = theirs.model.rotary_emb(x, torch.arange(9)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    tables = rotary_tables(mine.config, 9)
    torch.testing.assert_close(tables[0], cos[0], **TOLERANCE)
    torch.testing.assert_close(rotate(x, *tables), expected, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "shapes"), [(rotate, [(2, 9, 4, 16), (9, 1, 16), (9, 1, 16)]), (ours.swiglu, [(2, 9, 112)] * 2)]
)
def test_one_kernel_computes_the_same(function, shapes):
    """What CUDA gets, compiled for the CPU: values, and gradients of what has one."""
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for f in (function, torch.compile(function.__wrapped__, dynamic=True)):
        fresh = [x.clone().requires_grad_(x.shape[0] == 2) for x in inputs]
        y = f(*fresh)
        y.sin().sum().backward()
        results.append([y, *(x.grad for x in fresh if x.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_rotary_is_relative():
    q, k = torch.randn(2, 16)
    config = ours.ModelConfig(1, 16, 1, 1, 1, 1, 16)
    cos, sin = rotary_tables(config, 40)

    def score(i, j):
        return rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])

    torch.testing.assert_close(score(3, 7), score(33, 37), rtol=1e-4, atol=1e-4)
    assert (score(3, 7) - score(3, 8)).abs() > 1e-4


def test_norm(both):
    theirs, mine = both("llama")
    x = 3 * torch.randn(2, 5, 64)
    torch.testing.assert_close(mine.model.layers[0].input_layernorm(x), theirs.model.layers[0].input_layernorm(x))


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("variant", ["llama", "llama-biases", "llama-head-dim", "qwen2"])
def test_attention_mlp_layer(both, variant):
    theirs, mine = both(variant)
    x = torch.randn(2, 7, 64)
    rope = rotary_tables(mine.config, 7)
    for a, b in zip(theirs.model.layers, mine.model.layers, strict=True):
        position_embeddings = theirs.model.rotary_emb(x, torch.arange(7)[None])
        expected, _ = a.self_attn(x, position_embeddings=position_embeddings, attention_mask=None)
        torch.testing.assert_close(b.self_attn(x, rope, None, causal=True), expected, **TOLERANCE)
        torch.testing.assert_close(b.mlp(x), a.mlp(x), **TOLERANCE)
        expected = a(x, position_embeddings=position_embeddings, attention_mask=None)
        torch.testing.assert_close(b(x, rope, None, True), expected, **TOLERANCE)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_states(both, variant, causal, padding):
    theirs, mine = both(variant)
    ids, mask = random_batch(padding=padding)
    expected = run_reference(theirs, ids, mask, causal=causal, output_hidden_states=True)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(mine(ids, mask, causal=causal)[real], expected.logits[real], **TOLERANCE)
    states = mine.model(ids, mask, causal=causal, all_layers=True)
    assert len(states) == len(expected.hidden_states)
    for a, b in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], **TOLERANCE)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["llama-tied", "mistral-window", "llama-llama3-rope", "qwen2"])
def test_gradients(both, variant, causal):
    theirs, mine = both(variant)
    theirs.requires_grad_(True), mine.requires_grad_(True)
    ids, mask = random_batch(padding="left")
    weights = torch.randn(3, 11, 257) * mask[:, :, None]
    (run_reference(theirs, ids, mask, causal=causal).logits * weights).mean().backward()
    (mine(ids, mask, causal=causal) * weights).mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        scale = expected[name].grad.abs().max()
        torch.testing.assert_close(parameter.grad / scale, expected[name].grad / scale, rtol=1e-5, atol=1e-5)
    theirs.zero_grad()


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
def test_batch_of_one_without_padding_is_bidirectional(both, variant):
    """The authors' code fell back to causal here; token 0 must see the last token."""
    theirs, mine = both(variant)
    ids, _ = random_batch(B=1, T=5)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 257
    for mask in (None, torch.ones(1, 5, dtype=torch.bool)):
        a, b = (mine.model(x, mask, causal=False)[0, 0] for x in (ids, changed))
        assert (a - b).abs().max() > 1e-2
        a, b = (mine.model(x, mask, causal=True)[0, 0] for x in (ids, changed))
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(mine(ids, causal=False), run_reference(theirs, ids, causal=False).logits, **TOLERANCE)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", ["llama", "mistral-window"])
def test_padding_changes_nothing(both, variant, causal):
    _, mine = both(variant)
    ids, _ = random_batch(B=1, T=9)
    alone = mine.model(ids, causal=causal)
    for left, right in ((4, 0), (0, 4), (3, 2)):
        padded = F.pad(ids, (left, right), value=7)
        mask = F.pad(torch.ones_like(ids, dtype=torch.bool), (left, right), value=False)
        states = mine.model(padded, mask, causal=causal)
        assert states.isfinite().all()
        torch.testing.assert_close(states[mask], alone[0], **TOLERANCE)


def test_mask_only_where_needed():
    real = torch.ones(2, 4, dtype=torch.bool)
    assert attention_mask(None, 4, causal=True) is None
    assert attention_mask(None, 4, causal=False) is None
    assert attention_mask(None, 4, causal=True, sliding_window=4) is None
    assert attention_mask(real, 4, causal=False).shape == (2, 1, 1, 4)
    window = attention_mask(None, 4, causal=True, sliding_window=2)[0, 0].int().tolist()
    assert window == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    window = attention_mask(None, 4, causal=False, sliding_window=1)[0, 0].int().tolist()
    assert window == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_a_row_of_padding_alone_is_refused(both):
    _, mine = both("llama")
    with pytest.raises(ValueError, match="row 0 of the batch has no real token"):
        mine.model(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool), causal=False)


@pytest.mark.parametrize("causal", [True, False])
def test_linear_layers_see_real_tokens_only(both, causal):
    _, mine = both("llama")
    ids, mask = random_batch(padding="left")
    seen = []
    for layer in mine.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    states = mine.model(ids, mask, causal=causal)
    assert seen == [(mask.sum(), 64)] * 3 and not states[~mask].any()
    seen.clear()
    mine.model(ids, causal=causal)
    assert seen == [(*ids.shape, 64)] * 3, "off where nothing is padded"


def test_direction_must_be_said(both):
    _, mine = both("llama")
    with pytest.raises(TypeError):
        mine.model(torch.zeros(1, 3, dtype=torch.long))


def test_gradient_checkpointing_and_dropout(both):
    _, mine = both("llama")
    mine.requires_grad_(True)
    ours.set_attention_dropout(mine, 0.3)
    ids, mask = random_batch(padding="left")
    gradients = []
    for checkpointing in (False, True):
        mine.model.gradient_checkpointing = checkpointing
        mine.train().zero_grad()
        torch.manual_seed(3)
        mine(ids, mask, causal=False)[mask].square().mean().backward()
        gradients.append([p.grad.clone() for p in mine.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    one, two = (mine.model(ids, mask, causal=False) for _ in range(2))
    assert (one - two)[mask].abs().max() > 1e-2, "attention dropout draws anew in training"
    mine.eval()
    one, two = (mine.model(ids, mask, causal=False) for _ in range(2))
    assert torch.equal(one, two), "and never outside it"


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_hand_is_torchs(causal, padding, monkeypatch):
    """What a CPU does on short rows, and on all with dropout; almost none here, so that the two can be compared."""
    q, k, v = (torch.randn(3, heads, 11, 8) for heads in (4, 2, 2))
    mask = attention_mask(random_batch(padding=padding)[1], 11, causal=causal)
    by_hand = ours.attend(q, k, v, mask, causal)
    monkeypatch.setattr(ours, "SHORT", {})
    expected = ours.attend(q, k, v, mask, causal)
    torch.testing.assert_close(by_hand, expected, **TOLERANCE)
    torch.manual_seed(0)
    torch.testing.assert_close(ours.attend(q, k, v, mask, causal, 1e-9), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_rows_do_without_torchs_kernel(dtype, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)

    def attend(T: int) -> None:
        ours.attend(*(torch.randn(1, 2, T, 8, dtype=dtype) for _ in "qkv"), None, True)

    attend(ours.SHORT[dtype.itemsize])
    with pytest.raises(TypeError, match="not callable"):
        attend(ours.SHORT[dtype.itemsize] + 1)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_hand_in_bfloat16(causal, padding, monkeypatch):
    """Gives what torch's kernel gives in float64, and its gradients."""
    mask = attention_mask(random_batch(padding=padding)[1], 11, causal=causal)
    tensors = [torch.randn(3, heads, 11, 8).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    result = ours.attend(*tensors, mask, causal)
    result.double().square().sum().backward()
    monkeypatch.setattr(ours, "SHORT", {})
    expected = ours.attend(*exact, mask, causal)
    expected.square().sum().backward()
    loose = dict(rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(result.double(), expected, **loose)
    for tensor, other in zip(tensors, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), other.grad, **loose)


@pytest.mark.parametrize("probability", [0.05, 0.3])
def test_dropout_is_unbiased_and_independent(probability):
    x = torch.full((201, 501), 2.0, requires_grad=True)  # not a multiple of the four that share a draw
    y = ours.dropout(x, probability, True)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - probability, abs=0.005)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - probability)))
    both = (kept[:, :-1] & kept[:, 1:]).float().mean().item()
    assert both == pytest.approx((1 - probability) ** 2, abs=0.005), "neighbours are drawn apart"
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - probability))
    assert ours.dropout(x, probability, False) is x


# ---- each known bug, put back in, must make parity fail ----


def interleaved(x, cos, sin):
    cos, sin = (t[..., t.shape[-1] // 2 :].repeat_interleave(2, dim=-1) for t in (cos, sin))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin


def test_known_bugs_break_parity(both, monkeypatch):
    theirs, mine = both("llama")
    ids, mask = random_batch(padding="left")
    expected = run_reference(theirs, ids, mask, causal=False).logits[mask]

    def error() -> float:
        return (mine(ids, mask, causal=False)[mask] - expected).abs().max().item()

    assert error() < 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(ours, "rotate", interleaved)
        assert error() > 0.5, "interleaved rotary pairs"
    with monkeypatch.context() as patch:
        patch.setattr(ours, "attention_mask", lambda m, T, **k: torch.ones(len(m), 1, 1, T, dtype=torch.bool))
        assert error() > 0.5, "ignored padding"
    with monkeypatch.context() as patch:
        patch.setattr(ours, "attention_mask", lambda m, T, **k: attention_mask(m, T, causal=True))
        assert error() > 0.5, "silently causal"
    with monkeypatch.context() as patch:
        patch.setattr(ours.RMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], eps=self.eps))
        assert error() > 0.5, "norm weights not loaded"
    with monkeypatch.context() as patch:
        patch.setattr(ours, "SHORT", {})
        assert error() < 1e-4
        patch.setattr(torch.Tensor, "repeat_interleave", lambda x, n, dim: x.repeat(1, n, 1, 1))
        assert error() > 0.5, "query heads on the wrong key heads"


def test_positions_are_exact_in_bfloat16(both):
    """Which holds whole numbers up to 256 only: later positions would share their angles."""
    _, mine = both("llama")
    exact, rounded = (rotary_tables(mine.model.config, 1000, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(b.double(), a, atol=4e-3, rtol=0)


def test_fresh_weights_are_as_wide_as_asked(both):
    _, mine = both("llama-biases")
    ours.init_weights(mine, std=0.05)
    for name, weight in mine.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            assert 0.04 < weight.std() < 0.06, name


def test_layers_are_computed_again_only_in_training_that_asks_for_it(both, monkeypatch):
    _, mine = both("llama")
    ids, _ = random_batch()
    calls = []
    monkeypatch.setattr(ours, "checkpoint", lambda layer, *arguments, **_: calls.append(layer) or layer(*arguments))
    for wanted, training in ((False, True), (True, False), (True, True)):
        mine.model.gradient_checkpointing = wanted
        mine.model.train(training)(ids, causal=False)
        assert len(calls) == (3 if wanted and training else 0)
