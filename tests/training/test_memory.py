"""The prediction against what autograd really keeps, for the real shapes, with tensors that are only pretended."""

from dataclasses import replace

import pytest
import torch
from peak_memory import PeakMemory, like_a_cpu, like_a_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import VARIANTS
from llm2vec_min.config import PAPER, PRESETS, ModelConfig
from llm2vec_min.lora import add_lora
from llm2vec_min.model import SHORT, Decoder, set_attention_dropout
from llm2vec_min.training.memory import count_adapter, count_parameters, fit, plan, plan_run, shape_of_run
from llm2vec_min.training.mntp import mntp_loss
from llm2vec_min.training.settings import Settings

SHAPES = {
    "1.3b": (2048, 24, 16, 16, 5504),
    "llama-2-7b": (4096, 32, 32, 32, 11008),
    "mistral-7b": (4096, 32, 32, 8, 14336),
}


def make_config(hidden_size, layers, heads, key_value_heads, intermediate_size) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=128,
    )


def measure(config: ModelConfig, settings: Settings, stage: str, dtype=torch.bfloat16) -> tuple[int, int, int]:
    """Base parameters, trained parameters and peak bytes of two optimizer steps; nothing is computed or allocated."""
    is_mntp = stage == "mntp"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            decoder = Decoder(config).requires_grad_(False)
            lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).requires_grad_(False)
            base = [p for m in (decoder, lm_head if is_mntp else nn.Module()) for p in m.parameters()]
            add_lora(decoder, settings.lora_r, settings.lora_alpha, settings.lora_dropout)
            decoder.train()
            decoder.gradient_checkpointing = settings.gradient_checkpointing
            trained = [p for p in decoder.parameters() if p.requires_grad]
            known = [*decoder.parameters(), *lm_head.parameters()]
            optimizer = torch.optim.AdamW(trained, fused=True)
            rows, T = settings.micro_batch_size or settings.batch_size, settings.max_length
            ids = torch.zeros(2 * rows if stage == "simcse" else rows, T, dtype=torch.int64)
            if stage == "simcse":
                set_attention_dropout(decoder, settings.attention_dropout)
            with PeakMemory(known) as memory:
                for _ in range(2):
                    if is_mntp:
                        loss = mntp_loss(decoder, lm_head, ids, ids.clone())
                    else:
                        loss = decoder(ids, causal=False).float().mean(1).pow(2).sum()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
    finally:
        torch.set_default_dtype(before)
    bytes_of = sum(p.numel() * p.element_size() for p in [*base, *trained])
    return sum(p.numel() for p in base), sum(p.numel() for p in trained), bytes_of + memory.peak


def chosen_share(probability: float):
    """`chosen_states` without looking at the labels, which pretended tensors do not have."""

    def chosen(decoder, masked_ids, labels):
        hidden = decoder(masked_ids, causal=False).flatten(0, 1)
        count = int(probability * len(hidden))
        return hidden[:count], labels.flatten()[:count]

    return chosen


