"""Intervals against formulas and simulation, the paired test, the ladder of a run."""

import json
import shutil

import numpy as np
import pytest
import scipy.stats
from test_sentences import FIRST, GOLD, SECOND

from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import compare, sentences
from llm2vec_min.evaluation.__main__ import main
from llm2vec_min.lora import add_lora


def test_interval_of_a_mean_is_the_formulas():
    values = np.random.default_rng(0).normal(0.3, 0.1, 400)
    shown = compare.interval(*compare.resample(sentences.mean_score(values)))
    half = 1.96 * 100 * values.std() / 20
    assert shown["value"] == pytest.approx(100 * values.mean())
    assert shown["high"] - shown["value"] == pytest.approx(half, rel=0.15)
    assert shown["value"] - shown["low"] == pytest.approx(half, rel=0.15)


def test_rows_of_a_group_go_together():
    """Ten copies of each of 40 values are 40 observations, not 400."""
    values = np.random.default_rng(0).normal(0.3, 0.1, 40)
    copies = sentences.mean_score(np.repeat(values, 10))
    width = [np.subtract(*np.quantile(compare.resample(s)[1], [0.975, 0.025])) for s in (
        sentences.mean_score(values), copies._replace(groups=np.repeat(np.arange(40), 10)), copies)]  # fmt: skip
    assert width[1] == pytest.approx(width[0], rel=1e-9) and width[2] == pytest.approx(width[0] / 10**0.5, rel=0.2)


def test_pairs_that_share_a_sentence_are_one_group(tmp_path):
    """An anchor on either side."""
    lines = [f"{i % 5}\tthe anchor\tother {i}" for i in range(4)] + [f"{i}\tother {9 + i}\tanother one" for i in range(3)]
    (tmp_path / "p.tsv").write_text("\n".join([*lines, "1\tx\ty"]))
    l2v = LLM2Vec.from_pretrained("tiny", device="cpu")
    score = sentences.score_pairs(l2v, sentences.read_pairs(tmp_path / "p.tsv"), None, None, "spearman")["spearman"]
    assert sorted(np.unique(score.groups, return_counts=True)[1]) == [1, 3, 4]


def test_coverage():
    """Of 100 samples, the 95 % interval holds the true correlation in about 95 %."""
    rng, inside = np.random.default_rng(1), 0
    truth = 100 * 6 / np.pi * np.arcsin(0.6 / 2)  # of a normal pair with correlation 0.6
    for _ in range(100):
        a = rng.normal(size=80)
        b = 0.6 * a + 0.8 * rng.normal(size=80)
        score = sentences.Score(lambda rows, a=a, b=b: 100 * sentences.spearman(a[rows], b[rows]), np.arange(80))
        shown = compare.interval(*compare.resample(score, resamples=200))
        inside += shown["low"] <= truth <= shown["high"]
    assert 88 <= inside <= 100


def test_an_interval_leaves_the_metrics_range_no_more_than_its_resamples_do():
    low = compare.interval(3.0, np.linspace(1, 40, 1000))  # V-measure of few rows: repeated ones flatter it
    assert low["low"] == 0 and low["value"] == 3 and 3 < low["high"] < 40
    assert compare.interval(3.0, np.linspace(-20, 40, 1000))["low"] < 0, "a correlation may be negative"


def test_paired_test():
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 0.2, 300)  # most of the variance is shared
    scores = [compare.resample(sentences.mean_score(hard + rng.normal(d, 0.05, 300))) for d in (0, 0, 0.02)]
    same, better = compare.paired(scores[0], scores[1]), compare.paired(scores[0], scores[2])
    assert same["p"] > 0.05 and same["low"] < 0 < same["high"] and better["p"] < 0.01 and better["low"] > 0
    alone = compare.interval(*scores[0])
    assert alone["high"] - alone["low"] > 1.5 * better["difference"], "the two intervals overlap"
    worse = compare.paired(scores[2], scores[0])
    assert worse["difference"] == -better["difference"] and worse["p"] == better["p"]
    assert compare.paired(scores[0], scores[0])["p"] == 1
    ps = []  # without a difference p is uniform
    for _ in range(80):
        pair = [compare.resample(sentences.mean_score(rng.normal(size=60)), resamples=200, seed=1) for _ in range(2)]
        ps.append(compare.paired(*pair)["p"])
    assert scipy.stats.kstest(ps, "uniform").pvalue > 0.01


