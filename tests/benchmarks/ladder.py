"""Measures what each step of LLM2Vec does to a model: Spearman x 100 on sentence similarity, mean pooling.

    python tests/benchmarks/ladder.py --model tiny --seeds 0 1 2
    LLM2VEC_MIN_STS=folder python tests/benchmarks/ladder.py --model DIR --preset smollm2-135m --dtype bfloat16 --data ...

The rungs: causal; bidirectional untrained; + MNTP; + SimCSE (all of LLM2Vec); the two shortcuts, SimCSE on the causal model
and on the bidirectional one without MNTP; and the supervised stage on top of SimCSE, where there are triplets. Scored on the shipped pairs and on every .tsv file (score, sentence,
sentence) of the folder that LLM2VEC_MIN_STS names. Other flags go to all stages of train.py, which must all read them; `--mntp "..."`,
`--simcse "..."` and `--supervised "..."` go to one. The same command continues a ladder that was stopped; ladder.json in --output holds what is
measured so far.
"""

import argparse
import json
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

RUNGS = ("causal", "bidirectional", "+ MNTP", "LLM2Vec", "causal + SimCSE", "bidirectional + SimCSE", "+ supervised")
NAMES = {"bidirectional": "bidirectional, untrained", "LLM2Vec": "**+ SimCSE = LLM2Vec**"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", default="runs/ladder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mntp", default="", help="flags of the MNTP stage")
    parser.add_argument("--simcse", default="", help="flags of the SimCSE stages")
    parser.add_argument(
        "--supervised", default="", help="flags of the supervised stage, which a model but tiny needs to have one"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sets", nargs="*", help="names of the STS files to use, such as stsb_dev; default: all but *_train")
    args, common = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    output = Path(args.output)

    sets = {"shipped": ROOT / "llm2vec_min" / "assets" / "text" / "similarity.tsv"}
    if "LLM2VEC_MIN_STS" in os.environ:
        found = sorted(Path(os.environ["LLM2VEC_MIN_STS"]).glob("*.tsv"))
        sets |= {p.stem: p for p in found if (p.stem in args.sets if args.sets else not p.stem.endswith("_train"))}
    results = output / "ladder.json"
    done = json.loads(results.read_text()) if results.is_file() else {}
    scores = {rung: done.get("scores", {}).get(rung, {}) for rung in RUNGS}  # rung -> seed -> set -> score
    seconds = done.get("seconds", {})  # of training, rung -> seed

    def measure(rung: str, seed: int, model: str, **options) -> None:
        if scores[rung].get(str(seed), {}).keys() != sets.keys():
            l2v = LLM2Vec.from_pretrained(model, dtype=args.dtype, **options)
            scores[rung][str(seed)] = {name: sts_score(l2v, path) for name, path in sets.items()}
            print(f"{rung}, seed {seed}: {scores[rung][str(seed)]}", flush=True)
            output.mkdir(parents=True, exist_ok=True)
            write_json(results, {"command": " ".join(sys.argv), "scores": scores, "seconds": seconds})

    def stage(rung: str, name: str, seed: int, flags: list[str]) -> str:
        folder, started = str(output / f"{name}-{seed}"), time.perf_counter()
        train.main([*flags, "--output", folder, "--seed", str(seed), "--dtype", args.dtype, "--resume", *common])
        if str(seed) not in scores[rung]:
            seconds.setdefault(rung, {})[str(seed)] = round(time.perf_counter() - started)
        measure(rung, seed, folder)
        return folder

    measure("causal", 0, args.model, causal=True)
    measure("bidirectional", 0, args.model)
    for seed in args.seeds:
        simcse = ["--stage", "simcse", *shlex.split(args.simcse)]
        mntp = stage("+ MNTP", "mntp", seed, ["--stage", "mntp", "--model", args.model, *shlex.split(args.mntp)])
        unsupervised = stage("LLM2Vec", "simcse", seed, [*simcse, "--model", mntp])
        if args.model == "tiny" or args.supervised:
            flags = ["--stage", "supervised", "--model", unsupervised, *shlex.split(args.supervised)]
            stage("+ supervised", "supervised", seed, flags)
        stage("causal + SimCSE", "causal-simcse", seed, [*simcse, "--model", args.model, "--causal"])
        stage("bidirectional + SimCSE", "bidirectional-simcse", seed, [*simcse, "--model", args.model])
    print("\n".join(table(json.loads(results.read_text()))))


def table(results: dict) -> list[str]:
    """The lines of a Markdown table: mean and, of several seeds, standard deviation."""
    sets = list(results["scores"]["causal"]["0"])
    judged = [name for name in sets if name != "shipped"]
    names = {"shipped": "shipped pairs", "stsb_dev": "STS-B dev"}
    heads = (
        [names.get(name, name.upper()) for name in judged] + ["mean"] * bool(judged) + ["shipped pairs"] * ("shipped" in sets)
    )
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for rung, seeds in results["scores"].items():
        columns = [[row[name] for row in seeds.values()] for name in judged]
        columns += [[statistics.mean(values) for values in zip(*columns, strict=True)]] * bool(judged)
        columns += [[row["shipped"] for row in seeds.values()]] if "shipped" in sets else []
        cells = [f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "") for v in columns]
        if seeds:
            lines.append(f"| {NAMES.get(rung, rung)} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