CKPT = dict(gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("shape", "stage", "changes"),
    [
        ("1.3b", "mntp", {}),
        ("1.3b", "mntp", dict(micro_batch_size=4)),
        ("1.3b", "mntp", dict(lora_dropout=0.0, lora_r=64)),
        ("1.3b", "mntp", dict(batch_size=128, max_length=128)),
        ("1.3b", "simcse", dict(batch_size=128, max_length=128, micro_batch_size=16)),
        ("llama-2-7b", "mntp", CKPT),
        ("llama-2-7b", "mntp", CKPT | dict(micro_batch_size=8)),
        ("llama-2-7b", "simcse", CKPT | dict(batch_size=128, max_length=128, micro_batch_size=32)),
        ("1.3b", "supervised", dict(batch_size=512, micro_batch_size=8)),
        ("llama-2-7b", "supervised", CKPT | dict(batch_size=512, micro_batch_size=8)),
        ("mistral-7b", "mntp", CKPT | dict(mask_probability=0.8)),
    ],
)
@pytest.mark.parametrize("on_gpu", [True, False], ids=["gpu", "cpu"])
def test_prediction(monkeypatch, shape, stage, changes, on_gpu):
    if shape != "1.3b" and not on_gpu:
        pytest.skip("nobody trains 7B on a CPU")
    settings = Settings(**(dict(attention_dropout=0.0 if on_gpu else 0.3) | changes))  # flash keeps no probabilities
    config = make_config(*SHAPES[shape])
    monkeypatch.setattr("llm2vec_min.training.mntp.chosen_states", chosen_share(settings.mask_probability))
    (like_a_gpu if on_gpu else like_a_cpu)(monkeypatch)
    base, trained, peak = measure(config, settings, stage)
    predicted = plan(config, settings, stage, on_gpu=on_gpu)
    assert (predicted.parameters, predicted.trained) == (base, trained)
    assert predicted.peak == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("stage", "more"), [("mntp", 0), ("mntp", 1), ("simcse", 1)])
def test_prediction_where_attention_is_by_hand_or_just_not(monkeypatch, stage, more, dtype):
    """Many narrow heads, so that their probabilities weigh as much as all else; attention dropout is by hand at any length."""
    settings = Settings(batch_size=4, max_length=SHORT[dtype.itemsize] + more, attention_dropout=0.3)
    config = replace(make_config(128, 24, 16, 16, 352), head_dim=8, vocab_size=1000)
    monkeypatch.setattr("llm2vec_min.training.mntp.chosen_states", chosen_share(settings.mask_probability))
    like_a_cpu(monkeypatch)
    *_, peak = measure(config, settings, stage, dtype)
    assert plan(config, settings, stage, size=dtype.itemsize, on_gpu=False).peak == pytest.approx(peak, rel=0.05)


def test_the_papers_batches_fit_into_24_gb():
    """The defaults of the 7B presets."""
    for shape, name in (("llama-2-7b", "llama-2-7b"), ("mistral-7b", "mistral-7b")):
        for stage in ("mntp", "simcse", "supervised"):
            settings = Settings(**(PAPER[stage] | getattr(PRESETS[name], stage)))
            assert plan(make_config(*SHAPES[shape]), settings, stage).peak < 20e9


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_for_every_kind_of_model(both, variant):
    _, model = both(variant)
    count = count_parameters(model.config)
    total = model.config.num_hidden_layers * count["layer"] + count["embedding"] + count["head"] + model.config.hidden_size
    assert total == sum(p.numel() for p in model.parameters())
    add_lora(model.model, r=3)
    assert count_adapter(model.config, 3) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_processes_share_the_work_and_sharding_the_weights():
    config = make_config(*SHAPES["llama-2-7b"])
    one, eight, sharded = (
        plan(config, Settings(**CKPT), "mntp", processes=n, sharded=s) for n, s in ((1, False), (8, False), (8, True))
    )
    assert eight.tokens == one.tokens and eight.operations["forward"] == one.operations["forward"]
    assert eight.memory["activations"] == one.memory["activations"] / 8
    assert eight.memory["weights"] == one.memory["weights"]
    assert sharded.memory["weights"] < 0.25 * one.memory["weights"]


def test_gradcache_costs_a_forward_pass():
    config = make_config(*SHAPES["1.3b"])
    whole, cached = (plan(config, Settings(micro_batch_size=size), "simcse") for size in (0, 8))
    assert plan(config, Settings(), "supervised").operations["forward"] == 1.5 * whole.operations["forward"], (
        "three texts a row"
    )
    extra = sum(cached.operations.values()) - sum(whole.operations.values())
    assert extra == pytest.approx(whole.operations["forward"])
    assert cached.peak < 0.4 * whole.peak


