"""Trains one stage of LLM2Vec per call:

python train.py --stage mntp                        # the model that ships with the package, in two minutes
python train.py --stage simcse --model runs/mntp
python train.py --stage supervised --model runs/simcse
python embed.py --model runs/supervised "a text" "another"

python train.py --stage mntp --model sheared-llama-1.3b --output runs/sheared-mntp
"""

import argparse
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import SafetensorError

from llm2vec_min.cli import run
from llm2vec_min.config import PRESETS, ModelConfig
from llm2vec_min.data import pack_blocks, read_lines, read_pairs, read_split
from llm2vec_min.device import (
    barrier,
    pick_device,
    pick_dtype,
    rank,
    start_process,
    stop_process,
    use_deterministic,
    world_size,
)
from llm2vec_min.encoder import LLM2Vec, find_chain
from llm2vec_min.evaluation import sts_score
from llm2vec_min.fast import compile_layers
from llm2vec_min.files import locked, read_json, write_json
from llm2vec_min.hub import find_preset, resolve_data
from llm2vec_min.lora import add_lora
from llm2vec_min.model import LanguageModel, init_weights
from llm2vec_min.tokenizer import Tokenizer
from llm2vec_min.training import distributed, memory
from llm2vec_min.training.flags import build_parser, check, default_data, in_force
from llm2vec_min.training.mntp import train_mntp
from llm2vec_min.training.output import (
    ARGUMENTS,
    check_resumed,
    finish_output,
    has_checkpoint,
    identify,
    is_finished,
    is_run,
    plan_output,
)  # fmt: skip
from llm2vec_min.training.pretrain import BOS, EOS, PAD, pretrain, train_tokenizer
from llm2vec_min.training.settings import Settings
from llm2vec_min.training.simcse import train_simcse
from llm2vec_min.training.supervised import train_supervised
from llm2vec_min.training.triplets import draw, read_triplets
from llm2vec_min.weights import save_checkpoint

HELD_OUT = 64  # blocks that MNTP is scored on
FITTED = ("gradient_checkpointing", "micro_batch_size")  # the settings that are chosen for the memory at hand


