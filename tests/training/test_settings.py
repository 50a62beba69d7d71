"""Every field of Settings, and every flag of train.py, does something: each has a test that fails when it is ignored."""

from dataclasses import fields

import pytest
import torch
from test_loop import same, train, weights
from test_weights import randomize

import train as command
from conftest import TEXTS
from llm2vec_min import LLM2Vec
from llm2vec_min.config import PRESETS
from llm2vec_min.evaluation import sts_score
from llm2vec_min.lora import LoRALinear, add_lora
from llm2vec_min.training.flags import READ_BY, build_parser, check
from llm2vec_min.training.loop import Loop
from llm2vec_min.training.settings import Settings
from llm2vec_min.weights import adapter_of, save_adapter

# field -> (stage, another value): trained with it, other weights come out
WEIGHTS = {
    "batch_size": ("mntp", 8),
    "lr": ("mntp", 2e-3),
    "warmup_steps": ("mntp", 3),
    "schedule": ("mntp", "cosine"),
    "weight_decay": ("mntp", 0.5),
    "adam_beta2": ("mntp", 0.9),
    "max_grad_norm": ("mntp", 1e-3),
    "mask_probability": ("mntp", 0.9),
    "mask_style": ("mntp", "all"),
    "seed": ("mntp", 5),
    "max_length": ("simcse", 5),
    "attention_dropout": ("simcse", 0.0),
    "temperature": ("simcse", 0.5),
}
SUPERVISED = {"in_batch_negatives", "filter_negatives", "matryoshka"}  # test_supervised.py
OTHERWISE = {
    "steps",
    "micro_batch_size",
    "eval_every",
    "save_every",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "gradient_checkpointing",
}


def test_output_with_a_slash():
    """As a shell completes it: what stands beside the run must not be looked for inside it."""
    parser = build_parser([], "")
    args = parser.parse_args(["--output", "runs/new/"])
    check(args, parser)
    assert args.output == "runs/new"


def test_every_field_has_a_test():
    assert WEIGHTS.keys() | OTHERWISE | SUPERVISED == {field.name for field in fields(Settings)}


@pytest.fixture(scope="module")
def usual(model_folder):
    return {stage: weights(train(model_folder, stage)[0]) for stage in ("mntp", "simcse")}


@pytest.mark.parametrize("field", WEIGHTS)
def test_it_changes_the_weights(model_folder, usual, field):
    stage, value = WEIGHTS[field]
    assert not same(usual[stage], weights(train(model_folder, stage, settings={field: value})[0]))


def test_the_others(model_folder, tmp_path, monkeypatch):
    passes = []
    seed_dropout = Loop.seed_dropout
    monkeypatch.setattr(Loop, "seed_dropout", lambda self, part=0: passes.append(part) or seed_dropout(self, part))
    _, loop = train(model_folder, "mntp", settings=dict(steps=3, micro_batch_size=2, eval_every=2))
    assert [r["step"] for r in loop.history if "loss" in r] == [1, 2, 3]
    assert passes == [0, 1] * 3
    assert [r["step"] for r in loop.history if "calls" in r] == [0, 2, 3]
    passes.clear()
    train(model_folder, "simcse", settings=dict(steps=1, micro_batch_size=2))
    assert passes == [0, 1, 0, 1], "GradCache meets the same noise in both passes"
    saved = []
    monkeypatch.setattr(Loop, "_save_checkpoint", lambda self, step: saved.append(step))
    train(model_folder, "mntp", tmp_path, settings=dict(save_every=5))
    assert saved == [5]


def test_each_step_draws_its_own():
    drawn = [
        float(torch.rand(1, generator=loop.generator))
        for loop in [Loop(torch.nn.Linear(2, 2), Settings(steps=3), quiet=True)]
        for _ in loop
    ]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(6, 0), (6, 4), (16, 3)])
