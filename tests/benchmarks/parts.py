"""What each part adds under SimCSE: looking both ways, MNTP, and against both the causal model with the mean that suits it.

    python tests/benchmarks/parts.py tiny-causal-simcse tiny-bidirectional-simcse tiny-llm2vec --limit 1500 \\
      --tasks sts:stsb_dev.tsv retrieval:cranfield ... --json results/parts-tiny.json

The first model is scored twice, last with the weighted mean: so it is no `--compare`, which has one --pooling for all.
`families.py` makes a table of the file.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation.compare import measure, read_tasks, report, table
from llm2vec_min.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=3, metavar="MODEL", help="causal + SimCSE, bidirectional + SimCSE, MNTP + SimCSE")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="KIND:PATH")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    tasks = read_tasks(args.tasks)
    measured = {}
    for name, pooling in [*((model, None) for model in args.models), (args.models[0], "weighted_mean")]:
        l2v = LLM2Vec.from_pretrained(name, pooling=pooling, dtype=args.dtype)
        shown = f"{name}, {pooling}" if pooling else name
        measured[shown] = measure(l2v, tasks, limit=args.limit, show_progress=True)
        write_json(args.json, report(measured))
    print(table(report(measured)))


if __name__ == "__main__":
    main()