def run_pretrain(args: argparse.Namespace, settings: Settings, work: Path, arguments: dict, device: torch.device) -> None:
    """Tokenizer and decoder from scratch; the result is a plain Hugging Face checkpoint in bfloat16."""
    train_lines, held_lines = read_split(args.data, every=1000)
    resume = args.resume and has_checkpoint(work)
    spare = TemporaryDirectory()  # for the tokenizer, until every check has passed and the run gets its folder
    if not resume:
        train_tokenizer(train_lines, args.vocab_size, Path(spare.name))
    tokenizer = Tokenizer(work if resume else spare.name)
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
    evaluate = None
    if args.eval:
        both = {name: LLM2Vec(model.model, tokenizer, causal=name == "causal") for name in ("causal", "bidirectional")}
        evaluate = lambda: {f"spearman_{name}": sts_score(l2v, args.eval) for name, l2v in both.items()}  # noqa: E731
    blocks = pack_blocks(tokenizer, train_lines, args.max_length, "--data")
    held_out = pack_blocks(tokenizer, held_lines, args.max_length, "every 1000th line of --data, held out,")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {blocks.size:,} tokens to train on")
    bfloat16, options = args.dtype == "bfloat16", dict(arguments=arguments, evaluate=evaluate, resume=resume)
    pretrain(model, blocks, held_out, settings, work, tokenizer=tokenizer, bfloat16=bfloat16, compiled=args.compile, **options)
    save_checkpoint(model, work, torch.bfloat16)
    ids = {name: tokenizer.backend.token_to_id(t) for name, t in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    write_json(
        work / "config.json",
        config.to_dict()
        | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
        | {f"{name}_token_id": id for name, id in ids.items()},
    )


def often(what: str, count: int, settings: Settings) -> str:
    """In words, how much there is to train on, and how much of it a run reads."""
    epochs = settings.steps * settings.batch_size / count
    return f"{count:,} {what}: {settings.steps:,} steps of {settings.batch_size} are {epochs:.3g} epochs"


def run_adapter_stage(args: argparse.Namespace, settings: Settings, work: Path, arguments: dict, device: torch.device) -> None:
    """MNTP, SimCSE or supervised: base and earlier adapters merged, a fresh adapter trained and saved."""
    if args.stage == "mntp":
        train_lines, held_lines = read_split(args.data, every=20)
    elif args.stage == "simcse":
        train_lines = read_lines(args.data)
    elif args.stage == "supervised":
        # None: no data set; []: all; else those named
        symmetric = args.symmetric and ([] if [] in args.symmetric else sum(args.symmetric, []))
        sets, equal = read_triplets(args.data, symmetric, args.ratio)
        draw(sets, settings)  # refuses what cannot be trained on
        if rank() == 0:
            print(", ".join(f"{name}: {len(triplets):,} triplets" for name, triplets, _ in sets))
            if equal:
                print(f"{equal:,} negatives equal a positive of their query: left out")
            print(often("triplets", sum(len(data.triplets) for data in sets), settings))
    l2v = LLM2Vec.from_pretrained(
        args.model,
        adapters=args.adapter,
        causal=args.causal,
        pooling=args.pooling,
        dtype=args.dtype,
        device="cpu" if args.shard else device,
        lm_head=args.stage == "mntp",
    )
    if args.preset:
        l2v.preset, l2v.template = args.preset, PRESETS[args.preset].template
    spare = TemporaryDirectory()  # which lives as long as this function
    l2v.keep_adapters(spare.name)
    arguments["encoder"] = l2v.fingerprint()
    if args.resume:  # the model must, by its content, be the one the run began with
        check_resumed(work, arguments)
    l2v.max_length = max(l2v.max_length, args.max_length)  # what it learns to read, it is to read in use
    torch.manual_seed(args.seed)
    add_lora(l2v.decoder, args.lora_r, args.lora_alpha, args.lora_dropout)
    if args.compile:
        compile_layers(l2v.decoder)
    parameters = list(l2v.decoder.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    if rank() == 0:
        print(f"{total:,} parameters in the decoder, {trained:,} ({trained / total:.2%}) trained")
    if args.shard:
        distributed.shard(l2v.decoder, device)
        if l2v.lm_head is not None:
            l2v.lm_head.to(device)

    evaluate = (lambda: {"spearman": sts_score(l2v, args.eval)}) if args.eval else None
    options = dict(arguments=arguments, evaluate=evaluate, resume=args.resume)
    if args.stage == "mntp":
        blocks = pack_blocks(l2v.tokenizer, train_lines, args.max_length, "--data")
        held_out = pack_blocks(l2v.tokenizer, held_lines, args.max_length, "every 20th line of --data, held out,")
        some = np.linspace(0, len(held_out) - 1, min(len(held_out), HELD_OUT)).astype(int)  # spread over every file
        if rank() == 0:
            print(often(f"blocks of {args.max_length} tokens", len(blocks), settings))
        train_mntp(l2v, blocks, held_out[some], settings, work, **options)
    elif args.stage == "simcse":
        if rank() == 0:
            print(often("sentences", len(train_lines), settings))
        train_simcse(l2v, train_lines, settings, work, **options)
    elif args.stage == "supervised":
        train_supervised(l2v, sets, settings, work, **options)
    else:
        raise ValueError(f"--stage {args.stage}: has no call here")
    if rank() == 0:
        try:
            l2v.save_run(work, args.stage)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{work}: the result could not be saved ({error}); --resume goes on from the last checkpoint, if any"
            ) from None


def fit_memory(
    args: argparse.Namespace, parser: argparse.ArgumentParser, settings: Settings, argv: list[str], device: torch.device
) -> Settings:
    """Checkpointing and micro-batch for the free memory of a GPU, where the user has not said; a resumed run keeps its own."""
    # parsed once more, with None as the default of these: what is not None was given
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(FITTED))))
    said = {name for name in FITTED if given[name] is not None}
    before = [folder for folder in (Path(f"{args.output}.part"), Path(args.output)) if is_run(folder)]
    if args.resume and before:
        settings = replace(settings, **{n: read_json(before[0] / ARGUMENTS)[n] for n in FITTED if n not in said})
    else:
        config, machine = memory.shape_of_run(args.model, args.device, args.dtype, args.shard)
        free = memory.free_memory(device)
        settings = memory.fit(config, settings, args.stage, free, said, **machine)
        if rank() == 0 and len(said) < len(FITTED):
            print(f"for {free / 1e9:.0f} GB: " + ", ".join(f"--{n.replace('_', '-')} {getattr(settings, n)}" for n in FITTED))
    for name in FITTED:
        setattr(args, name, getattr(settings, name))
    return settings


