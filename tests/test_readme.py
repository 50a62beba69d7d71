"""What the README says: its tables come from the measured JSON, its files, links, presets and flags exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from llm2vec_min import LLM2Vec
from llm2vec_min.config import PRESETS
from llm2vec_min.data import read_pairs
from llm2vec_min.evaluation import cosine_scores, spearman

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import counting  # noqa: E402
import families  # noqa: E402
import ladder  # noqa: E402
import picture  # noqa: E402

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "tests" / "benchmarks" / "README.md").read_text()


def overview() -> list[str]:
    """The README's ladder: of each model and rung the mean over the five judged sets."""
    lines = ["| | " + " | ".join(ladder.NAMES.get(r, r) for r in ladder.RUNGS) + " |", "|---" * (len(ladder.RUNGS) + 1) + "|"]
    for model, name in (
        ("smollm2-135m", "SmolLM2-135M, three seeds (+ supervised: one, on LLM2Vec's 64.4)"),
        ("tiny", "`tiny`, 1.6M parameters, three seeds"),
    ):
        scores = json.loads((RESULTS / f"{model}.json").read_text())["scores"]
        cells = []
        for rung in ladder.RUNGS:
            means = [mean(row[name] for name in picture.SETS) for row in scores.get(rung, {}).values()]
            cells.append(f"{mean(means):.1f}" if means else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def test_the_ladder_is_the_measured_one():
    assert "\n".join(overview()) in README


@pytest.mark.parametrize("model", ["smollm2-135m", "tiny"])
def test_the_benchmarks_tables_are_the_measured_ones(model):
    assert "\n".join(ladder.table(json.loads((RESULTS / f"{model}.json").read_text()))) in BENCHMARKS


@pytest.mark.parametrize("name", families.tables())
def test_the_tables_of_families_are_the_measured_ones(name):
    assert "\n".join(families.tables()[name]) in BENCHMARKS


def test_counting_words_is_the_measured_one():
    assert "\n".join(counting.table()) in BENCHMARKS
    every = json.loads(counting.RESULTS.read_text())["all rows"]
    values = {task: scores["spearman"]["value"] for task, scores in every.items()}
    judged = [values[f"sts:{name}.tsv"] for name in picture.SETS]
    assert f"**the mean {mean(judged):.1f}**" in BENCHMARKS and f"[{mean(judged):.1f} without any model]" in README
    measured = json.loads(counting.RESULTS.read_text())
    for model, text in (("smollm2-135m", "{:.1f} (SmolLM2's tokens)"), ("tiny", "{:.1f} (`tiny`'s)")):
        draws = [measured[f"all rows, random vectors, {model}, draw {seed}"] for seed in range(3)]
        columns = zip(*([next(iter(scores.values()))["value"] for scores in draw.values()] for draw in draws), strict=True)
        *judged, pairs, search = map(mean, columns)
        assert text.format(mean(judged)) in README
        assert " | ".join(f"{value:.1f}" for value in (*judged, mean(judged), pairs, search)) in BENCHMARKS
    pairs = read_pairs(ROOT / "llm2vec_min" / "assets" / "text" / "similarity.tsv")
    found = 100 * spearman(cosine_scores(counting.CountsWords(counting.texts_of("sts", pairs)), *pairs[1:]), pairs[0])
    assert found == pytest.approx(values["sts:similarity.tsv"], abs=0.01)


def test_the_gpus_figures_are_the_measured_ones():
    measured = json.loads((RESULTS / "gpu-h200.json").read_text())
    rows = [row for part in measured["parts"] for row in part["rows"] if "ratio" in row]
    assert len(rows) == 6
    for row in rows:
        sides = ("ours", "theirs", "theirs_bf16")
        seconds = [f"{v:.3f}" if v < 1 else f"{v:.2f}" for v in (row[f"{side}_s"] for side in sides)]
        memory = [f"{v:.1f}" if v < 100 else f"{v:.0f}" for v in (row[f"{side}_gb"] for side in sides)]
        times = " | ".join(f"{value} s" for value in seconds)
        ratios = f"{row['ratio']:.1f}x, {row['ratio_bf16']:.1f}x"
        assert f"| {times} | {ratios} | " + " | ".join(f"{value} GB" for value in memory) in BENCHMARKS, row
        if row["model"] == "1.3b" or "MNTP" in row["task"]:
            assert f"| {times} | {' / '.join(memory)} GB |" in README, row


@pytest.mark.parametrize("file", ["encoders.json", "encoders-float32.json"])
def test_the_encoders_are_the_measured_ones(file):
    for row in json.loads((RESULTS / file).read_text())["rows"]:
        cells = [
            f"{row['seconds']:.1f}",
            f"{row['times_ours']:.2f}",
            *(f"{row[f'cosine_{k}']:.3f}" for k in ("mean", "lowest")),
        ]
        assert " | ".join([f"| {row['name']}", *cells]) in BENCHMARKS


@pytest.mark.parametrize("theme", picture.THEMES)
def test_the_picture_is_drawn_from_the_measured_ladder(theme):
    assert (ROOT / ".github" / f"steps-{theme}.svg").read_text() == picture.draw(theme)


def test_links_and_files_exist():
    assert len(README.splitlines()) <= 170
    for text, base in ((README, ROOT), (BENCHMARKS, ROOT / "tests" / "benchmarks")):
        for target in re.findall(r"\]\(([^)#]+)|src(?:set)?=\"([^\"]+)", text):
            name = "".join(target).split("#")[0]
            assert name.startswith("http") or (base / name).exists(), name
    for path in re.findall(r"python ((?:tests/)?[\w/]+\.py)", README + BENCHMARKS):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m (llm2vec_min[\w.]+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_presets_exist():
    listed = re.search(r"Presets: (.*?); or any", README, re.S)[1]
    assert set(re.findall(r"`([\w.-]+)`", listed)) == {name for name in PRESETS if not name.startswith("llm2vec-")}


def test_flags_exist():
    from llm2vec_min.training.flags import build_parser

    known = set(re.findall(r"--[\w-]+", build_parser([], "").format_help() + (ROOT / "embed.py").read_text()))
    for file in sorted((ROOT / "llm2vec_min").rglob("*.py")):
        known |= set(re.findall(r"\"(--[\w-]+)\"", file.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known | {"--nproc_per_node", "--index-url"}


def test_a_loop_of_ones_own(tmp_path):
    """The script in CONTRIBUTING.md runs, and leaves a run."""
    script = re.search(r"```python\n(.*?)```", (ROOT / ".github" / "CONTRIBUTING.md").read_text(), re.S)[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs" / "own" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0] and not list((tmp_path / "runs" / "own").glob("checkpoint*"))
    whole = script
    for said, instead in {
        '("tiny-mntp")': '("tiny-mntp", dtype="float32")',
        "add_lora(l2v.decoder)": "l2v.decoder.requires_grad_()",
        'save_run("runs/own", stage="own")': 'save("whole", overwrite=True)',
        "runs/own": "runs/whole",
    }.items():
        assert said in whole
        whole = whole.replace(said, instead)
    done = subprocess.run([sys.executable, "-c", whole], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = LLM2Vec.from_pretrained("tiny-mntp", device="cpu").encode(["a text"])
    for folder in (tmp_path / "runs" / "own", tmp_path / "whole"):
        assert np.abs(LLM2Vec.from_pretrained(folder, device="cpu").encode(["a text"]) - before).max() > 0.01