def test_one_row_more_is_no_progress():
    """Two encoders that are equal on all rows but k = 1, 2 or 3: no luck of the draw makes that certain."""
    rng, rows = np.random.default_rng(0), np.arange(200)
    for k in (1, 2, 3):
        before = np.arange(200) < 150
        after = before | np.isin(rows, rng.choice(np.arange(150, 200), k, replace=False))
        for seed in range(20):
            scores = [compare.resample(sentences.mean_score(x.astype(float)), seed=seed) for x in (before, after)]
            step = compare.paired(*scores)
            assert step["p"] == pytest.approx(2 * np.exp(-k), abs=0.08) and (step["p"] > 0.05) == (step["low"] <= 0), (k, seed)


def test_a_handful_of_rows_has_no_interval():
    """Nine queries that all gain: neither an interval nor a p; ten have both."""
    for n in (1, compare.FEWEST - 1, compare.FEWEST):
        before, after = (compare.resample(sentences.mean_score(x)) for x in (np.full(n, 0.2), np.linspace(0.5, 0.9, n)))
        shown, step = compare.interval(*after), compare.paired(before, after)
        assert shown["value"] == pytest.approx(100 * np.linspace(0.5, 0.9, n).mean()) and step["difference"] > 0
        enough = n == compare.FEWEST
        assert (shown["low"] is not None) == enough and (step["p"] is not None) == enough
    assert compare.short_names(["sts:x/a.tsv", "sts:y/a.tsv", "words:b.x,c.y", "mean"]) == {
        "sts:x/a.tsv": "sts:x/a.tsv", "sts:y/a.tsv": "sts:y/a.tsv", "words:b.x,c.y": "words c", "mean": "mean"}  # fmt: skip
    models = {name: {"sts:a": {"spearman": (50.0, np.full(9, np.nan))}} for name in "AB"}
    assert compare.table(compare.report(models)).splitlines()[-1] == "| sts a | spearman | 50.0 | 50.0 |"


def test_tasks_of_one_size_are_resampled_independently(tmp_path):
    for name in "ab":
        lines = (f"{s + i}\t{a} {i}\t{b} {i}" for i in range(3) for s, a, b in zip(GOLD, FIRST, SECOND, strict=True))
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    names = [f"sts:{tmp_path}/{name}.tsv" for name in "ab"]
    measured = compare.measure(LLM2Vec.from_pretrained("tiny", device="cpu"), compare.read_tasks(names))
    (value, draws), (other, others) = (measured[name]["spearman"] for name in names)
    assert value == other and abs(np.corrcoef(draws, others)[0, 1]) < 0.2


def test_the_resamples_depend_on_the_task_not_on_its_folder():
    seeds = compare.resample_seeds
    here, there = ["sts:a.tsv", "classification:a.tsv,b.tsv"], ["sts:/data/a.tsv", "classification:x/a.tsv,/y/b.tsv"]
    assert list(seeds(here).values()) == list(seeds(there).values()) and len(set(seeds(here).values())) == 2
    namesakes = ["retrieval:scifact/test", "retrieval:nfcorpus/test", "pairs:a.tsv", "sts:a.tsv"]
    assert len(set(seeds(namesakes).values())) == 4


