"""What train.py can be told: its flags, with the defaults of the stage and the model at hand, and what is refused."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path

from ..cli import refuse
from ..config import MOST, PAPER, PRESETS, Preset
from ..device import DTYPES, started
from ..encoder import find_chain
from ..files import short
from ..hub import DATASETS, find_preset
from ..pooling import POOLING_MODES
from .mntp import MASK_STYLES
from .settings import SCHEDULES, Settings

STAGES = ("pretrain", "mntp", "simcse", "supervised")
ASSETS = Path(__file__).parent.parent / "assets"


def is_tiny(preset: Preset | None) -> bool:
    """Whether it is the model that ships, or what was trained from it."""
    return preset is not None and preset.model in ("tiny", PRESETS["tiny"].model)


def default_data(stage: str, preset: Preset | None) -> list[str]:
    """The text a stage trains on where --data names none: the shipped one for `tiny`, else the paper's; none for pretraining,
    and no triplets, since the paper's are on no hub."""
    if is_tiny(preset) and stage != "pretrain":
        return [str(ASSETS / "text" / ("triplets.jsonl.gz" if stage == "supervised" else "train.txt"))]
    if stage in ("pretrain", "supervised"):
        return []
    # WikiText-103 comes as parquet; wiki1m is plain text, and with 20 million tokens enough for MNTP's 16 million
    return ["wikitext-103" if stage == "mntp" and find_spec("pyarrow") else "wiki1m"]


