"""The tables of task families and of words in README.md here, from the JSON that the evaluation wrote:

    python -m llm2vec_min.evaluation --ladder tiny-supervised --compare tiny-causal-simcse tiny-bidirectional-simcse \\
      --limit 1500 --tasks sts:stsb_dev.tsv retrieval:cranfield ... --json results/families-tiny.json
    python tests/benchmarks/families.py

The files "parts" are those of `parts.py`.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SETS = {
    "sts12": "STS12", "sts13": "STS13", "sts14": "STS14", "sts15": "STS15", "stsb_dev": "STS-B dev", "cranfield": "Cranfield",
    "vaswani": "Vaswani", "vaswani_4000": "Vaswani, 4,000 documents", "search": "the shipped search", "trecqa": "TREC-QA",
    "banking77_test": "Banking77", "sst2_test": "SST-2", "biomedical": "biomedical titles", "search_snippets": "search snippets",
    "conll2000_test": "CoNLL-2000, chunks", "wnut17_test": "WNUT17, names", "ewt_test": "EWT, part of speech", "mean": "mean",
}  # fmt: skip
METRICS = {
    "spearman": "Spearman", "ndcg_at_10": "nDCG@10", "map": "MAP", "accuracy": "accuracy", "v_measure": "V-measure",
    "token_accuracy": "accuracy", "token_accuracy_left": "accuracy, one to the left", "span_f1": "F1 of spans",
    "span_f1_left": "F1 of spans, one to the left", "mean": "",
}  # fmt: skip
MODELS = {
    "+ mntp": "+ MNTP", "+ simcse": "+ SimCSE", "supervised": "+ supervised", "causal-simcse": "causal + SimCSE",
    "bidirectional-simcse": "bidirectional + SimCSE", "simcse": "MNTP + SimCSE", "llm2vec": "MNTP + SimCSE",
    "causal-simcse, weighted_mean": "causal + SimCSE, weighted mean", "mntp": "MNTP", "mntp-supervised": "MNTP + supervised",
}  # fmt: skip
STAGES = ("causal", "bidirectional", "+ mntp", "+ simcse", "+ supervised", "supervised")


def last(model: str) -> str:
    """The last part of a run's or a preset's name."""
    return Path(model).name.removeprefix("tiny-")


def table(result: dict, metrics: tuple[str, ...] = ()) -> list[str]:
    """Lines of a Markdown table: of each task its first metric, or those that are named. ▲ or ▼: better or worse than the
    column before at p < 0.05, paired; on a ladder the shortcuts, which stand on no column, have no such sign."""
    models = result["models"]
    signed = STAGES if "causal" in models else tuple(map(last, models))
    signs = {
        (s["to"], s["task"], s["metric"]): " ▲" if s["difference"] > 0 else " ▼"
        for s in result["steps"]
        if s["p"] is not None and s["p"] < 0.05 and last(s["from"]) in signed and last(s["to"]) in signed
    }
    lines = ["| x 100 | metric | " + " | ".join(MODELS.get(last(m), m) for m in models) + " |"]
    lines.append("|---" * (len(models) + 2) + "|")
    for task, scores in next(iter(models.values())).items():
        name = SETS[Path(task.split(":")[-1].split(",")[-1]).name.split(".")[0]]
        for metric in [m for m in metrics if m in scores] or ([] if metrics else [next(iter(scores))]):
            cells = [f"{models[m][task][metric]['value']:.1f}{signs.get((m, task, metric), '')}" for m in models]
            lines.append(f"| {name} | {METRICS[metric]} | " + " | ".join(cells) + " |")
    return lines


def tables() -> dict[str, list[str]]:
    """Every table there is a file for, by the file's name."""
    words = ("token_accuracy", "token_accuracy_left", "span_f1", "span_f1_left")
    paths = [path for kind in ("families", "parts", "words") for path in sorted(RESULTS.glob(f"{kind}-*.json"))]
    return {path.stem: table(json.loads(path.read_text()), words if path.stem.startswith("words") else ()) for path in paths}


if __name__ == "__main__":
    for name, lines in tables().items():
        print(name, *lines, "", sep="\n")
