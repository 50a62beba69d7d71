"""Trains one stage of LLM2Vec per call:

    python train.py --stage mntp                        # the model that ships with the package, in two minutes
    python train.py --stage simcse --model runs/mntp
    python embed.py --model runs/simcse "a text" "another"

    python train.py --stage mntp --model sheared-llama-1.3b --data wiki.txt --output runs/sheared-mntp
"""

import argparse
import os
from dataclasses import fields
from pathlib import Path

import torch

from llm2vec_min import distributed, memory
from llm2vec_min.cli import refuse, run
from llm2vec_min.config import PAPER, PRESETS, ModelConfig, write_json
from llm2vec_min.data import pack_blocks, read_lines, read_pairs, read_split
from llm2vec_min.encoder import DTYPES, LLM2Vec
from llm2vec_min.evaluation import sts_score
from llm2vec_min.hub import DATASETS, find_preset, resolve, resolve_data
from llm2vec_min.lora import add_lora
from llm2vec_min.mntp import MASK_STYLES, train_mntp
from llm2vec_min.model import LanguageModel, init_weights
from llm2vec_min.pooling import POOLING_MODES
from llm2vec_min.pretrain import pretrain, train_tokenizer
from llm2vec_min.simcse import train_simcse
from llm2vec_min.tokenizer import Tokenizer
from llm2vec_min.training import Settings, open_output
from llm2vec_min.weights import save_checkpoint

