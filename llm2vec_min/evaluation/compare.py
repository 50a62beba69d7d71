"""Several encoders on several tasks: an interval for each score, and whether a step is more than noise.

A score is computed again on 1,000 resamples of its test rows (bootstrap). Rows that depend on each other, such as pairs
that share an anchor, are drawn together. All encoders are scored on the same resamples, so that a difference between
two of them is tested pair by pair: what is hard for both does not count.

What is not in the intervals: a training run's randomness (train with several seeds), a classifier's training rows, and that
k-means is fitted to the very rows it is scored on. They are too narrow for few rows (of 10, p < 0.05 comes up by chance in about
a tenth of cases, of 30 in 6 to 10 %; `tests/benchmarks/intervals.py`), where all but a few rows are equal for both encoders, and
near 0 or 100 (where all rows are right the width is zero). A table of ten tests has a false sign more often than one in three
times.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..encoder import LLM2Vec, find_chain
from ..files import read_json
from . import sentences, words
from .sentences import Score

# kind -> (how its file is read, how it is scored)
KINDS: dict[str, tuple[Callable, Callable]] = {
    "sts": (sentences.read_pairs, partial(sentences.score_pairs, metric="spearman")),
    "pairs": (sentences.read_binary_pairs, partial(sentences.score_pairs, metric="average_precision")),
    "classification": (sentences.read_classification, sentences.score_classification),
    "clustering": (sentences.read_clustering, sentences.score_clustering),
    "retrieval": (sentences.read_retrieval, sentences.score_retrieval),
    "reranking": (sentences.read_reranking, sentences.score_reranking),
    "words": (words.read_probe, words.score_words),
}
RESAMPLES = 1000
FEWEST = 10  # independent rows for an interval; of fewer the resamples are too alike
Measured = dict[str, dict[str, tuple[float, np.ndarray]]]  # task -> metric -> (value, its resamples)


def resample(score: Score, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, np.ndarray]:
    """A score and what it would have been on other test sets of its size.

    Returns:
        The value, and (resamples,) values on test rows drawn group by group with replacement. The same seed and groups
        give the same rows. The draws are all nan with fewer than FEWEST groups, whose resamples are too few different ones
        to say anything; the value is, too, where the score is undefined.
    """
    value = score.statistic(np.arange(len(score.groups)))
    order = np.argsort(score.groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(score.groups[order])) + 1)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(members), len(members)) for _ in range(resamples))
    draws = np.array([score.statistic(np.concatenate([members[g] for g in groups])) for groups in drawn])
    if not math.isfinite(value) or not np.isfinite(draws).any():  # a resample of one single score or label has no value
        return math.nan, np.full(resamples, math.nan)
    return value, draws if len(members) >= FEWEST else np.full(resamples, math.nan)


def interval(value: float, draws: np.ndarray) -> dict[str, float | None]:
    """A score as {"value", "low", "high"}: the 95 % interval of the resamples, moved so that their mean is the value, because
    repeated rows flatter some metrics (V-measure), and not below 0 unless a resample is. All None where undefined (all cosines
    equal), low and high with fewer than FEWEST independent rows."""
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if not np.isfinite(draws).any():
        return {"value": value, "low": None, "high": None}
    low, high = np.nanquantile(draws, [0.025, 0.975]) + value - np.nanmean(draws)
    low, high = np.clip([low, high], min(0, value, np.nanmin(draws)), 100)
    return {"value": value, "low": float(low), "high": float(high)}


def paired(before: tuple[float, np.ndarray], after: tuple[float, np.ndarray]) -> dict[str, float | None]:
    """What `after` adds to `before`, both measured on the same resamples.

    Returns:
        {"difference", "low", "high", "p"}: the 95 % interval, and the two-sided p-value of "no difference": twice the share
        of resamples in which the sign turns round or both are exactly equal, at least 1 / (resamples + 1). All None where a
        score is undefined, all but the difference with fewer than FEWEST independent rows.
    """
    difference, draws = after[0] - before[0], after[1] - before[1]
    if not math.isfinite(difference):
        return {"difference": None, "low": None, "high": None, "p": None}
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return {"difference": difference, "low": None, "high": None, "p": None}
    draws = np.where(draws == 0, 0, draws + difference - draws.mean())  # where both are equal no shift makes a difference
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, (2 * tail + 1) / (len(draws) + 1))
    return {"difference": difference, "low": float(low), "high": float(high), "p": float(p)}


# ---- Tasks by name ----


def read_tasks(names: list[str], instructions: dict[str, str] | None = None) -> dict[str, tuple[str, object]]:
    """Each KIND:PATH as (kind, what its files hold): all that can be wrong with them, before a model is loaded.

    Raises:
        ValueError: a kind that does not exist (lists those that do), or files that are not of its form.
    """
    for kind in instructions or {}:
        if kind not in KINDS or kind == "words":
            known = ", ".join(name for name in KINDS if name != "words")
            raise ValueError(f"--instruction {kind}: expected one of {known}")
    tasks = {}
    for name in names:
        kind, colon, path = name.partition(":")
        if kind not in KINDS or not path:
            raise ValueError(f"--tasks {name!r}: expected KIND:PATH, KIND one of {', '.join(KINDS)}")
        tasks[name] = kind, KINDS[kind][0](path)
    return tasks


def measure(
    l2v: LLM2Vec,
    tasks: dict[str, tuple[str, object]],
    *,
    limit: int | None = None,
    instructions: dict[str, str] | None = None,
    layers: list[int] | None = None,
    show_progress: bool = False,
) -> Measured:
    """Every metric of `read_tasks`' tasks, with its resamples; arguments as `evaluate`'s."""
    if layers:  # an encoder that is asked for none need not be a decoder
        last = l2v.decoder.config.num_hidden_layers
        if wrong := [layer for layer in layers if not 0 <= layer <= last]:
            raise ValueError(f"--layers {wrong[0]}: expected 0 (embeddings) to {last}, the last")
    measured, seeds = {}, resample_seeds(tasks)
    for name, (kind, data) in tqdm(tasks.items(), desc="scoring", unit="task", disable=not show_progress):
        more = [layers] if kind == "words" else []
        scores = KINDS[kind][1](l2v, data, limit, (instructions or {}).get(kind), *more)
        measured[name] = {metric: resample(score, seed=seeds[name]) for metric, score in scores.items()}
    return measured


def resample_seeds(tasks: Iterable[str]) -> dict[str, int]:
    """A seed for each task: tasks of one size are resampled independently of each other, all encoders alike. From the kind and
    the files' names, so that it matters not in which folder they lie; from the whole paths where these names occur twice."""
    parts = {task: task.partition(":") for task in tasks}
    names = {t: f"{kind}:" + ",".join(Path(p).name for p in paths.split(",")) for t, (kind, _, paths) in parts.items()}
    return {t: zlib.crc32((name if list(names.values()).count(name) == 1 else t).encode()) for t, name in names.items()}