def main(argv: list[str]) -> None:
    parser = build_parser(argv, __doc__)
    args = parser.parse_args(argv)
    check(args, parser)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.dry_run:
        if torch.cuda.is_available() and (args.device or "cuda").startswith("cuda"):  # what the run itself would choose here
            settings = fit_memory(args, parser, settings, argv, pick_device(args.device))
        asked = (args.model, args.stage, settings, args.device, args.dtype, args.shard)
        print(memory.describe(memory.plan_run(*asked)))
        if args.stage == "supervised":
            print("(for one hard negative of each query; with more of them there are more tokens)")
        return
    if args.deterministic:
        use_deterministic()
    device = start_process(args.device)
    try:
        try:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)  # for the lock
        except OSError as error:
            raise ValueError(f"--output {args.output}: cannot be written ({error})") from None
        with locked(args.output) if rank() == 0 else nullcontext():
            run_stage(args, parser, settings, argv, device)
    finally:
        stop_process()


def run_stage(
    args: argparse.Namespace, parser: argparse.ArgumentParser, settings: Settings, argv: list[str], device: torch.device
) -> None:
    """One stage from its checks to the folder that holds the result."""
    if device.type == "cuda" and args.stage != "pretrain":
        settings = fit_memory(args, parser, settings, argv, device)
    asked = (args.model, args.stage, settings, args.device, args.dtype, args.shard)
    args.dtype = str(pick_dtype(args.dtype, device)).removeprefix("torch.")
    args.data = args.data or default_data(args.stage, find_preset(args.preset or args.model))
    arguments = {name: value for name, value in vars(args).items() if name not in ("overwrite", "resume", "dry_run")}
    arguments["processes"] = world_size()  # each has noise of its own
    work = plan_output(args.output, arguments, overwrite=args.overwrite, resume=args.resume)
    finished = args.resume and is_finished(work)
    barrier()  # all have planned before one writes
    if finished:
        if rank() == 0:
            finish_output(work, args.output)  # a run that was to replace another may have been killed just before it did
            print(f"{args.output} is finished, nothing is left to do")
        return
    if rank() == 0:
        print(in_force(args, parser))
    if args.stage != "pretrain":
        find_chain(args.model)  # a model that is not there is said before data is fetched
    args.data = [str(path) for name in args.data for path in resolve_data(name)]
    arguments |= {"files": args.data} | identify(args.data + ([args.eval] if args.eval else []))
    if args.eval:
        read_pairs(args.eval)  # its mistakes now, not after text or model have been loaded
    if args.resume:  # the data's content, too
        check_resumed(work, arguments)
    try:
        (run_pretrain if args.stage == "pretrain" else run_adapter_stage)(args, settings, work, arguments, device)
    except RuntimeError as error:
        if args.compile and any(words in str(error) for words in ("No working C++ compiler", "Failed to find C compiler")):
            raise ValueError(
                "--compile needs a compiler, and found none that works: install gcc and g++, or leave --compile out; then --overwrite"
            ) from None
        if args.stage == "pretrain" or not memory.is_out_of_memory(error):
            raise
        raise ValueError(memory.advise(memory.plan_run(*asked), device)) from None
    barrier()
    if rank() == 0:
        finish_output(work, args.output)
        print(f"saved to {args.output}")


if __name__ == "__main__":
    run(main)
