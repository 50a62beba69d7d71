"""Text in, vectors out:

    python embed.py "A cat sat down." "A kitten takes a seat."          # a table of cosine similarities
    python embed.py --model runs/simcse --input texts.txt --output vectors.npy
    torchrun --nproc_per_node=8 embed.py --model runs/simcse --input texts.txt --output vectors.npy

The same command continues a killed run where it stopped.
"""

import argparse
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llm2vec_min.cli import add_model_flags, run
from llm2vec_min.data import iter_lines
from llm2vec_min.device import barrier, rank, start_process, stop_process, world_size
from llm2vec_min.encoder import LLM2Vec
from llm2vec_min.files import locked, put, read_json, write_json
from llm2vec_min.pooling import POOLING_MODES

CHUNK = 64  # batches (of 128 texts, if not said) tokenized, sorted by length and written at a time: memory stays flat
NOT_IN_THE_VECTORS = ("device", "texts", "output")  # arguments that a continued run may change


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to compare with each other")
    add_model_flags(parser, default="tiny-llm2vec")
    parser.add_argument(
        "--input", metavar="FILE", help='.txt (a text a line) or .jsonl (field "text"), also .gz, .xz; or .parquet'
    )
    parser.add_argument("--output", metavar="X.npy", help="where to write the (N, C) float32 array; row i is line i")
    parser.add_argument("--instruction", help='put before each text and not pooled, such as "Retrieve similar texts:"')
    parser.add_argument("--pooling", choices=POOLING_MODES, help="token states to one vector [the model's own]")
    parser.add_argument("--normalize", action="store_true", help="scale each vector to length 1")
    parser.add_argument("--dim", type=int, help="only the first so many numbers of each vector (see train.py --matryoshka)")
    parser.add_argument("--batch-size", type=int, help="most texts per forward pass [as many as fill the device]")
    parser.add_argument("--max-length", type=int, help="tokens per text; longer ones are cut [the model's own, 512]")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, help="look back only [the model's own direction]")
    return parser


def check_vectors(vectors: np.ndarray, encoded: list, model: str, first: int = 0) -> int:
    """How many of the texts have no token of their own, and so a vector of zeros; ValueError for another vector of zeros, or one
    with NaN or infinity in it."""
    if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise ValueError(
            f"{model}: the vector of text {first + wrong[0] + 1} is not finite ({len(wrong)} of {len(vectors)} are not); its "
            "training may have diverged, or numbers outgrow the dtype (--dtype float32)"
        )
    has_text = np.array([row.pooled.any() for row in encoded])
    if len(wrong := np.flatnonzero(has_text & ~vectors.any(axis=1))):
        raise ValueError(
            f"{model}: the vector of text {first + wrong[0] + 1} is zero ({len(wrong)} of {len(vectors)} are): its training has "
            "collapsed; train again with a lower --lr"
        )
    return int((~has_text).sum())


def print_table(l2v: LLM2Vec, args: argparse.Namespace) -> None:
    """Cosine similarity of each text with each other, numbered as given."""
    encoded = l2v.tokenize(args.texts, args.instruction)
    vectors = l2v.encode(encoded, batch_size=args.batch_size, normalize=True, dim=args.dim)
    if empty := check_vectors(vectors, encoded, args.model):
        print(f"{empty} of the texts are empty; their vectors are zeros\n")
    if full := sum(len(row.ids) >= l2v.max_length for row in encoded):
        print(f"{full} of the texts fill --max-length {l2v.max_length}; longer ones are cut\n")
    for number, text in enumerate(args.texts, 1):
        if os.path.isfile(text):
            print(f"text {number} is a file's name, read as a text; --input reads the file")
        print(f"{number:>3}  {text[:100]}")
    cosines = vectors @ vectors.T
    print("\n     " + "".join(f"{number:>7}" for number in range(1, len(vectors) + 1)))
    for number, row in enumerate(cosines, 1):
        print(f"{number:>3}  " + "".join(f"{value:>7.3f}" for value in row))