def evaluate(l2v: LLM2Vec, tasks: list[str], *, instructions: dict[str, str] | None = None, **options) -> dict:
    """Scores x 100 of an encoder.

    Args:
        tasks: such as "sts:pairs.tsv"; the kinds and their files are described in `sentences` and `words`.
        instructions: kind -> what to put before its texts (retrieval and reranking: before the queries only).
        limit: at most so many test rows (queries, sentences) of each task, drawn at random, and as many to train on.
        layers: of word tasks, also these layers.
        show_progress: a bar over the tasks.
    Returns:
        {task: {metric: {"value", "low", "high"}}}, the 95 % interval.
    """
    measured = measure(l2v, read_tasks(tasks, instructions), instructions=instructions, **options)
    return {task: {metric: interval(*score) for metric, score in metrics.items()} for task, metrics in measured.items()}


def rungs(run: str) -> dict[str, dict]:
    """A run's whole history, name -> arguments of `LLM2Vec.from_pretrained`: its base, causal and bidirectional, then each
    of its stages on top (a run trained with --causal: no bidirectional base).

    Raises:
        ValueError: not a run, it has no adapter.
    """
    base, chain, settings = find_chain(run)
    if not chain:
        raise ValueError(f"--ladder {run}: expected a run's output folder, found a model without adapters")
    names = {"pooling": "pooling_mode", "max_length": "max_length", "template": "template"}
    common = {"name": base} | {argument: settings.get(name) for argument, name in names.items()}
    steps = {"causal": {**common, "causal": True}}
    if not settings.get("causal", False):
        steps["bidirectional"] = {**common, "causal": False}
    for number, adapter in enumerate(chain, 1):
        arguments = adapter / "train_args.json"
        stage = read_json(arguments).get("stage") if arguments.is_file() else None
        name = f"+ {stage or adapter.name}"
        name += f" ({number})" if name in steps else ""
        steps[name] = {**common, "causal": settings.get("causal", False), "adapters": chain[:number]}
    return steps


# ---- To read ----


def mean_row(measured: Measured) -> tuple[float, np.ndarray]:
    """Mean over the tasks of each one's first metric, with its resamples (tasks count as independent of each other); one task
    of fewer than FEWEST rows leaves it without an interval."""
    firsts = [next(iter(metrics.values())) for metrics in measured.values()]
    return float(np.mean([value for value, _ in firsts])), np.mean([draws for _, draws in firsts], axis=0)