STAGES = ("pretrain", "mntp", "simcse")
ONLY = {  # flags that one stage alone reads
    "pretrain": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads"),
    "mntp": ("mask_probability", "mask_style"),
    "simcse": ("attention_dropout", "temperature", "causal"),
}  # fmt: skip
ASSETS = Path(__file__).parent / "llm2vec_min" / "assets"


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """The flags, with the defaults of the stage and model that `argv` names: so `--help` shows what would happen."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", default="mntp")
    first.add_argument("--model", default="tiny")
    first.add_argument("--preset")
    known, _ = first.parse_known_args(argv)
    preset = find_preset(known.preset or known.model)
    recipe = {field.name: field.default for field in fields(Settings)} | PAPER.get(known.stage, {})
    if preset is not None:
        recipe |= getattr(preset, known.stage, {})
    is_tiny = preset is PRESETS["tiny"] and known.stage != "pretrain"

    parser = argparse.ArgumentParser(
        description=__doc__,
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
    add(group, "--stage", "pretrain (a small Llama from scratch), mntp (stage 1) or simcse (stage 2)", default="mntp")
    add(group, "--model", "preset, hub id (owner/name@revision), folder, or an earlier stage's output", default="tiny")
    add(group, "--adapter", "PEFT folder or hub id to merge into it first; give it again for the next", action="append",
        default=[], metavar="DIR")  # fmt: skip
    add(group, "--preset", "take the recipe and chat template of this preset, for a local copy of its model")
    add(
        group,
        "--data",
        f"text, one sentence or paragraph a line: {', '.join(DATASETS)}, or files and folders of .txt, .jsonl (also .gz, .xz) "
        "or .parquet; named twice, it counts twice",
        nargs="+",
        metavar="FILE",
        default=[str(ASSETS / "text" / "train.txt")] if is_tiny else [],
    )
    add(group, "--output", "folder for the result", default=f"runs/{known.stage}")
    add(group, "--eval", "pairs file (score<tab>sentence<tab>sentence): prints Spearman before, during, after",
        metavar="PAIRS.tsv", default=str(ASSETS / "text" / "similarity.tsv") if is_tiny else None)  # fmt: skip
    add(group, "--overwrite", "replace the run in --output", action="store_true", default=False)
    add(group, "--resume", "continue the killed run in --output from its last checkpoint", action="store_true", default=False)

    group = parser.add_argument_group("optimization")
    add(group, "--steps", "optimizer steps", type=int)
    add(group, "--batch-size", "sequences per optimizer step, over all processes", type=int)
    add(group, "--micro-batch-size", "sequences per forward pass of one process: less memory for the same result (simcse: "
        "GradCache, a third more time); 0: its whole share of the batch", type=int)  # fmt: skip
    add(group, "--max-length", "tokens per sequence: block size of mntp and pretrain, cut of simcse", type=int)
    add(group, "--lr", "peak learning rate", type=float)
    add(group, "--warmup-steps", "steps of linear warmup", type=int)
    add(group, "--schedule", "decay to zero: linear or cosine", choices=("linear", "cosine"))
    add(group, "--weight-decay", "AdamW's", type=float)
    add(group, "--adam-beta2", "AdamW's", type=float)
    add(group, "--max-grad-norm", "clip the gradient at this norm", type=float)
    add(group, "--seed", "of everything random", type=int)

    group = parser.add_argument_group("LoRA (mntp, simcse)")
    add(group, "--lora-r", "rank", type=int)
    add(group, "--lora-alpha", "the update is scaled by alpha / r", type=float)
    add(group, "--lora-dropout", "on what enters the adapter", type=float)

    group = parser.add_argument_group("method")
    add(group, "--mask-probability", "mntp: share of tokens to predict", type=float)
    add(group, "--mask-style", "mntp: bert = 80 % mask, 10 % random, 10 % kept; all = all masked", choices=MASK_STYLES)
    add(group, "--attention-dropout", "simcse: on attention probabilities, the noise between twins", type=float)
    add(group, "--temperature", "simcse: divides the cosines", type=float)
    add(group, "--pooling", "token states to one vector [the model's own, mean]", choices=POOLING_MODES)
    add(group, "--causal", "simcse: keep the causal mask (the baseline)", action="store_true", default=False)

    group = parser.add_argument_group("machine")
    add(group, "--device", "cpu, cuda, cuda:1, mps; default: the first GPU if there is one")
    add(group, "--dtype", "of base weights and products (adapters stay float32); default: bfloat16 on a GPU, else "
        "float32", choices=tuple(DTYPES))  # fmt: skip
    add(group, "--gradient-checkpointing", "recompute activations instead of keeping them: less memory, a third more "
        "time", action=argparse.BooleanOptionalAction)  # fmt: skip
    add(group, "--save-every", "steps between checkpoints to resume from; 0: none", type=int)
    add(group, "--eval-every", "steps between evaluations; 0: a quarter of the run", type=int)
    add(group, "--dry-run", "load nothing; print parameters, operations and predicted peak memory. WORLD_SIZE=8 before the "
        "command plans for 8 processes", action="store_true", default=False)  # fmt: skip
    add(group, "--shard", "spread the frozen base over the processes of torchrun (FSDP2): for models larger than one GPU",
        action="store_true", default=False)  # fmt: skip
    add(group, "--compile", "fuse operations with torch.compile: slow first steps, faster ones then", action="store_true",
        default=False)  # fmt: skip

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


def check(args: argparse.Namespace) -> None:
    """Refuses settings that cannot work, before anything is loaded."""
    if args.stage not in STAGES:
        raise ValueError(f"--stage is {args.stage!r}, expected one of {', '.join(STAGES)}")
    if args.preset is not None and args.preset not in PRESETS:
        raise ValueError(f"--preset is {args.preset!r}, expected one of {', '.join(PRESETS)}")
    for name in ("steps", "batch_size", "lora_r", "lr", "temperature", "max_grad_norm"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number above 0")
    for name in ("warmup_steps", "micro_batch_size", "save_every", "eval_every", "weight_decay"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more")
    for name in ("lora_dropout", "attention_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected a number in [0, 1)")
    if args.max_length < 4:
        raise ValueError(f"--max-length is {args.max_length}, expected at least 4 tokens")
    if args.stage == "mntp" and args.causal:
        raise ValueError("--causal: MNTP trains a bidirectional encoder; the causal baseline is --stage simcse --causal")
    if not args.data:
        raise ValueError("--data: give one or more text files, one sentence or paragraph a line")
    if args.stage == "pretrain" and Path(args.output).resolve().is_relative_to(ASSETS.resolve()):
        raise ValueError(f"--output {args.output}: the shipped model is not overwritten; copy a new one there by hand")


def make_plan(args: argparse.Namespace, settings: Settings) -> memory.Plan:
    """What a step needs, from the model's config.json and the settings."""
    if args.stage == "pretrain":
        raise ValueError("--dry-run predicts mntp and simcse")
    config = ModelConfig.from_folder(resolve(args.model, ("config.json",)))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % processes:
        raise ValueError(f"--batch-size is {settings.batch_size}, which {processes} processes do not divide evenly")
    on_gpu = args.device.startswith("cuda") if args.device else torch.cuda.is_available()
    size = DTYPES[args.dtype or ("bfloat16" if on_gpu else "float32")].itemsize
    return memory.plan(config, settings, args.stage, size=size, processes=processes, sharded=args.shard, on_gpu=on_gpu)


