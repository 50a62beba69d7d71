"""Sentence tasks: the same numbers from scikit-learn, scipy, trec_eval and mteb on the same vectors; files and mistakes."""

import gzip
import json
import lzma
import os
import tracemalloc

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import sklearn.cluster
import sklearn.linear_model
import sklearn.metrics
import sklearn.pipeline
import sklearn.preprocessing
import torch

from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import evaluate, sentences, sts_score
from llm2vec_min.evaluation.__main__ import main
from llm2vec_min.evaluation.compare import resample

ANIMALS = ["a cat sleeps", "the dog barks", "two horses run", "a bird sings", "the cow eats grass", "a fish swims"]
MONEY = ["prices fell again", "the bank lends money", "taxes rise", "shares were sold", "the market closed", "a loan is paid"]
FIRST = ["a man plays the guitar", "two dogs run", "the market fell", "it rains", "she reads a book", "he cooks rice"]
SECOND = ["a man is playing guitar", "two dogs are running", "a boy swims", "the sun shines", "a book is read", "the car"]
GOLD = [5.0, 4.8, 0.0, 1.0, 4.0, 0.2]


@pytest.fixture(scope="module")
def l2v():
    return LLM2Vec.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind; half of them compressed."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = list(zip(GOLD, FIRST, SECOND, strict=True))
    (folder / "sts.tsv").write_text("".join(f"{s}\t{a}\t{b}\n" for s, a, b in pairs))
    (folder / "pairs.tsv").write_text("".join(f"{int(s > 3)}\t{a}\t{b}\n" for s, a, b in pairs))
    rows = [f"{label}\t{text}{end}\n" for end in ("", " today", " there") for label, texts in (("animals", ANIMALS), ("money", MONEY)) for text in texts]  # fmt: skip # noqa: E501
    (folder / "train.tsv").write_text("".join(rows[:24]))
    (folder / "test.tsv.gz").write_bytes(gzip.compress("".join(rows[24:]).encode()))
    (folder / "clusters.tsv.xz").write_bytes(lzma.compress("".join(rows).encode()))
    corpus = [
        {"_id": f"d{i}", "title": "" if i % 2 else "Title", "text": text} for i, text in enumerate(SECOND + ANIMALS + SECOND)
    ]
    (folder / "corpus.jsonl.xz").write_bytes(lzma.compress("\n".join(map(json.dumps, corpus)).encode()))
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": f"q{i}", "text": t}) for i, t in enumerate(FIRST)))
    judged = [(f"q{i}", f"d{j}", (i * j) % 3) for i in range(5) for j in range(i, 18, 4)]
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
    (folder / "qrels.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    rerank = [{"query": q, "positive": [p, ANIMALS[i]], "negative": MONEY[i:]} for i, (q, p) in enumerate(zip(FIRST[:4], SECOND[:4], strict=True))]  # fmt: skip # noqa: E501
    (folder / "rerank.jsonl").write_text("\n".join(map(json.dumps, rerank)))
    return folder


def value(l2v, task, metric, **options):
    return evaluate(l2v, [task], **options)[task][metric]["value"]


def test_sts_and_pairs(l2v, files):
    vectors = l2v.encode(FIRST + SECOND, normalize=True).astype(np.float64)
    cosines = (vectors[:6] * vectors[6:]).sum(1)
    expected = 100 * scipy.stats.spearmanr(cosines, GOLD).statistic
    assert value(l2v, f"sts:{files}/sts.tsv", "spearman") == pytest.approx(expected, abs=1e-9)
    assert sts_score(l2v, files / "sts.tsv") == pytest.approx(expected, abs=1e-9)
    expected = 100 * sklearn.metrics.average_precision_score(np.array(GOLD) > 3, cosines)
    assert value(l2v, f"pairs:{files}/pairs.tsv", "average_precision") == pytest.approx(expected, abs=1e-9)


def test_retrieval_equals_trec_eval(l2v, files):
    """With six documents there twice: equal cosines, ordered by document id."""
    documents, queries, qrels = sentences.read_retrieval(files)
    assert documents["d0"] == "Title " + SECOND[0] and documents["d1"] == SECOND[1] and len(qrels) == 5
    ids, vectors = list(documents), sentences.embed(l2v, list(documents.values()), None)
    told = l2v.encode([["Find:", text] for text in queries.values()], normalize=True)
    run = {q: dict(zip(ids, map(float, vectors @ v), strict=True)) for q, v in zip(queries, told, strict=True)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    options = dict(instructions={"retrieval": "Find:"})
    for ours, name in (("ndcg_at_10", "ndcg_cut_10"), ("recall_at_100", "recall_100")):
        expected = 100 * np.mean([row[name] for row in theirs.values()])
        assert value(l2v, f"retrieval:{files}", ours, **options) == pytest.approx(expected, abs=1e-6)


def test_reranking(l2v, files):
    expected = []
    for record in map(json.loads, (files / "rerank.jsonl").read_text().splitlines()):
        texts = record["positive"] + record["negative"]
        query = l2v.encode(record["query"], "Find:", normalize=True)
        relevant = np.arange(len(texts)) < len(record["positive"])
        expected.append(sklearn.metrics.average_precision_score(relevant, l2v.encode(texts, normalize=True) @ query))
    options = dict(instructions={"reranking": "Find:"})
    assert value(l2v, f"reranking:{files}/rerank.jsonl", "map", **options) == pytest.approx(100 * np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 7])
def test_logistic_regression_equals_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    centers = rng.normal(size=(classes, 20))
    y = rng.integers(0, classes, 900)
    x = (centers[y] + 1.5 * rng.normal(size=(900, 20))).astype(np.float32) * rng.uniform(0.01, 100, 20).astype(np.float32)
    x[:, 3] = 7  # a feature that says nothing, and must not divide by zero
    theirs = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(),
        sklearn.linear_model.LogisticRegression(C=2.0 if classes == 2 else 1.0, tol=1e-8, max_iter=1000),
    ).fit(x[:500].astype(np.float64), y[:500])
    ours = sentences.logistic_regression(x[:500], y[:500], x[500:])
    assert np.mean(ours == theirs.predict(x[500:])) >= 0.9975
    assert 0.5 < np.mean(ours == y[500:]) < 1