def build_parser(argv: list[str], description: str) -> argparse.ArgumentParser:
    """The flags, with the defaults of the stage and model that `argv` names: so `--help` shows what would happen."""
    first = argparse.ArgumentParser(add_help=False)
    first.error = refuse
    first.add_argument("--stage", default="mntp")
    first.add_argument("--model", default="tiny")
    first.add_argument("--preset")
    known, _ = first.parse_known_args(argv)
    preset = find_preset(known.preset or known.model)
    recipe = {field.name: field.default for field in fields(Settings)} | PAPER.get(known.stage, {})
    if preset is not None:
        recipe |= getattr(preset, known.stage, {})
    data = default_data(known.stage, preset)

    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The defaults shown are those of --stage {known.stage} --model {known.model}: the paper's, or what its "
        f"preset says otherwise. Presets: {', '.join(PRESETS)}.",
    )

    parser.error = refuse

    def add(group, flag: str, text: str, **options) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        default = options.pop("default", recipe.get(name))
        if default is not None and default != [] and options.get("action") != "store_true":
            text += f" [{default if not isinstance(default, list) else ' '.join(default)}]"
        group.add_argument(flag, default=default, help=text.replace("%", "%%"), **options)

    group = parser.add_argument_group("what")
    add(group, "--stage", "pretrain (a small Llama from scratch), mntp (stage 1), simcse (stage 2) or supervised (stage 3)",
        default="mntp")  # fmt: skip
    add(group, "--model", "preset, hub id (owner/name@revision), folder, or an earlier stage's output", default="tiny")
    add(group, "--adapter", "PEFT folder or hub id to merge into it first; give it again for the next", action="append",
        default=[], metavar="DIR")  # fmt: skip
    add(group, "--preset", "take the recipe and chat template of this preset, for a local copy of its model")
    add(group, "--data", f"text, one sentence or paragraph a line: {', '.join(DATASETS)}, or files and folders of .txt, .jsonl "
        "(also .gz, .xz) or .parquet; named twice, it counts twice; supervised: .jsonl of "
        '{"query", "positive", "negative" (or none, or a list), "instruction" (or none)}, each file a data set, or the authors\' '
        "folder echo-data"
        f"{f' [{data[0]}]' if data else ''}", nargs="+", action="extend", metavar="FILE")  # fmt: skip
    add(group, "--output", "folder for the result", default=f"runs/{known.stage}")
    ships = is_tiny(preset) and known.stage != "pretrain"
    add(group, "--eval", "pairs file (score<tab>sentence<tab>sentence): prints Spearman before, during, after",
        metavar="PAIRS.tsv", default=str(ASSETS / "text" / "similarity.tsv") if ships else None)  # fmt: skip
    add(group, "--overwrite", "replace the run in --output", action="store_true", default=False)
    add(group, "--resume", "continue the killed run in --output from its last checkpoint", action="store_true", default=False)

    group = parser.add_argument_group("optimization")
    add(group, "--steps", "optimizer steps", type=int)
    add(group, "--batch-size", "sequences (supervised: triplets) per optimizer step, over all processes", type=int)
    add(group, "--micro-batch-size", "sequences (simcse: twins) per forward pass of one process: less memory for the same result "
        "(simcse, and supervised, which counts texts: GradCache, one more forward pass); 0: its share of the batch; on a GPU, if not "
        "given, chosen for its free memory", type=int)  # fmt: skip
    add(group, "--max-length", "tokens per sequence: block size of mntp and pretrain, cut of simcse and supervised", type=int)
    add(group, "--lr", "peak learning rate", type=float)
    add(group, "--warmup-steps", "steps of linear warmup", type=int)
    add(group, "--schedule", "decay to zero: linear or cosine", choices=SCHEDULES)
    add(group, "--weight-decay", "AdamW's", type=float)
    add(group, "--adam-beta2", "AdamW's", type=float)
    add(group, "--max-grad-norm", "clip the gradient at this norm; 0: do not", type=float)
    add(group, "--seed", "of everything random", type=int)

    group = parser.add_argument_group("LoRA (all stages but pretrain)")
    add(group, "--lora-r", "rank", type=int)
    add(group, "--lora-alpha", "the update is scaled by alpha / r", type=float)
    add(group, "--lora-dropout", "on what enters the adapter", type=float)

    group = parser.add_argument_group("method")
    add(group, "--mask-probability", "mntp: share of tokens to predict", type=float)
    add(group, "--mask-style", "mntp: bert = 80 % mask, 10 % random, 10 % kept; all = all masked", choices=MASK_STYLES)
    add(group, "--attention-dropout", "simcse: on attention probabilities, the noise between twins", type=float)
    add(group, "--temperature", "simcse, supervised: divides the cosines", type=float)
    add(group, "--pooling", "token states to one vector [the model's own, mean]", choices=POOLING_MODES)
    add(group, "--causal", "look back only (the baseline of simcse and supervised; --pooling weighted_mean suits it), or not [the "
        "model's own direction, not]", action=argparse.BooleanOptionalAction)  # fmt: skip
    add(group, "--ratio", "supervised: draw a data set (by the name of its file) so many times as often as its size says",
        nargs="+", action="extend", default=[], metavar="NAME=2")  # fmt: skip
    add(group, "--symmetric", "supervised: data sets whose positives and negatives get the instruction too; no name: all",
        nargs="*", action="append", metavar="NAME")  # fmt: skip
    add(group, "--in-batch-negatives", "supervised: compare with the batch's other positives and negatives, too",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add(group, "--filter-negatives", "supervised: leave out hard negatives whose cosine, to the model as it starts, is above "
        "this share of the positive's, such as 0.95; 0: none", type=float)  # fmt: skip
    add(group, "--matryoshka", "supervised: train the first so many numbers of the vectors, too, to be used alone (embed.py "
        "--dim)", nargs="+", action="extend", type=int, default=[], metavar="DIM")  # fmt: skip

    group = parser.add_argument_group("machine")
    add(group, "--device", "cpu, cuda, cuda:1, mps; default: the first GPU if there is one")
    add(group, "--dtype", "of base weights and products (adapters stay float32); default: bfloat16 on a GPU, else "
        "float32", choices=tuple(DTYPES))  # fmt: skip
    add(group, "--gradient-checkpointing", "recompute activations instead of keeping them: less memory, up to half more "
        "time; on a GPU, if not given, chosen for its free memory", action=argparse.BooleanOptionalAction)  # fmt: skip
    add(group, "--save-every", "steps between checkpoints to resume from; 0: every two minutes", type=int)
    add(group, "--eval-every", "steps between evaluations; 0: a quarter of the run", type=int)
    add(group, "--dry-run", "load nothing; print parameters, operations and predicted peak memory. WORLD_SIZE=8 before the "
        "command plans for 8 processes", action="store_true", default=False)  # fmt: skip
    add(group, "--shard", "spread the frozen base over the processes of torchrun (FSDP2): for models larger than one GPU",
        action="store_true", default=False)  # fmt: skip
    add(group, "--deterministic", "the same weights in every run on a GPU too, and after --resume; a little slower (a CPU needs no "
        "such flag). Say --micro-batch-size, which is chosen for the free memory, as well", action="store_true", default=False)  # fmt: skip
    add(group, "--compile", "fuse operations with torch.compile: slow first steps, then faster ones (MNTP on a GPU: 1.1 to 1.3 "
        "times)", action="store_true", default=False)  # fmt: skip

    group = parser.add_argument_group("architecture (pretrain)")
    for flag, value in (
        ("--vocab-size", 4096),
        ("--hidden-size", 128),
        ("--intermediate-size", 352),
        ("--num-hidden-layers", 6),
        ("--num-attention-heads", 4),
        ("--num-key-value-heads", 2),
    ):
        add(group, flag, flag.removeprefix("--").replace("-", " "), type=int, default=value)
    return parser


READ_BY = {  # flags that not every stage has a use for
    **dict.fromkeys(("mask_probability", "mask_style"), ("mntp",)),
    "attention_dropout": ("simcse",),
    "temperature": ("simcse", "supervised"),
    **dict.fromkeys(("in_batch_negatives", "ratio", "symmetric", "filter_negatives", "matryoshka"), ("supervised",)),
    **dict.fromkeys(
        ("model", "preset", "adapter", "lora_r", "lora_alpha", "lora_dropout", "pooling", "causal"),
        ("mntp", "simcse", "supervised"),
    ),
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        ("pretrain",),
    ),
}