def test_a_resample_of_one_label_has_no_precision(tmp_path, monkeypatch):
    """3 of 60 pairs are the same: a resample without any would score 0 for each encoder, and none would be better."""
    (tmp_path / "p.tsv").write_text("".join(f"{int(i < 3)}\ta{i}\tb{i}\n" for i in range(60)))
    data = sentences.read_binary_pairs(tmp_path / "p.tsv")
    measured = []
    for sign in (-1, 1):
        cosines = sign * np.linspace(1, 0, 60)
        monkeypatch.setattr(sentences, "cosine_scores", lambda *_, cosines=cosines: cosines)
        score = sentences.score_pairs(None, data, None, None, "average_precision")["average_precision"]
        measured.append(compare.resample(score))
    assert 20 < np.isnan(measured[0][1]).sum() < 80  # (57 / 60)^60 = 4.6 % of 1,000
    found = compare.interval(*measured[1])
    assert found == {"value": 100, "low": 100, "high": 100}
    assert compare.paired(*measured)["p"] < 0.01


def test_undefined():
    constant = sentences.Score(lambda rows: float("nan"), np.arange(4))
    assert compare.interval(*compare.resample(constant)) == dict.fromkeys(("value", "low", "high"))
    assert set(compare.paired(compare.resample(constant), compare.resample(constant)).values()) == {None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A bidirectional run of two stages, untrained, and a causal one of one stage."""
    folder = tmp_path_factory.mktemp("runs")

    def stage(base, name, kind, **options):
        l2v = LLM2Vec.from_pretrained(base, device="cpu", **options)
        add_lora(l2v.decoder, r=2)
        for n, p in l2v.decoder.named_parameters():
            if "lora_B" in n:
                p.data.normal_(std=0.02)
        (folder / name).mkdir()
        l2v.save_run(folder / name, kind)
        (folder / name / "train_args.json").write_text(json.dumps({"stage": kind}))
        return str(folder / name)

    mntp = stage("tiny", "mntp", "mntp")
    simcse, causal = stage(mntp, "simcse", "simcse", pooling="max"), stage("tiny", "causal", "simcse", causal=True)
    (folder / "p.tsv").write_text("".join(f"{s}\t{a}\t{b}\n" for s, a, b in zip(GOLD, FIRST, SECOND, strict=True)))
    return folder, mntp, simcse, causal


def test_every_rung_has_the_runs_template(runs, tmp_path):
    """A local copy of a model is in no preset; what its run was trained with stands in the run alone."""
    run = shutil.copytree(runs[2], tmp_path / "run")
    path = run / "llm2vec_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template": ["[INST] ", " [/INST]"]}))
    assert {LLM2Vec.from_pretrained(**options, device="cpu").template for options in compare.rungs(str(run)).values()} == {
        ("[INST] ", " [/INST]")
    }


def test_ladder(runs, tmp_path, capsys):
    folder, mntp, simcse, causal = runs
    assert list(compare.rungs(causal)) == ["causal", "+ simcse"] and compare.rungs(causal)["+ simcse"]["causal"] is True
    task = f"sts:{folder}/p.tsv"
    outputs = ["--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")]
    main(["--ladder", simcse, "--compare", causal, "--tasks", task, *outputs, "--device", "cpu"])
    out = json.loads((tmp_path / "o.json").read_text())
    assert list(out["models"]) == ["causal", "bidirectional", "+ mntp", "+ simcse", causal]
    direct = {  # the same encoders by hand, all pooled as the run is
        "causal": dict(name="tiny", causal=True, pooling="max"), "bidirectional": dict(name="tiny", pooling="max"),
        "+ mntp": dict(name=mntp, pooling="max"), "+ simcse": dict(name=simcse), causal: dict(name=causal),
    }  # fmt: skip
    for name, options in direct.items():
        expected = sentences.sts_score(LLM2Vec.from_pretrained(**options, device="cpu"), folder / "p.tsv")
        assert out["models"][name][task]["spearman"]["value"] == pytest.approx(expected, abs=1e-6), name
    assert [(s["from"], s["to"]) for s in out["steps"]] == list(zip(list(direct)[:-1], list(direct)[1:], strict=True))
    assert all({"difference", "low", "high", "p", "task", "metric"} <= step.keys() for step in out["steps"])
    out = capsys.readouterr().out
    assert "| sts p | spearman |" in out and "▲ ▼: better or worse" in out and "mean: of" not in out, "one task has no mean"
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_that_breaks_off_keeps_what_is_done(runs, tmp_path, monkeypatch):
    """A model that is not there is said before the first is scored; one that fails later costs nothing already scored."""
    folder, mntp, simcse, _ = runs
    arguments = ["--tasks", f"sts:{folder}/p.tsv", "--json", str(tmp_path / "o.json"), "--device", "cpu", "--compare"]
    measure, scored = compare.measure, []

    def failing(l2v, *others, **options):
        scored.append(l2v)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return measure(l2v, *others, **options)

    monkeypatch.setattr("llm2vec_min.evaluation.__main__.measure", failing)
    with pytest.raises(ValueError, match="nowhere"):
        main([*arguments, mntp, str(tmp_path / "nowhere")])
    assert not scored and not (tmp_path / "o.json").exists()
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, mntp, simcse])
    assert list(json.loads((tmp_path / "o.json").read_text())["models"]) == [mntp]


def test_table_marks_only_what_is_more_than_noise():
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.1, 200)
    models = {
        name: {task: {"map": compare.resample(sentences.mean_score(base + d))} for task in ("reranking:a", "reranking:b")}
        for name, d in (("A", 0), ("B", 0.1 + rng.normal(0, 0.01, 200)), ("C", 0.1 + rng.normal(0, 0.01, 200)), ("D", 0))
    }
    lines = compare.table(compare.report(models)).splitlines()
    assert lines[0] == "| x 100 [95 %] | metric | A | B | C | D |" and lines[-1].startswith("| mean | mean |")
    cells = [cell.strip() for cell in lines[2].split("|")[3:7]]
    assert ["▲" in cell for cell in cells] == [False, True, False, False] and cells[3].endswith("▼")


def test_the_interval_is_of_95_percent():
    draws = np.linspace(40, 60, 1001)
    assert compare.interval(50.0, draws) == pytest.approx({"value": 50, "low": 40.5, "high": 59.5})
    found = compare.paired((50.0, draws), (53.0, draws + np.linspace(0, 6, 1001)))
    assert (found["low"], found["high"]) == pytest.approx((0.15, 5.85))


def test_rungs_read_as_much_as_the_run(runs):
    folder, mntp, *_ = runs
    path = folder / "mntp" / "llm2vec_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"max_length": 77}))
    assert {options["max_length"] for options in compare.rungs(mntp).values()} == {77}
    path.write_text(before)


def test_the_mean_row_is_of_each_tasks_first_metric():
    a, b, other = (np.full(5, x) + np.arange(5) for x in (1.0, 2.0, 90.0))
    value, draws = compare.mean_row({"one": {"first": (10.0, a), "second": (99.0, other)}, "two": {"first": (30.0, b)}})
    assert value == 20 and draws.tolist() == [1.5, 2.5, 3.5, 4.5, 5.5]


def test_a_pooling_that_is_said_holds_for_every_rung(tmp_path, monkeypatch):
    l2v = LLM2Vec.from_pretrained("tiny", device="cpu", pooling="max")
    add_lora(l2v.decoder, r=2)
    l2v.save_run(tmp_path / "run", "simcse")
    (tmp_path / "p.tsv").write_text("".join(f"{s}\t{a}\t{b}\n" for s, a, b in zip(GOLD, FIRST, SECOND, strict=True)))
    load, seen = LLM2Vec.from_pretrained, []
    monkeypatch.setattr(LLM2Vec, "from_pretrained", lambda *a, **o: seen.append(load(*a, **o)) or seen[-1])
    main(["--ladder", str(tmp_path / "run"), "--pooling", "last", "--max-length", "9", "--tasks", f"sts:{tmp_path}/p.tsv",
          "--device", "cpu"])  # fmt: skip
    assert [(l2v.pooling, l2v.max_length) for l2v in seen] == [("last", 9)] * 3