def run_pretrain(args: argparse.Namespace, settings: Settings, arguments: dict, device: torch.device) -> None:
    """Tokenizer and decoder from scratch; the result is a plain Hugging Face checkpoint in bfloat16."""
    train_lines, held_lines = read_split(args.data, every=1000)
    output = open_output(args.output, arguments, overwrite=args.overwrite, resume=args.resume)
    if not args.resume:
        train_tokenizer(train_lines, args.vocab_size, output)
    tokenizer = Tokenizer(output)
    config = ModelConfig(
        vocab_size=tokenizer.backend.get_vocab_size(),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        head_dim=args.hidden_size // args.num_attention_heads,
        max_position_embeddings=4 * args.max_length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(args.seed)
    model = LanguageModel(config).to(device)
    init_weights(model)
    blocks = pack_blocks(tokenizer, train_lines, args.max_length, "--data")
    held_out = pack_blocks(tokenizer, held_lines, args.max_length, "every 1000th line of --data, held out,")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {blocks.size:,} tokens to train on")
    bfloat16 = args.dtype == "bfloat16"
    loop = pretrain(
        model, blocks, held_out, settings, output, bfloat16=bfloat16, compiled=args.compile, resume=args.resume
    )
    save_checkpoint(model, output, torch.bfloat16)
    ids = {name: tokenizer.backend.token_to_id(t) for name, t in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    write_json(
        output / "config.json",
        config.to_dict()
        | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
        | {f"{name}_token_id": id for name, id in ids.items()},
    )
    loop.finish()


def run_adapter_stage(args: argparse.Namespace, settings: Settings, arguments: dict, device: torch.device) -> None:
    """MNTP or SimCSE: base and earlier adapters merged, a fresh adapter trained and saved."""
    if args.shard and distributed.world_size() == 1:
        raise ValueError("--shard spreads the base over several processes, found one: torchrun --nproc_per_node=2 train.py ...")
    if args.stage == "mntp":
        train_lines, held_lines = read_split(args.data, every=20)
    else:
        train_lines = read_lines(args.data)
    if args.eval:
        read_pairs(args.eval)  # its mistakes now, not after the model has loaded
    l2v = LLM2Vec.from_pretrained(
        args.model,
        adapters=args.adapter,
        causal=args.causal or None,  # without the flag an earlier stage keeps its direction
        pooling=args.pooling,
        dtype=args.dtype,
        device="cpu" if args.shard else device,
        lm_head=args.stage == "mntp",
    )
    if args.preset:
        l2v.template = PRESETS[args.preset].template
    torch.manual_seed(args.seed)
    add_lora(l2v.decoder, args.lora_r, args.lora_alpha, args.lora_dropout)
    l2v.decoder.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        for layer in l2v.decoder.layers:
            layer.compile()
    counts = [sum(p.numel() for p in l2v.decoder.parameters() if p.requires_grad or not only) for only in (False, True)]
    if distributed.rank() == 0:
        print(f"{counts[0]:,} parameters in the decoder, {counts[1]:,} ({counts[1] / counts[0]:.2%}) trained")
    if args.shard:
        distributed.shard(l2v.decoder, device)
        if l2v.lm_head is not None:
            l2v.lm_head.to(device)

    evaluate = (lambda: {"spearman": sts_score(l2v, args.eval)}) if args.eval else None
    if args.stage == "mntp":
        blocks = pack_blocks(l2v.tokenizer, train_lines, args.max_length, "--data")
        held_out = pack_blocks(l2v.tokenizer, held_lines, args.max_length, "every 20th line of --data, held out,")
        output = open_output(args.output, arguments, overwrite=args.overwrite, resume=args.resume)
        loop = train_mntp(l2v, blocks, held_out[:64], settings, output, evaluate=evaluate, resume=args.resume)
    else:
        output = open_output(args.output, arguments, overwrite=args.overwrite, resume=args.resume)
        loop = train_simcse(l2v, train_lines, settings, output, evaluate=evaluate, resume=args.resume)
    if loop.is_main:
        l2v.save_run(output, args.stage)
    loop.finish()
    distributed.barrier()


def is_out_of_memory(error: RuntimeError) -> bool:
    """A GPU's, or the CPU's, whose kind torch does not name."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) or "can't allocate memory" in str(error)


def main(argv: list[str]) -> None:
    args = build_parser(argv).parse_args(argv)
    check(args)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.dry_run:
        print(memory.describe(make_plan(args, settings)))
        return
    device = distributed.start(args.device)
    is_main = distributed.rank() == 0
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    arguments = {name: value for name, value in vars(args).items() if name not in ("overwrite", "resume", "dry_run")}
    args.data = [str(path) for name in args.data for path in resolve_data(name)]
    if is_main:
        unread = {name for stage in STAGES if stage != args.stage for name in ONLY[stage]}
        shown = {name: value for name, value in arguments.items() if name not in unread and value not in (None, [])}
        print("in force: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    try:
        (run_pretrain if args.stage == "pretrain" else run_adapter_stage)(args, settings, arguments, device)
    except RuntimeError as error:
        if args.stage == "pretrain" or not is_out_of_memory(error):
            raise
        plan = make_plan(args, settings)
        item, least = plan.largest, plan.memory[plan.largest] / 1e9
        raise ValueError(
            f"{device} has too little memory. Of the {plan.peak / 1e9:.1f} GB that were to be expected, {least:.1f} GB are "
            f"{item}: try {plan.lower[item]}; --dry-run shows every item"
        ) from None
    finally:
        distributed.stop()
    if is_main:
        print(f"saved to {args.output}")


if __name__ == "__main__":
    run(main)
