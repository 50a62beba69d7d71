"""Text in, vectors out:

    python embed.py "A cat sat down." "A kitten takes a seat."          # a table of cosine similarities
    python embed.py --model runs/simcse --input texts.txt --output vectors.npy
"""

import argparse
import itertools
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llm2vec_min.cli import refuse, run
from llm2vec_min.config import PRESETS
from llm2vec_min.data import iter_lines
from llm2vec_min.encoder import DTYPES, LLM2Vec
from llm2vec_min.pooling import POOLING_MODES

CHUNK = 64  # batches tokenized, sorted by length and written at a time: memory does not grow with the file


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to compare with each other")
    parser.add_argument("--model", default="tiny",
                        help=f"a run's output folder, a checkpoint folder, a hub id or a preset ({', '.join(PRESETS)}) [tiny]")  # fmt: skip
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR",
                        help="PEFT folder or hub id to merge on top; give it again for the next")  # fmt: skip
    parser.add_argument("--input", metavar="FILE", help='.txt (a text a line) or .jsonl (field "text"), also .gz, .xz')
    parser.add_argument("--output", metavar="X.npy", help="where to write the (N, C) float32 array; row i is line i")
    parser.add_argument("--instruction", help='put before each text and not pooled, such as "Retrieve similar texts:"')
    parser.add_argument("--pooling", choices=POOLING_MODES, help="token states to one vector [the model's own]")
    parser.add_argument("--normalize", action="store_true", help="scale each vector to length 1")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per forward pass [32]")
    parser.add_argument("--max-length", type=int, help="tokens per text; longer ones are cut [the model's own, 512]")
    parser.add_argument("--causal", action="store_true", default=None, help="look back only [the model's own: both ways]")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights [float32]")
    parser.add_argument("--device", help="cpu, cuda, mps [the first GPU if there is one]")
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


def embed_file(l2v: LLM2Vec, args: argparse.Namespace, count: int) -> None:
    """Writes the vectors of a file's lines, a chunk at a time, beside the output and renames it when complete."""
    output = Path(args.output)
    part = output.with_name(output.name + ".part")
    shape = (count, l2v.decoder.config.hidden_size)
    try:
        vectors = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error})") from None
    lines, done = iter_lines(args.input, keep_empty=True), 0
    with tqdm(total=count, desc="embedding", unit="text") as bar:
        while chunk := list(itertools.islice(lines, CHUNK * args.batch_size)):
            rows = l2v.encode(chunk, args.instruction, batch_size=args.batch_size, normalize=args.normalize)
            vectors[done : done + len(chunk)] = rows
            done += len(chunk)
            bar.update(len(chunk))
    vectors.flush()
    del vectors
    os.replace(part, output)
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
        device=args.device,
    )
    if args.input:
        embed_file(l2v, args, count)
    else:
        print_table(l2v, args)


if __name__ == "__main__":
    run(main)