def test_classification(l2v, files):
    train, test = sentences.read_classification(f"{files}/train.tsv,{files}/test.tsv.gz")
    x, z = (l2v.encode(part["texts"], normalize=True) for part in (train, test))
    scaler = sklearn.preprocessing.StandardScaler().fit(x)
    model = sklearn.linear_model.LogisticRegression(max_iter=1000).fit(scaler.transform(x), train["labels"])
    predicted = model.predict(scaler.transform(z))
    task = f"classification:{files}/train.tsv,{files}/test.tsv.gz"
    assert value(l2v, task, "accuracy") == pytest.approx(100 * np.mean(predicted == np.array(test["labels"])))
    f1 = sklearn.metrics.f1_score(test["labels"], predicted, average="macro")
    assert value(l2v, task, "macro_f1") == pytest.approx(100 * f1)


def test_kmeans_equals_scikit_learn():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(50, 5)) + 2 * c for c in rng.normal(size=(4, 5))]).astype(np.float32)
    start = torch.from_numpy(x[[0, 60, 120, 180]])
    theirs = sklearn.cluster.KMeans(4, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit_predict(x)
    generator = torch.Generator().manual_seed(0)
    assert sentences.kmeans(torch.from_numpy(x), 4, generator, start).tolist() == theirs.tolist()

    # from its own beginning: as good as theirs, from one seed to the next
    def inertia(labels):
        return sum(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum() for k in set(labels))

    ours = [inertia(sentences.kmeans(torch.from_numpy(x), 4, torch.Generator().manual_seed(s)).numpy()) for s in range(10)]
    best = sklearn.cluster.KMeans(4, n_init=10, random_state=0).fit(x).inertia_
    assert min(ours) == pytest.approx(best, rel=1e-3) and np.mean(ours) < 1.2 * best
    same = sentences.kmeans(torch.ones(5, 3), 3, generator)  # fewer different rows than clusters
    assert len(set(same.tolist())) == 1


def test_clustering_resamples_the_seeds(l2v, monkeypatch):
    """Five seeds of ten find the classes, five one cluster: rows say 50 in every resample, other seeds would say otherwise."""
    gold = np.repeat([0, 1], 20)
    runs = iter([gold] * 5 + [np.zeros(40, dtype=int)] * 5)
    monkeypatch.setattr(sentences, "kmeans", lambda *_: torch.from_numpy(next(runs)))
    data = {"labels": [str(label) for label in gold], "texts": [f"text {i}" for i in range(40)]}
    value, draws = resample(sentences.score_clustering(l2v, data, None, None)["v_measure"])
    assert value == 50 and draws.std() == pytest.approx(100 * 0.5 / 10**0.5, rel=0.1), "ten seeds, half of them right"
    assert np.array_equal(draws, draws.round(-1)), "rows alone change nothing"


def test_clustering(l2v, files):
    rows = sentences.read_labelled(files / "clusters.tsv.xz")
    x = torch.from_numpy(l2v.encode(rows["texts"], normalize=True))
    found = [sentences.kmeans(x, 2, torch.Generator().manual_seed(seed)).numpy() for seed in range(10)]
    expected = 100 * np.mean([sklearn.metrics.v_measure_score(rows["labels"], labels) for labels in found])
    assert value(l2v, f"clustering:{files}/clusters.tsv.xz", "v_measure") == pytest.approx(expected, abs=1e-6)


def test_limit_draws_from_the_whole_file(tmp_path, l2v):
    lines = [
        f"{label}\t{text} {i}" for label, text in (("a", ANIMALS[0]), ("b", MONEY[0])) for i in range(40)
    ]  # sorted by label
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    task = f"classification:{tmp_path}/x.tsv,{tmp_path}/x.tsv"
    assert value(l2v, task, "accuracy", limit=20) == 100 and value(l2v, task, "macro_f1", limit=20) == 100
    train, test = sentences.read_classification(f"{tmp_path}/x.tsv,{tmp_path}/x.tsv")
    assert {test["labels"][i] for i in sentences.sample(80, 20)} == {"a", "b"}


def test_vectors_that_are_not_numbers(files):
    broken = LLM2Vec.from_pretrained("tiny", device="cpu")
    broken.decoder.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="vector of 'a man plays the guitar' is not finite"):
        evaluate(broken, [f"sts:{files}/sts.tsv"])