BOUNDS = (  # flags, what each must be, and whether it is
    (("steps", "batch_size", "lora_r", "lr"), "a number above 0", lambda x: x > 0),
    (("temperature",), "a number above 0, at most 1: it divides the cosines, a scale of 20 is 0.05", lambda x: 0 < x <= 1),
    (("hidden_size", "intermediate_size", "num_hidden_layers"), "a number above 0", lambda x: x > 0),
    (("lora_alpha",), "a number above 0 and below 1e30", lambda x: 0 < x < 1e30),
    (("warmup_steps", "micro_batch_size", "save_every", "eval_every", "seed"), "0 or more", lambda x: x >= 0),
    (("weight_decay", "max_grad_norm"), "0 or more", lambda x: x >= 0),
    (("lora_dropout", "attention_dropout", "adam_beta2"), "a number in [0, 1)", lambda x: 0 <= x < 1),
    (("mask_probability",), "a number in (0, 1]", lambda x: 0 < x <= 1),
    # 95 is meant as 0.95
    (("filter_negatives",), "a share of the positive's cosine, such as 0.95, or 0 for none", lambda x: 0 <= x <= 2),
    (("max_length",), "at least 4 tokens", lambda x: x >= 4),
)


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses settings that cannot work, before anything is loaded."""
    if args.stage not in STAGES:
        raise ValueError(f"--stage is {args.stage!r}, expected one of {', '.join(STAGES)}")
    if args.preset is not None and args.preset not in PRESETS:
        raise ValueError(f"--preset is {args.preset!r}, expected one of {', '.join(PRESETS)}")
    for name, stages in READ_BY.items():  # a flag that the stage would ignore is a mistake
        if args.stage not in stages and getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: is for --stage {' or '.join(stages)}, {args.stage} does not read it")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a finite number")
        if isinstance(value, int) and abs(value) >= (2**63 if name == "seed" else 2**31):
            raise ValueError(f"--{name.replace('_', '-')} is {short(value)}, expected a smaller number")
    for names, expected, holds in BOUNDS:
        for name in names:
            if not holds(getattr(args, name)):
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {expected}")
    if args.batch_size < 2 and (args.stage == "simcse" or args.stage == "supervised" and args.in_batch_negatives):
        raise ValueError("--batch-size is 1: the negatives are the other texts of the batch, it needs at least 2")
    if (
        args.stage == "supervised"
        and not (args.data or args.dry_run)
        and not default_data(args.stage, find_preset(args.preset or args.model))
    ):
        model = Path(expanduser(args.model))
        missing = find_preset(args.model) is None and not model.exists() and model.parent.is_dir() and "@" not in args.model
        if missing or (model / "train_args.json").is_file():  # not there, or perhaps unfinished: then that is the mistake
            find_chain(args.model)
        raise ValueError('--data: give one or more .jsonl files of {"query", "positive", "negative"}')
    args.output = str(Path(expanduser(args.output)))  # `runs/mntp/` is `runs/mntp`
    if Path(args.output).is_symlink():  # the folder that it leads to is what is written and replaced
        args.output = str(Path(args.output).resolve())
    if not Path(args.output).name:
        raise ValueError(f"--output {args.output}: expected a folder of its own, by name")
    if args.stage == "pretrain":
        if not 259 <= args.vocab_size <= MOST["vocab_size"]:
            raise ValueError(
                f"--vocab-size is {args.vocab_size}, expected from 259 (all bytes, <s>, </s> and <pad>) to {MOST['vocab_size']}"
            )
        if args.dry_run:
            raise ValueError("--dry-run plans the stages that train an adapter, pretrain is none")
        heads, width = args.num_attention_heads, args.hidden_size
        if heads < 1 or width % (2 * heads):
            raise ValueError(f"--hidden-size is {width}, expected an even number for each of {heads} attention heads")
        if args.num_key_value_heads < 1 or heads % args.num_key_value_heads:
            raise ValueError(
                f"--num-key-value-heads is {args.num_key_value_heads}, expected a divisor of {heads} attention heads"
            )
    model = Path(expanduser(args.model))
    if model.is_dir() and Path(args.output).resolve() == model.resolve():
        raise ValueError(f"--output {args.output}: is the --model too; a stage writes into a folder of its own")
    processes = started()
    if args.stage == "pretrain" and processes > 1:
        raise ValueError(f"--stage pretrain runs in one process, found {processes}; start it without torchrun")
    if args.shard and processes == 1:
        raise ValueError("--shard spreads the base over several processes, found one: torchrun --nproc_per_node=2 train.py ...")
    if args.batch_size % processes:
        raise ValueError(f"--batch-size is {args.batch_size}, which {processes} processes cannot share evenly")
    if args.stage == "mntp" and args.causal:
        raise ValueError("--causal: MNTP trains a bidirectional encoder; the causal baseline is --stage simcse --causal")
    if args.stage == "pretrain" and not args.data:
        raise ValueError("--data: give one or more text files, one sentence or paragraph a line")
    if args.stage == "pretrain" and Path(args.output).resolve().is_relative_to(ASSETS.resolve()):
        raise ValueError(f"--output {args.output}: the shipped model is not overwritten; copy a new one there by hand")


def in_force(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """One line: what is trained on what, and where it differs from the recipe that `--help` shows."""
    said = ("stage", "model", "data", "output", "overwrite", "resume", "dtype", "dry_run")
    changed = [f"{k} {v}" for k, v in vars(args).items() if v != parser.get_default(k) and k not in said]
    recipe = "the recipe" + (f" but {', '.join(changed)}" if changed else " (--help shows it)")
    if args.warmup_steps >= args.steps:
        recipe += f"; {args.warmup_steps} warmup steps of {args.steps}: the learning rate never reaches its peak"
    what = args.stage if args.stage == "pretrain" else f"{args.stage} of {args.model}"
    instead = args.stage == "mntp" and args.data == ["wiki1m"] and not find_spec("pyarrow")
    note = "\nwikitext-103 needs pyarrow (pip install pyarrow); wiki1m has text enough for the recipe" if instead else ""
    return f"{what} on {' '.join(args.data)}, in {args.dtype}: {recipe}{note}"