def part_files(output: Path) -> tuple[Path, Path, Path]:
    """Beside the output while it is unfinished: the vectors, which chunks of them are done, what they were made from."""
    vectors, done, header = (output.with_name(output.name + end) for end in (".part", ".part.done", ".part.json"))
    return vectors, done, header


def chunk_count(made_from: dict) -> int:
    return -(-made_from["shape"][0] // made_from["chunk"])


def check_part(part: Path, done_file: Path, made_from: dict) -> None:
    """ValueError unless a stopped run's files are as long, and of the kind, that its header says."""
    wanted = {"shape": tuple(made_from["shape"]), "dtype": "float32", "row after row": True}
    wanted |= {"bytes": part.stat().st_size, "chunks": chunk_count(made_from)}
    try:
        vectors = np.lib.format.open_memmap(part, mode="r")
        found = {"shape": vectors.shape, "dtype": str(vectors.dtype), "row after row": vectors.flags.c_contiguous}
        found |= {"bytes": vectors.offset + vectors.nbytes, "chunks": done_file.stat().st_size}
        why = ", ".join(
            f"{name}: found {found[name]}, expected {wanted[name]}" for name in wanted if found[name] != wanted[name]
        )
    except (ValueError, OSError) as error:
        why = str(error)
    if why:
        raise ValueError(f"{part}: what a stopped run left is damaged ({why}); delete it to start anew")


def start_part(args: argparse.Namespace, made_from: dict) -> None:
    """Makes the unfinished output, or finds the one of a stopped run.

    Raises:
        ValueError: it cannot be written, or comes from another model, text or other arguments.
    """
    part, done_file, header = part_files(Path(args.output))
    if header.is_file() and part.is_file():
        before = read_json(header)
        if changed := [name for name in made_from if before.get(name) != made_from[name]]:
            found = ", ".join(f"{name} was {before.get(name)!r}, is {made_from[name]!r}" for name in changed)
            raise ValueError(f"{part} is a run that was stopped, with other arguments ({found}); delete {header} to start anew")
        check_part(part, done_file, made_from)
        return
    try:
        for path in (header, part, done_file):  # leftovers of a run killed halfway; opening a link would follow it
            path.unlink(missing_ok=True)
        np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=tuple(made_from["shape"])).flush()
        if hasattr(os, "posix_fallocate"):  # a full disk shows now, not as a crash in the middle
            with open(part, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        np.zeros(chunk_count(made_from), dtype=np.uint8).tofile(done_file)
        write_json(header, made_from)  # last: with it the other two are whole
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"--output {args.output}: cannot be written ({error})") from None


