"""Measures what each step of LLM2Vec does to a model: Spearman x 100 on sentence similarity, mean pooling.

    python tests/benchmarks/ladder.py --model tiny --seeds 0 1 2
    LLM2VEC_MIN_STS=folder python tests/benchmarks/ladder.py --model DIR --preset smollm2-135m --dtype bfloat16 --data ...

The rungs: causal; bidirectional untrained; + MNTP; + SimCSE (all of LLM2Vec); and the two shortcuts, SimCSE on the causal
model and on the bidirectional one without MNTP. Scored on the shipped pairs and on every .tsv file (score, sentence,
sentence) of the folder that LLM2VEC_MIN_STS names; ladder.json in --output holds what is measured so far. Other flags go to both stages of train.py; `--mntp "..."` and `--simcse "..."` go to one.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
import train
from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import sts_score
from llm2vec_min.files import write_json

RUNGS = ("causal", "bidirectional", "+ MNTP", "+ SimCSE", "causal + SimCSE", "bidirectional + SimCSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", default="runs/ladder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mntp", default="", help="flags of the MNTP stage")
    parser.add_argument("--simcse", default="", help="flags of the SimCSE stages")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sets", nargs="*", help="names of the STS files to use, such as stsb_dev; default: all but *_train")
    args, common = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    output = Path(args.output)

    sets = {"shipped": ROOT / "llm2vec_min" / "assets" / "text" / "similarity.tsv"}
    if "LLM2VEC_MIN_STS" in os.environ:
        found = sorted(Path(os.environ["LLM2VEC_MIN_STS"]).glob("*.tsv"))
        sets |= {p.stem: p for p in found if (p.stem in args.sets if args.sets else not p.stem.endswith("_train"))}
    scores: dict[str, list[dict]] = {rung: [] for rung in RUNGS}
    seconds: dict[str, float] = {}

    def measure(rung: str, model: str, **options) -> None:
        l2v = LLM2Vec.from_pretrained(model, dtype=args.dtype, **options)
        scores[rung].append({name: sts_score(l2v, path) for name, path in sets.items()})
        print(f"{rung}: {scores[rung][-1]}", flush=True)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "ladder.json", {"arguments": vars(args), "scores": scores, "seconds": seconds})

    def stage(rung: str, name: str, seed: int, flags: list[str]) -> str:
        folder = str(output / f"{name}-{seed}")
        started = time.perf_counter()
        train.main([*flags, "--output", folder, "--seed", str(seed), "--dtype", args.dtype, "--overwrite", *common])
        seconds[rung] = time.perf_counter() - started
        measure(rung, folder)
        return folder

    measure("causal", args.model, causal=True)
    measure("bidirectional", args.model)
    for seed in args.seeds:
        simcse = ["--stage", "simcse", *shlex.split(args.simcse)]
        mntp = stage("+ MNTP", "mntp", seed, ["--stage", "mntp", "--model", args.model, *shlex.split(args.mntp)])
        stage("+ SimCSE", "simcse", seed, [*simcse, "--model", mntp])
        stage("causal + SimCSE", "causal-simcse", seed, [*simcse, "--model", args.model, "--causal"])
        stage("bidirectional + SimCSE", "bidirectional-simcse", seed, [*simcse, "--model", args.model])

    print(f"\n| {args.model}, {len(args.seeds)} seed(s) | " + " | ".join(sets) + " | training (s) |")
    print("|---" * (len(sets) + 2) + "|")
    for rung in RUNGS:
        cells = []
        for name in sets:
            values = [row[name] for row in scores[rung]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {rung} | " + " | ".join(cells) + f" | {seconds.get(rung, 0):.0f} |")


if __name__ == "__main__":
    main()