def short_names(tasks: Iterable[str]) -> dict[str, str]:
    """Each task's name for a table: its kind and its file or folder, without the way there, unless that is another's too."""
    parts = {task: task.partition(":") for task in tasks}
    names = {t: f"{kind} {Path(path.split(',')[-1]).name.split('.')[0]}".strip() for t, (kind, _, path) in parts.items()}
    return {task: name if list(names.values()).count(name) == 1 else task for task, name in names.items()}


def report(models: dict[str, Measured]) -> dict:
    """{"models": {model: {task: {metric: {"value", "low", "high"}}}}, "steps": [{"from", "to", "task", "metric", "difference",
    "low", "high", "p"}, ...]}: each model's scores and each step from one to its neighbour. Where there are several tasks,
    one more, "mean", is that of the tasks' first metrics."""
    full = {name: m | ({"mean": {"mean": mean_row(m)}} if len(m) > 1 else {}) for name, m in models.items()}
    steps = [
        {"from": a, "to": b, "task": task, "metric": metric} | paired(full[a][task][metric], score)
        for a, b in zip(list(full)[:-1], list(full)[1:], strict=True)
        for task, metrics in full[b].items()
        for metric, score in metrics.items()
    ]
    shown = {n: {t: {k: interval(*s) for k, s in ms.items()} for t, ms in m.items()} for n, m in full.items()}
    return {"models": shown, "steps": steps}


def table(result: dict) -> str:
    """`report`'s result as a Markdown table. ▲ or ▼: better or worse than the column to its left at p < 0.05."""
    models = list(result["models"])
    signs = {
        (s["to"], s["task"], s["metric"]): " ▲" if s["difference"] > 0 else " ▼"
        for s in result["steps"]
        if s["p"] is not None and s["p"] < 0.05
    }
    lines = ["| x 100 [95 %] | metric | " + " | ".join(models) + " |", "|---" * (len(models) + 2) + "|"]
    names = short_names(result["models"][models[0]])
    for task, metrics in result["models"][models[0]].items():
        for metric in metrics:
            cells = []
            for model in models:
                s = result["models"][model][task][metric]
                number = "undefined" if s["value"] is None else f"{s['value']:.1f}"
                number += "" if s["low"] is None else f" [{s['low']:.1f}, {s['high']:.1f}]"
                cells.append(number + signs.get((model, task, metric), ""))
            lines.append(f"| {names[task]} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def legend(result: dict, limit: int | None = None) -> str:
    """What the signs and numbers of `table` mean, as lines."""
    lines = [
        "",
        f"[...]: 95 % over other test rows{f', at most {limit} of a task' if limit else ''}; not over other training runs",
    ]
    if result["steps"]:
        lines.append("▲ ▼: better or worse than the column to the left, p < 0.05, paired; one in twenty by chance alone")
    scores = [s for tasks in result["models"].values() for metrics in tasks.values() for s in metrics.values()]
    if any(s["value"] is None for s in scores):
        lines.append(
            "undefined: all of the model's scores, or all of the right ones (few rows, --limit), are the same; so is a mean with it"
        )
    if any(s["value"] is not None and s["low"] is None for s in scores):
        lines.append(f"no [...]: fewer than {FEWEST} independent rows, too few for an interval")
    if any("mean" in tasks for tasks in result["models"].values()):
        lines.append("mean: of each task's first metric")
    return "\n".join(lines)


def plot(result: dict, path: str | Path) -> None:
    """`report`'s result as the paper's bar chart: a group of bars for each task's first metric, a bar for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def plain(name: str) -> str:  # matplotlib reads what stands between two $ as a formula
        return name.replace("$", r"\$")

    models = result["models"]
    tasks = list(next(iter(models.values())))
    figure = Figure(figsize=(max(6, 2 + 0.28 * len(tasks) * (len(models) + 1)), 4), layout="constrained")
    ax, width = FigureCanvasAgg(figure).figure.subplots(), 0.85 / len(models)
    for i, (name, scores) in enumerate(models.items()):
        firsts = [next(iter(scores[task].values())) for task in tasks]
        value, low, high = np.array([list(first.values()) for first in firsts], dtype=float).T  # None becomes nan
        bars = {"yerr": [np.maximum(value - low, 0), np.maximum(high - value, 0)], "error_kw": {"lw": 0.8}}
        ax.bar(np.arange(len(tasks)) + (i - (len(models) - 1) / 2) * width, value, width, label=plain(Path(name).name), **bars)
    ax.set_xticks(range(len(tasks)), [plain(name) for name in short_names(tasks).values()], rotation=30, ha="right", fontsize=8)
    ax.set_ylabel("score x 100, 95 % interval")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path, dpi=150)