def test_micro_batches_cover_the_batch(batch_size, micro_batch_size):
    loop = Loop(torch.nn.Linear(2, 2), Settings(batch_size=batch_size, micro_batch_size=micro_batch_size), quiet=True)
    rows = [row for part in loop.micro_batches() for row in range(batch_size)[part]]
    assert rows == list(range(batch_size))


def test_each_step_and_part_and_process_has_its_own_noise(monkeypatch):
    loop = Loop(torch.nn.Linear(2, 2), Settings(steps=4), quiet=True)
    drawn = set()
    for process in (0, 1):
        monkeypatch.setattr("llm2vec_min.training.loop.rank", lambda process=process: process)
        for loop.step in (0, 1):
            for part in (0, 1):
                loop.seed_dropout(part)
                drawn.add(float(torch.rand(1)))
    assert len(drawn) == 8


# ---- flags ----


class Seen(Exception):
    pass


@pytest.fixture
def start(model_folder, tmp_path, monkeypatch):
    """Runs train.py up to its loop: (encoder, examples, settings, options)."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS[:6] * 30))

    def seen(*args, **options):
        raise Seen((*args[:-1], options) if len(args) == 5 else (*args[:3], args[3], options))

    def go(*flags: str, stage: str = "mntp"):
        for name in ("train_mntp", "train_simcse", "pretrain"):
            monkeypatch.setattr(command, name, seen)
        model = [] if "--model" in flags or stage == "pretrain" else ["--model", str(model_folder)]
        try:
            command.main([
                "--stage", stage, *model, "--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "run"), "--device", "cpu",
                "--max-length", "16", "--batch-size", "4", "--eval", "", *flags,
            ])  # fmt: skip
        except Seen as found:
            return found.args[0]
        raise AssertionError("the loop was not reached")

    return go


VALUES = dict(
    steps="7", batch_size="8", micro_batch_size="2", max_length="12", lr="0.25", warmup_steps="3", schedule="cosine",
    weight_decay="0.5", adam_beta2="0.5", max_grad_norm="0.5", seed="9", lora_r="3", lora_alpha="5.0", lora_dropout="0.25",
    mask_probability="0.75", mask_style="all", attention_dropout="0.125", temperature="0.5", save_every="3", eval_every="4",
)  # fmt: skip


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_flags_become_settings(start, stage):
    other = {name for name, stages in READ_BY.items() if stage not in stages}
    pairs = [word for name in VALUES if name not in other for word in (f"--{name.replace('_', '-')}", VALUES[name])]
    settings = next(x for x in start(*pairs, "--gradient-checkpointing", stage=stage) if isinstance(x, Settings))
    found = {name: value for name, value in vars(settings).items() if name not in other}
    expected = {f.name: type(f.default)(VALUES[f.name]) for f in fields(Settings) if f.name in VALUES.keys() - other}
    assert found == expected | {"gradient_checkpointing": True}


def test_every_flag_of_a_method_says_whose_it_is():
    groups = {group.title: group for group in build_parser([], "")._action_groups}
    found = {action.dest for title in ("method", "LoRA (all stages but pretrain)") for action in groups[title]._group_actions}
    assert len(found) > 10 and found <= READ_BY.keys()


def test_flags_of_another_stage(start):
    for name, stages in READ_BY.items():
        if name in VALUES:
            for stage in {"pretrain", "mntp", "simcse", "supervised"} - set(stages):
                message = f"is for --stage {' or '.join(stages)}, {stage} does not read it"
                with pytest.raises(ValueError, match=message):
                    start(f"--{name.replace('_', '-')}", VALUES[name], stage=stage)


def layers(l2v) -> set:
    return {(m.r, m.alpha, m.dropout) for m in l2v.decoder.modules() if isinstance(m, LoRALinear)}


def test_lora_flags_reach_the_model(start):
    assert layers(start()[0]) == {(16, 32.0, 0.05)}
    l2v = start("--lora-r", "3", "--lora-alpha", "5", "--lora-dropout", "0.25")[0]
    assert layers(l2v) == {(3, 5.0, 0.25)}


def test_model_flags(start, model_folder, tmp_path, monkeypatch):
    plain = start()[0]
    assert (plain.pooling, plain.causal, plain.template) == ("mean", False, ("", ""))
    assert start("--pooling", "max")[0].pooling == "max"
    assert start("--causal", stage="simcse")[0].causal
    assert start("--preset", "llama-2-7b")[0].template == PRESETS["llama-2-7b"].template
    assert start("--dtype", "bfloat16")[0].decoder.norm.weight.dtype == torch.bfloat16
    assert start()[1].shape[1] == 16 and start("--max-length", "9")[1].shape[1] == 9

    first = [start("--seed", seed)[0].decoder.layers[0].mlp.up_proj.lora_A.weight for seed in "001"]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2]), "the adapter's start is the seed's"

    other = LLM2Vec.from_pretrained(model_folder, device="cpu")
    add_lora(other.decoder, r=2)
    randomize(other.decoder)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", *adapter_of(other.decoder, str(model_folder)))
    merged = start("--adapter", str(tmp_path / "adapter"))[0]
    assert len(merged.adapters) == 1
    assert not torch.equal(merged.decoder.layers[0].mlp.up_proj.weight, plain.decoder.layers[0].mlp.up_proj.weight)

    compiled = []
    monkeypatch.setattr("llm2vec_min.model.DecoderLayer.compile", lambda self: compiled.append(self))
    start()
    assert not compiled
    start("--compile")
    assert len(compiled) == 3


def test_pretrain_flags(start, tmp_path):
    (tmp_path / "more.txt").write_text("\n".join(f"{text} {i}" for i in range(400) for text in TEXTS[:6]))
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
    flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    models = [
        start(*flags, "--data", str(tmp_path / "more.txt"), "--vocab-size", size, "--seed", seed, stage="pretrain")[0]
        for size, seed in (("300", "0"), ("310", "0"), ("300", "1"))
    ]
    assert {name: getattr(models[0].config, name) for name in sizes} == sizes
    assert [model.config.vocab_size for model in models] == [300, 310, 300]
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert not torch.equal(weights[0], weights[2])


def test_pretraining_shows_the_scores_of_both_directions(start, tmp_path):
    (tmp_path / "more.txt").write_text("\n".join(f"{text} {i}" for i in range(400) for text in TEXTS[:6]))
    (tmp_path / "pairs.tsv").write_text("".join(f"{i}\t{TEXTS[i]}\t{TEXTS[i + 1]}\n" for i in range(3)))
    flags = [
        "--data",
        str(tmp_path / "more.txt"),
        "--vocab-size",
        "300",
        "--hidden-size",
        "32",
        "--eval",
        str(tmp_path / "pairs.tsv"),
    ]
    model, *_, options = start(*flags, stage="pretrain")
    scores = options["evaluate"]()
    tokenizer = options["tokenizer"]
    expected = {
        f"spearman_{name}": sts_score(LLM2Vec(model.model, tokenizer, causal=causal), tmp_path / "pairs.tsv")
        for name, causal in (("causal", True), ("bidirectional", False))
    }
    assert scores == expected and len(set(scores.values())) == 2


def test_a_norm_of_zero_does_not_clip(model_folder):
    free, high = (weights(train(model_folder, "mntp", settings=dict(max_grad_norm=norm))[0]) for norm in (0.0, 1e9))
    assert same(free, high)


def test_pretraining_begins_with_the_weights_of_its_seed(start, tmp_path):
    (tmp_path / "more.txt").write_text("\n".join(f"{text} {i}" for i in range(400) for text in TEXTS[:6]))
    flags = ["--data", str(tmp_path / "more.txt"), "--vocab-size", "300", "--hidden-size", "32"]
    first = [start(*flags, "--seed", seed, stage="pretrain")[0].model.layers[0].mlp.up_proj.weight for seed in "001"]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
