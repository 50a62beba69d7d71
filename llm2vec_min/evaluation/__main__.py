"""Scores x 100 with 95 % intervals, of one encoder or of several beside each other:

    python -m llm2vec_min.evaluation --model runs/simcse --tasks sts:pairs.tsv retrieval:cranfield --json scores.json
    python -m llm2vec_min.evaluation --ladder runs/simcse --compare runs/causal-simcse --tasks sts:pairs.tsv --plot ladder.png

KIND:PATH is one of (tab-separated UTF-8 files, JSON lines; plain, .gz or .xz)
    sts:F.tsv                            score, sentence, sentence                  Spearman of the cosines
    pairs:F.tsv                          1 or 0, sentence, sentence                 average precision
    classification:TRAIN.tsv,TEST.tsv    label, text                                accuracy, macro F1 of a logistic regression
    clustering:F.tsv                     label, text                                V-measure of k-means, ten seeds
    retrieval:FOLDER                     corpus.jsonl, queries.jsonl, qrels.tsv     nDCG@10, recall@100
    reranking:F.jsonl                    query, positive [...], negative [...]      mean average precision
    words:TRAIN.conll,TEST.conll         CoNLL columns or CoNLL-U (.conllu)         token accuracy, span F1 of a linear probe
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from ..cli import add_model_flags, run
from ..encoder import LLM2Vec, find_chain
from ..files import write_json
from ..pooling import POOLING_MODES
from .compare import KINDS, legend, measure, plot, read_tasks, report, rungs, table


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm2vec_min.evaluation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_model_flags(parser, default="tiny")
    parser.set_defaults(model=None)
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="several models, in this order, not --model")
    parser.add_argument("--ladder", metavar="RUN", help="a run's base and all its stages; --compare adds more")
    parser.add_argument("--tasks", nargs="+", action="extend", required=True, metavar="KIND:PATH", help="what to score")
    parser.add_argument("--instruction", nargs="+", action="extend", default=[], metavar="KIND=TEXT",
                        help="put before these tasks' texts (queries only, where there are documents)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="at most N rows to test on, and N to train on, drawn at random")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help="word tasks: also the states after these layers")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, help="look back only [the model's own direction]")
    parser.add_argument("--pooling", choices=POOLING_MODES, help="token states to one vector [the model's own]")
    parser.add_argument("--max-length", type=int, help="tokens per text; longer ones are cut [the model's own, 512]")
    parser.add_argument("--json", metavar="OUT.json", help="write the scores: task, metric, value, low, high")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the scores as bars (needs matplotlib)")
    return parser


def check(args: argparse.Namespace) -> dict[str, str]:
    """What can be wrong with the flags; returns the instructions by kind."""
    if args.model and (args.compare or args.ladder):
        raise ValueError("--model goes alone; --compare and --ladder name the models themselves")
    if args.adapter and (args.compare or args.ladder):
        raise ValueError("--adapter goes with --model; --compare takes runs")
    if args.causal is not None and args.ladder:
        raise ValueError("--causal goes without --ladder, whose columns have directions of their own")
    if wrong := [text for text in args.instruction if "=" not in text]:
        raise ValueError(f"--instruction {wrong[0]!r}: expected KIND=TEXT")
    for name, least in (("limit", 2), ("max_length", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    if args.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: its folder does not exist")
        if path and not os.access(Path(path).absolute().parent, os.W_OK):
            raise ValueError(f"--{name} {path}: nothing can be written in its folder")
        if path and Path(path).is_dir():
            raise ValueError(f"--{name} {path}: is a folder, expected a file's name")
        files = [Path(file) for task in args.tasks for file in task.partition(":")[2].split(",")]
        if path and Path(path).resolve() in [file.resolve() for file in files]:
            raise ValueError(f"--{name} {path}: is a file of the --tasks too")
    if args.layers and not any(task.startswith("words:") for task in args.tasks):
        raise ValueError("--layers: none of the --tasks is of the kind words")
    if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {args.plot}: expected a name that ends in .png, .svg or .pdf")
    if twice := [name for name in args.compare if args.compare.count(name) > 1]:
        raise ValueError(f"--compare {twice[0]}: named twice, each model has one column")
    instructions = dict(text.split("=", 1) for text in args.instruction)
    if len(instructions) < len(args.instruction):
        raise ValueError("--instruction: one text for each kind of task, found two")
    if idle := set(instructions) & set(KINDS) - {"words", *(task.partition(":")[0] for task in args.tasks)}:
        raise ValueError(f"--instruction {min(idle)}: none of the --tasks is of this kind")
    return instructions


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    instructions = check(args)
    tasks = read_tasks(args.tasks, instructions)
    own = {"causal": args.causal, "pooling": args.pooling, "max_length": args.max_length}
    given = {name: value for name, value in own.items() if value is not None}
    models = rungs(args.ladder) if args.ladder else {}
    models |= {name: {"name": name} for name in args.compare or ([] if args.ladder else [args.model or "tiny"])}
    for options in models.values():
        find_chain(options["name"])  # a model that is not there is said now, not when the others are scored
    measured, result = {}, {}
    try:
        for number, (name, options) in enumerate(models.items(), 1):
            print(f"{name}, {number} of {len(models)}", file=sys.stderr)
            options = {"adapters": args.adapter} | options | given
            l2v = LLM2Vec.from_pretrained(**options, dtype=args.dtype, device=args.device)
            options = {"limit": args.limit, "layers": args.layers, "show_progress": True}
            measured[name] = measure(l2v, tasks, instructions=instructions, **options)
            result = report(measured)
            if args.json:  # after every model: a comparison that is stopped keeps those that are done
                single = {task: result["models"][name][task] for task in tasks}
                write_json(args.json, result if args.compare or args.ladder else single)
    finally:  # also when a later model, or the disk, fails
        if result:
            print(table(result))
            print(legend(result, args.limit))
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    run(main)
