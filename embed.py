"""Text in, vectors out:

    python embed.py "A cat sat down." "A kitten takes a seat."          # a table of cosine similarities
    python embed.py --model runs/simcse --input texts.txt --output vectors.npy
    torchrun --nproc_per_node=8 embed.py --model runs/simcse --input texts.txt --output vectors.npy

The same command continues a killed run where it stopped.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llm2vec_min.cli import add_model_flags, run
from llm2vec_min.data import iter_lines
from llm2vec_min.device import barrier, rank, start_process, stop_process, world_size
from llm2vec_min.encoder import LLM2Vec
from llm2vec_min.files import write_json
from llm2vec_min.pooling import POOLING_MODES

CHUNK = 64  # batches tokenized, sorted by length and written at a time: memory does not grow with the file
NOT_IN_THE_VECTORS = ("device", "texts", "output")  # arguments that a continued run may change


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to compare with each other")
    add_model_flags(parser, default="tiny")
    parser.add_argument("--input", metavar="FILE", help='.txt (a text a line) or .jsonl (field "text"), also .gz, .xz')
    parser.add_argument("--output", metavar="X.npy", help="where to write the (N, C) float32 array; row i is line i")
    parser.add_argument("--instruction", help='put before each text and not pooled, such as "Retrieve similar texts:"')
    parser.add_argument("--pooling", choices=POOLING_MODES, help="token states to one vector [the model's own]")
    parser.add_argument("--normalize", action="store_true", help="scale each vector to length 1")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per forward pass [32]")
    parser.add_argument("--max-length", type=int, help="tokens per text; longer ones are cut [the model's own, 512]")
    parser.add_argument("--causal", action="store_true", default=None, help="look back only [the model's own: both ways]")
    return parser


def print_table(l2v: LLM2Vec, args: argparse.Namespace) -> None:
    """Cosine similarity of each text with each other, numbered as given."""
    vectors = l2v.encode(args.texts, args.instruction, batch_size=args.batch_size, normalize=True)
    for number, text in enumerate(args.texts, 1):
        print(f"{number:>3}  {text[:100]}")
    cosines = vectors @ vectors.T
    print("\n     " + "".join(f"{number:>7}" for number in range(1, len(vectors) + 1)))
    for number, row in enumerate(cosines, 1):
        print(f"{number:>3}  " + "".join(f"{value:>7.3f}" for value in row))


def open_part(args: argparse.Namespace, shape: tuple[int, int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The unfinished output, (N, C) float32, and which of its chunks are done, uint8; both memory-mapped files beside it,
    with the arguments in a third. One process makes them.

    Raises:
        ValueError: they cannot be written, or belong to a run with other arguments.
    """
    output = Path(args.output)
    part, done_file, header = (output.with_name(output.name + end) for end in (".part", ".part.done", ".part.json"))
    file = Path(args.input).stat()
    now = {name: value for name, value in vars(args).items() if name not in NOT_IN_THE_VECTORS}
    now |= {"shape": list(shape), "chunk": chunk, "bytes": file.st_size, "modified": file.st_mtime}
    if header.is_file():
        before = json.loads(header.read_text())
        if changed := [name for name in now if before.get(name) != now[name]]:
            found = ", ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in changed)
            raise ValueError(f"{part} is a run that was stopped, with other arguments ({found}); delete {header} to start anew")
    else:
        try:
            np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape).flush()
            np.zeros(-(-shape[0] // chunk), dtype=np.uint8).tofile(done_file)
            write_json(header, now)  # last: with it the other two are whole
        except OSError as error:
            raise ValueError(f"--output {output}: cannot be written ({error})") from None
    return np.lib.format.open_memmap(part, mode="r+"), np.memmap(done_file, dtype=np.uint8, mode="r+")


def embed_file(l2v: LLM2Vec, args: argparse.Namespace, count: int) -> None:
    """Writes the vectors of a file's lines, a chunk at a time, beside the output and renames it when complete. Every
    `world_size`-th chunk is this process's; chunks that an earlier run has written are skipped."""
    output, chunk = Path(args.output), CHUNK * args.batch_size
    shape = (count, l2v.decoder.config.hidden_size)
    if rank() == 0:
        open_part(args, shape, chunk)
    barrier()
    vectors, done = open_part(args, shape, chunk)
    if rank() == 0 and done.any():
        print(f"continuing: {done.sum()} of {len(done)} chunks of {chunk} texts are there")
    lines = iter_lines(args.input, keep_empty=True)
    with tqdm(total=count, desc="embedding", unit="text", disable=rank() > 0) as bar:
        for number in range(len(done)):
            texts, first = list(itertools.islice(lines, chunk)), number * chunk
            if number % world_size() == rank() and not done[number]:
                rows = l2v.encode(texts, args.instruction, batch_size=args.batch_size, normalize=args.normalize)
                vectors[first : first + len(texts)] = rows
                vectors.flush()
                done[number] = 1  # after its vectors are on the disk
                done.flush()
            bar.update(len(texts))
    barrier()
    if rank() == 0:
        names = [output.with_name(output.name + end) for end in (".part", ".part.done", ".part.json")]
        os.replace(names[0], output)
        for name in names[1:]:
            name.unlink()
        print(f"{output}: {shape[0]} vectors of {shape[1]} numbers, float32")


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if bool(args.texts) == bool(args.input):
        raise ValueError("give texts to compare, or --input FILE with --output X.npy")
    if bool(args.input) != bool(args.output):
        raise ValueError("--input FILE and --output X.npy go together")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.output and not args.output.endswith(".npy"):
        raise ValueError(f"--output {args.output}: expected a name that ends in .npy")
    device = start_process(args.device)
    count = sum(1 for _ in iter_lines(args.input, keep_empty=True)) if args.input else 0
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
        embed_file(l2v, args, count)
    else:
        print_table(l2v, args)
    stop_process()


if __name__ == "__main__":
    run(main)