def test_the_same_numbers_from_mteb(l2v, files):
    mteb, datasets = pytest.importorskip("mteb"), pytest.importorskip("datasets")
    from mteb.abstasks import AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    from llm2vec_min.interop.mteb_adapter import MTEBEncoder

    documents, queries, qrels = sentences.read_retrieval(files)
    reranking = sentences.read_reranking(files / "rerank.jsonl")

    def retrieval(documents, queries, relevant, top=None):
        rows = ({"id": list(texts), "text": list(texts.values())} for texts in (documents, queries))
        corpus, asked = map(datasets.Dataset.from_dict, rows)
        split = {"corpus": corpus, "queries": asked, "relevant_docs": relevant, "top_ranked": top}
        return {"default": {"test": split}}

    names = [{f"{i}-{j}": t for j, t in enumerate(a + b)} for i, (_, a, b) in enumerate(reranking)]
    relevant = {f"q{i}": dict.fromkeys(list(names[i])[: len(a)], 1) for i, (_, a, _) in enumerate(reranking)}
    top = {f"q{i}": list(ids) for i, ids in enumerate(names)}
    pairs = {"sentence1": FIRST, "sentence2": SECOND}

    def made(base, kind, score, dataset, **fields):
        metadata = TaskMetadata(
            dataset={"path": "local/none", "revision": "1"}, name="Local", description="made for a test", type=kind,
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score=score,
        )  # fmt: skip

        def load_data(self, **ignored):
            self.dataset, self.data_loaded = dataset, True

        return type("Local", (base,), {"metadata": metadata, "load_data": load_data, **fields})()

    def table(**columns):
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict({**pairs, **columns})})

    asked = {f"q{i}": query for i, (query, _, _) in enumerate(reranking)}
    ranked = {id: text for ids in names for id, text in ids.items()}
    judged = {id: text for id, text in queries.items() if id in qrels}
    beir, candidates = retrieval(documents, judged, qrels), retrieval(ranked, asked, relevant, top)
    for task, metric, theirs in (
        ("sts:sts.tsv", "spearman", made(AbsTaskSTS, "STS", "cosine_spearman", table(score=GOLD), min_score=0, max_score=5)),
        ("pairs:pairs.tsv", "average_precision",
         made(AbsTaskPairClassification, "PairClassification", "cosine_ap", table(labels=[int(g > 3) for g in GOLD]))),
        ("retrieval:.", "ndcg_at_10", made(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", beir)),
        ("retrieval:.", "recall_at_100", made(AbsTaskRetrieval, "Retrieval", "recall_at_100", beir)),
        ("reranking:rerank.jsonl", "map", made(AbsTaskRetrieval, "Reranking", "map_at_1000", candidates)),
    ):  # fmt: skip
        (result,) = mteb.evaluate(MTEBEncoder(l2v), [theirs], cache=None, co2_tracker=False).task_results
        kind, name = task.split(":")
        # mteb rounds trec_eval's measures to five decimals
        assert value(l2v, f"{kind}:{files / name}", metric) == pytest.approx(100 * result.get_score(), abs=1e-3), task


# ---- The command ----


def test_command(files, tmp_path, capsys):
    tasks = [
        f"sts:{files}/sts.tsv", f"pairs:{files}/pairs.tsv", f"classification:{files}/train.tsv,{files}/test.tsv.gz",
        f"clustering:{files}/clusters.tsv.xz", f"retrieval:{files}", f"reranking:{files}/rerank.jsonl",
    ]  # fmt: skip
    main(["--tasks", *tasks, "--json", str(tmp_path / "out.json"), "--device", "cpu", "--instruction", "retrieval=Find:"])
    out = json.loads((tmp_path / "out.json").read_text())
    assert list(out) == tasks
    assert [list(metrics) for metrics in out.values()] == [
        ["spearman"], ["average_precision"], ["accuracy", "macro_f1"], ["v_measure"], ["ndcg_at_10", "recall_at_100"], ["map"],
    ]  # fmt: skip
    for metrics in out.values():
        for score in metrics.values():
            assert list(score) == ["value", "low", "high"]
            assert score["low"] is None or score["low"] <= score["value"] <= score["high"]
    without = [task.split(":")[0] for task, m in out.items() if next(iter(m.values()))["low"] is None]
    assert without == ["sts", "pairs", "retrieval", "reranking"], "fewer than ten independent rows"
    shown = capsys.readouterr().out
    assert f"{out[tasks[2]]['accuracy']['value']:.1f} [" in shown
    assert f"| reranking rerank | map | {out[tasks[-1]]['map']['value']:.1f} |" in shown
    assert "retrieval" in shown


def test_one_long_text_costs_its_own_length_only():
    """An array of texts would give every row the room of the longest: 2,000 x 400 kB."""
    texts = ["x" * 100_000, *(f"text {i}" for i in range(1_999))]
    tracemalloc.start()
    groups = sentences.numbered(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(groups)) == 2_000 and peak < 10e6
    assert list(sentences.numbered(["b", "a", "b"])) == [1, 0, 1]


def test_equal_documents_rank_by_their_id(l2v):
    """However the product of a matrix rounds: of 37 equal documents the one with the last id comes first, for 200 queries."""
    documents, queries = {f"{i:02}": "a cat sat down" for i in range(37)}, {str(i): f"dogs run {i} times" for i in range(200)}
    data = documents, queries, {id: {"36": 1} for id in queries}
    assert sentences.score_retrieval(l2v, data, None, None)["ndcg_at_10"].statistic(np.arange(200)) == 100
    rows = [(query, ["a cat sat down"], ["a cat sat down"] * 36) for query in queries.values()]
    every = sentences.score_reranking(l2v, rows, None, None)["map"].statistic(np.arange(200))
    assert every == pytest.approx(100 / 37), "all candidates are one tie"


def test_a_limit_that_leaves_one_label_has_no_score(l2v):
    labels = [str(i // 2) for i in range(200)]
    few = sentences.score_clustering(l2v, {"labels": labels, "texts": [f"text {i}" for i in range(200)]}, 2, None)
    data = np.ones(8), [f"a {i}" for i in range(8)], [f"b {i}" for i in range(8)]
    one = sentences.score_pairs(l2v, data, None, None, "average_precision")
    assert np.isnan(few["v_measure"].statistic(np.arange(2))) and np.isnan(one["average_precision"].statistic(np.arange(8)))


def test_undefined_scores_are_null(tmp_path, capsys):
    (tmp_path / "p.tsv").write_text("1\ta cat\ta dog\n0\ta cat\ta dog\n")  # one cosine
    main(["--tasks", f"sts:{tmp_path}/p.tsv", "--json", str(tmp_path / "o.json"), "--device", "cpu"])
    assert json.loads((tmp_path / "o.json").read_text())[f"sts:{tmp_path}/p.tsv"]["spearman"] == dict.fromkeys(
        ("value", "low", "high")
    )
    shown = capsys.readouterr().out
    assert "| undefined |" in shown and "undefined: all of the model's scores" in shown


CORPUS, QUERIES = '{"_id": "d", "text": "x"}\n', '{"_id": "q", "text": "x"}\n'
BEIR = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels.tsv": ""}


@pytest.mark.parametrize(
    ("task", "contents", "message"),
    [
        ("sts:a", {"a": "1\tb\tc\nnan\tb\tc\n"}, r"a:2: found 'nan\\tb\\tc', expected score<tab>sentence<tab>sentence"),
        ("sts:a", {"a": "1\tb\tc\n\nhigh\tb\tc\n"}, r"a:3: found 'high"),
        ("sts:a", {"a": "1\tb\n1\tb\tc\n"}, r"a:1: found"),
        ("sts:a", {"a": "1\tb\tc\n1_0\tb\tc\n"}, r"a:2: found '1_0"),
        ("sts:a", {"a": "1\tid7\tb\tc\n1\tb\tc\n"}, "a:1: found .*expected score<tab>sentence<tab>sentence"),
        ("sts:a", {"a": "1\tb\tc\n1\t\tc\n"}, "a:2: found"),
        ("sts:a", {"a": ""}, "a: 0 pairs, at least 2"),
        ("sts:a", {}, "a: not a readable text file"),
        ("sts:a.xz", {"a.xz": "plain"}, "a.xz: not a readable text file"),
        ("pairs:a", {"a": "1\tb\tc\n2\tb\tc\n"}, "a:2: found the label '2', expected 1 or 0"),
        ("pairs:a", {"a": "1\tb\tc\n1\tb\td\n"}, "a: every score is 1, expected different ones"),
        ("classification:a,b", {"a": "x\tt\ny\tt\n", "b": "x\tt\nz\tt\n"}, "b:2: found the label 'z'.* expected one of x, y"),
        ("classification:a,b", {"a": "x\tt\ny\tt\n", "b": "x\tt\n"}, "a:2: found the label 'y', which does not occur in .*b"),
        ("classification:a,b", {"a": "x\tt\ny\n", "b": "x\tt\n"}, "a:2: found 'y', expected label<tab>text"),
        ("classification:a", {"a": "x\tt\n"}, "expected two files, TRAIN,TEST"),
        ("classification:a,b", {"a": "x\tt\n", "b": "x\tu\n"}, "a: every label is 'x', expected at least 2 different ones"),
        ("classification:a,b", {"a": "label\tText\nx\tt\ny\tt\n", "b": "x\tt\n"}, "a:1: found the header 'label<tab>Text'"),
        ("clustering:a", {"a": "\n\n"}, "a: no text in it"),
        ("clustering:a", {"a": "x\tt\nx\tu\n"}, "a: 1 different labels on 2 lines, expected at least 2"),
        ("clustering:a", {"a": "x\tt\ny\tu\n"}, "a: 2 different labels on 2 lines"),
        ("retrieval:.", {"corpus.jsonl": CORPUS, "qrels.tsv": "q\td\t1"}, "queries.jsonl: not found, expected it plain or"),
        ("retrieval:.", BEIR | {"qrels.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\nq\te\t1\n"},
         "qrels.tsv:3: 'e' is no _id of corpus.jsonl"),
        ("retrieval:.", BEIR | {"qrels.tsv": "p\td\t1\n"}, "qrels.tsv:1: 'p' is no _id of queries"),
        ("retrieval:.", BEIR | {"qrels.tsv": "q\td\thigh\n"}, "qrels.tsv:1: found .*whole number"),
        ("retrieval:.", BEIR | {"qrels.tsv": "q\td\t" + "9" * 5000}, "qrels.tsv:1: found .*whole number"),
        ("retrieval:.", BEIR | {"qrels.tsv": "q\td\t1\nq\td\t0\n"}, "qrels.tsv:2: 'q' and 'd' were judged otherwise before"),
        ("retrieval:.", BEIR | {"qrels.tsv": "query-id\tcorpus-id\tscore\n"}, "no judgement"),
        ("retrieval:.", BEIR | {"qrels.tsv": "q\td\t0\n"}, "qrels.tsv: no document is relevant to any query"),
        ("retrieval:.", BEIR | {"corpus.jsonl": CORPUS * 2}, "corpus.jsonl:2: the _id 'd' was there"),
        ("retrieval:.", BEIR | {"corpus.jsonl": "\n"}, "corpus.jsonl: no text in it"),
        ("retrieval:.", BEIR | {"corpus.jsonl": '{"_id": 1, "text": "x"}'}, "corpus.jsonl:1: found"),
        ("retrieval:.", BEIR | {"corpus.jsonl": '{"_id": "d", "title": ["a"], "text": "x"}'}, "jsonl:1: the title is .'a'., expected"),
        ("reranking:a", {"a": '{"query": "x", "positive": ["y"], "negative": []}'}, "a:1: expected at least one text"),
        ("reranking:a", {"a": '{"query": "x", "positive": ["y"]}\n'}, 'a:1: found .* expected a JSON object with "query"'),
        ("retrieval:.", BEIR | {"queries.jsonl": '{"_id": "q", "text": "\\ud83d"}'}, "queries.jsonl:1: found"),
        ("reranking:a", {"a": "[]"}, "a:1: found"),
        ("reranking:a", {"a": "[" * 200_000}, "a:1: found"),
        ("reranking:a", {"a": ""}, "a: no query in it"),
        ("summarization:a", {}, "KIND one of sts, pairs, classification, clustering, retrieval, reranking, words"),
        ("sts", {}, "expected KIND:PATH"),
    ],
)  # fmt: skip
def test_bad_input_before_a_model_is_loaded(tmp_path, monkeypatch, task, contents, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LLM2Vec, "from_pretrained", lambda *a, **k: pytest.fail("loaded a model"))
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        main(["--tasks", task])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instruction", "sts"], "expected KIND=TEXT"),
        (["--instruction", "poems=x"], "--instruction poems: expected one of sts"),
        (["--instruction", "words=x"], "--instruction words: expected one of sts"),
        (["--limit", "0"], "--limit is 0, expected at least 2"),
        (["--model", "tiny", "--compare", "tiny"], "--model goes alone"),
        (["--json", "nowhere/out.json"], "its folder does not exist"),
        (["--json", "."], "--json .: is a folder, expected a file's name"),
        (["--plot", "ladder.foo"], "--plot ladder.foo: expected a name that ends in .png, .svg or .pdf"),
        (["--compare", "tiny", "tiny-mntp", "tiny"], "--compare tiny: named twice"),
        (["--instruction", "sts=a", "sts=b"], "--instruction: one text for each kind of task"),
        (["--instruction", "retrieval=a"], "--instruction retrieval: none of the --tasks is of this kind"),
        (["--layers", "1"], "--layers: none of the --tasks is of the kind words"),
        (["--json", "{sts}"], "sts.tsv: is a file of the --tasks too"),
        (["--ladder", "tiny-mntp", "--causal"], "--causal goes without --ladder"),
        (["--ladder", "tiny"], "expected a run's output folder, found a model without adapters"),
        (["--pooling", "median"], "argument --pooling: invalid choice: 'median'"),
    ],
)
def test_bad_flags(files, flags, message):
    flags = [flag.replace("{sts}", f"{files}/sts.tsv") for flag in flags]
    with pytest.raises(ValueError, match=message):
        main(["--tasks", f"sts:{files}/sts.tsv", *flags, "--device", "cpu"])


def test_a_folder_that_cannot_be_written_is_said_first(files, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="out.json: nothing can be written in its folder"):
        main(["--tasks", f"sts:{files}/sts.tsv", "--json", f"{files}/out.json"])


def test_scores_that_are_there_are_shown_when_another_model_fails(files, tmp_path, monkeypatch, capsys):
    from_pretrained = LLM2Vec.from_pretrained

    def load(name, **options):
        if name == "tiny-mntp":
            raise OSError("disk full")
        return from_pretrained(name, **options)

    monkeypatch.setattr(LLM2Vec, "from_pretrained", load)
    with pytest.raises(OSError, match="disk full"):
        main(["--compare", "tiny", "tiny-mntp", "--tasks", f"sts:{files}/sts.tsv", "--device", "cpu"])
    assert "| sts sts | spearman | " in capsys.readouterr().out


def test_a_sample_is_drawn_from_the_whole_file():
    rows = sentences.sample(1000, 10)
    assert len(set(rows)) == 10 and rows.max() > 100 and (np.diff(rows) > 0).all()
    assert sentences.sample(5, 10).tolist() == sentences.sample(5, None).tolist() == [0, 1, 2, 3, 4]


def test_limit_cuts_the_queries(l2v, files):
    scores = sentences.score_retrieval(l2v, sentences.read_retrieval(files), 2, None)
    assert all(len(score.groups) == 2 for score in scores.values())


@pytest.mark.parametrize(
    "task",
    ["sts:{}/sts.tsv", "pairs:{}/pairs.tsv", "classification:{}/train.tsv,{}/test.tsv.gz", "clustering:{}/clusters.tsv.xz"],
)
def test_an_instruction_goes_before_every_text(l2v, files, task, monkeypatch):
    seen, embed = set(), sentences.embed
    monkeypatch.setattr(sentences, "embed", lambda l2v, texts, told: seen.add(told) or embed(l2v, texts, told))
    evaluate(l2v, [task.format(files, files)], instructions={task.partition(":")[0]: "Tell the topic:"})
    assert seen == {"Tell the topic:"}


def test_kmeans_begins_in_every_cluster():
    """k-means++ draws a row by its distance to the nearest centre so far: far clusters are not left out."""
    rng = np.random.default_rng(0)
    places = 100 * rng.normal(size=(12, 3))
    x = torch.tensor(np.repeat(places, 10, axis=0) + 0.01 * rng.normal(size=(120, 3)), dtype=torch.float32)
    found = [sentences.kmeans(x, 12, torch.Generator().manual_seed(seed), most=1) for seed in range(10)]
    assert np.mean([len(set(labels.tolist())) for labels in found]) == 12
    assert all(len(set(labels[10 * i : 10 * i + 10].tolist())) == 1 for labels in found for i in range(12))


def test_logistic_regression_is_fitted_to_the_end_on_features_that_say_almost_the_same():
    """As states do: the last per cent of predictions takes many steps."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 6))
    y = (z @ rng.normal(size=(6, 8)) + 0.3 * rng.normal(size=(4000, 8))).argmax(1)
    x = (z @ rng.normal(size=(6, 64)) + 0.05 * rng.normal(size=(4000, 64))).astype(np.float32)
    theirs = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(), sklearn.linear_model.LogisticRegression(tol=1e-8, max_iter=5000)
    ).fit(x[:2000].astype(np.float64), y[:2000])
    ours = sentences.logistic_regression(x[:2000], y[:2000], x[2000:])
    assert np.mean(ours == theirs.predict(x[2000:])) >= 0.9975