def embed_file(l2v: LLM2Vec, args: argparse.Namespace, count: int) -> None:
    """Writes the vectors of a file's lines, a chunk at a time, beside the output and renames it when complete. Every
    `world_size`-th chunk is this process's; chunks that an earlier run has written are skipped."""
    output, chunk, file = Path(args.output), CHUNK * (args.batch_size or 128), Path(args.input).stat()
    if args.dim is not None and not 0 < args.dim <= l2v.width:
        raise ValueError(f"--dim is {args.dim}, expected a number from 1 to {l2v.width}")
    l2v.tokenize(["a"], args.instruction)  # refuses an instruction that leaves no room for a text
    made_from = {name: value for name, value in vars(args).items() if name not in NOT_IN_THE_VECTORS}
    made_from |= {"shape": [count, args.dim or l2v.width], "chunk": chunk, "encoder": l2v.fingerprint()}
    made_from |= {"bytes": file.st_size, "modified": file.st_mtime}
    if rank() == 0:
        start_part(args, made_from)
    barrier()
    part, done_file, header = part_files(output)
    vectors = np.lib.format.open_memmap(part, mode="r+")
    done = np.memmap(done_file, dtype=np.uint8, mode="r+")
    if rank() == 0 and done.any():
        print(f"continuing: {done.sum()} of {len(done)} chunks of {chunk} texts are there")
    if rank() == 0 and output.exists():
        print(f"{output} is there, and is replaced at the end")
    lines, full, empty = iter_lines(args.input, keep_empty=True), 0, 0

    def prepare(number: int) -> list | None:
        """The next lines of the file, tokenized; None if they are not for this process, or done."""
        texts, first = list(itertools.islice(lines, chunk)), number * chunk
        if len(texts) != min(chunk, count - first):
            raise ValueError(f"{args.input}: {first + len(texts)} lines, but {count} were counted; it changed meanwhile")
        return l2v.tokenize(texts, args.instruction) if number % world_size() == rank() and not done[number] else None

    with tqdm(total=count, desc="embedding", unit="text", disable=rank() > 0) as bar, ThreadPoolExecutor(1) as thread:
        ready = thread.submit(prepare, 0)
        for number, first in enumerate(range(0, count, chunk)):
            encoded = ready.result()
            if number + 1 < len(done):  # tokenized while this one is computed
                ready = thread.submit(prepare, number + 1)
            if encoded is not None:
                full += sum(len(row.ids) >= l2v.max_length for row in encoded)
                rows = l2v.encode(encoded, batch_size=args.batch_size, normalize=args.normalize, dim=args.dim)
                empty += check_vectors(rows, encoded, args.model, first)
                vectors[first : first + len(rows)] = rows
                vectors.flush()
                done[number] = 1  # after its vectors are on the disk
                done.flush()
            bar.update(min(chunk, count - first))
    barrier()
    if rank() == 0:
        put(part, output)
        for name in (done_file, header):
            name.unlink()
        if empty:
            print(f"{empty} of the texts embedded now are empty; their vectors are zeros")
        if full:
            print(f"{full} texts fill --max-length {l2v.max_length}; longer ones are cut")
        print(f"{output}: {count} vectors of {vectors.shape[1]} numbers, float32")


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if bool(args.texts) == bool(args.input):
        raise ValueError("give texts to compare, or --input FILE with --output X.npy")
    if bool(args.input) != bool(args.output):
        raise ValueError("--input FILE and --output X.npy go together")
    if args.batch_size is not None and not 1 <= args.batch_size < 2**31:
        raise ValueError(f"--batch-size is {args.batch_size}, expected at least 1, and less than 2^31")
    if args.output and not args.output.endswith(".npy"):
        raise ValueError(f"--output {args.output}: expected a name that ends in .npy")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: its folder does not exist")
    if args.output and Path(args.output).is_dir():
        raise ValueError(f"--output {args.output}: is a folder, expected a file")
    if args.input and Path(args.output).resolve() == Path(args.input).resolve():
        raise ValueError(f"--output {args.output}: is also the --input")
    device = start_process(args.device, patience=24)  # whoever is done waits for the last chunk of another
    try:
        embed(args, device)
    finally:
        stop_process()


def embed(args: argparse.Namespace, device: torch.device) -> None:
    """Loads the model, then writes the file's vectors or prints the texts' table."""
    if rank() == 0 and args.model == "tiny-llm2vec":
        print("the small encoder that ships, tiny-llm2vec; --model RUN takes yours\n")
    count = sum(1 for _ in iter_lines(args.input, keep_empty=True, report=True)) if args.input else 0
    if args.input and count == 0:
        raise ValueError(f"{args.input}: no text in it")
    l2v = LLM2Vec.from_pretrained(
        args.model,
        adapters=args.adapter,
        causal=args.causal,
        pooling=args.pooling,
        max_length=args.max_length,
        dtype=args.dtype,
        device=device,
    )
    if args.input:
        with locked(Path(args.output)) if rank() == 0 else nullcontext():
            embed_file(l2v, args, count)
    else:
        print_table(l2v, args)


if __name__ == "__main__":
    run(main)