def test_the_fastest_way_that_fits():
    """7B on 80 GB: several passes cost nothing, checkpointing half more; on 16 GB it needs both, on 2 nothing helps."""
    config, small = make_config(*SHAPES["llama-2-7b"]), make_config(*SHAPES["1.3b"])
    settings = Settings()
    on_80, on_16, on_2 = (fit(config, settings, "mntp", free) for free in (80e9, 17e9, 2e9))
    assert not on_80.gradient_checkpointing and 1 < on_80.micro_batch_size < 32
    twice = replace(on_80, micro_batch_size=2 * on_80.micro_batch_size)
    assert plan(config, on_80, "mntp").peak < 72e9 < plan(config, twice, "mntp").peak
    assert on_16.gradient_checkpointing and plan(config, on_16, "mntp").peak < 0.9 * 17e9
    assert on_2.gradient_checkpointing and on_2.micro_batch_size == 1
    whole = fit(small, settings, "mntp", 80e9)
    assert not whole.gradient_checkpointing and whole.micro_batch_size == 0, "its logits twice, rather than two passes"
    twins = Settings(batch_size=128, max_length=128)
    chosen = fit(small, twins, "simcse", 80e9)  # GradCache and checkpointing cost the same; one of them is enough
    assert bool(chosen.micro_batch_size) + chosen.gradient_checkpointing == 1
    told = replace(settings, micro_batch_size=8, gradient_checkpointing=True)
    triplets = fit(small, Settings(batch_size=512), "supervised", 80e9)
    assert triplets.micro_batch_size == 48 and not triplets.gradient_checkpointing, "a 32nd of 1536 texts"
    few = fit(small, Settings(batch_size=16), "supervised", 80e9)
    assert few.micro_batch_size == 48, "never all there is: lists of negatives may bring more than the three texts of a row"
    said = fit(config, told, "mntp", 80e9, {"micro_batch_size", "gradient_checkpointing"})
    assert said == told, "what the user has said stays"


def test_a_stage_of_ones_own_is_planned_as_one_text_a_row():
    """On a GPU `train.py` asks before every stage."""
    config = ModelConfig(1000, 64, 128, 2, 4, 2, 16)
    settings = Settings(batch_size=8, max_length=32, micro_batch_size=8)
    forward = plan(config, settings, "simcse").operations["forward"]
    assert plan(config, settings, "distill").operations["forward"] == pytest.approx(forward / 2)


def test_the_plan_of_a_run_knows_its_dtype_and_processes(monkeypatch):
    settings = Settings(batch_size=8, max_length=16)
    for device, dtype, size in (("cpu", None, 4), ("cpu", "bfloat16", 2), ("cuda", None, 2), ("cuda", "float32", 4)):
        assert shape_of_run("tiny", device, dtype, False)[1] == {
            "size": size, "processes": 1, "sharded": False, "on_gpu": device == "cuda",
        }  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shape_of_run("tiny", "cpu", None, True)[1]["processes"] == 4
    four, two = (plan_run("tiny", "mntp", settings, "cpu", dtype, False).memory["weights"] for dtype in ("float32", "bfloat16"))
    assert four == 2 * two > 0


def test_operations_are_those_that_torch_counts():
    config = ModelConfig(100, 64, 96, 2, 4, 2, 16)
    decoder = Decoder(config)
    add_lora(decoder, r=1, dropout=0.0)  # small: its in-place product is not counted
    ids = torch.zeros(3, 128, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        decoder(ids, causal=False)
    planned = plan(config, Settings(batch_size=3, max_length=128, lora_r=1), "mntp").operations["forward"]
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.03)


def test_two_whole_layers_are_there_at_once_however_many_share_the_rest():
    config = make_config(*SHAPES["llama-2-7b"])
    count = count_parameters(config)
    many = plan(config, Settings(batch_size=1024), "simcse", processes=1024, sharded=True).memory["weights"]
    assert many == pytest.approx(2 * (2 * count["layer"] + count["embedding"]), rel=0.05)
