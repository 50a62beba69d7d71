"""The real mteb package evaluates our encoder on tasks made here: one STS, one retrieval, one classification."""

import types

import numpy as np
import pytest

from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import cosine_scores, spearman
from llm2vec_min.interop import mteb_adapter
from llm2vec_min.interop.mteb_adapter import MTEBEncoder

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

FIRST = ["a man plays the guitar", "two dogs run", "the market fell", "it rains", "she reads a book", "he cooks rice"]
SECOND = ["a man is playing guitar", "two dogs are running", "a boy swims", "the sun shines", "a book is read", "the car"]
SCORES = [5.0, 4.8, 0.0, 1.0, 4.0, 0.2]


def metadata(name, kind, score, prompt=None):
    return TaskMetadata(
        dataset={"path": "local/none", "revision": "1"}, name=name, description="made for a test", type=kind,
        eval_splits=["test"], eval_langs=["eng-Latn"], main_score=score, prompt=prompt,
    )  # fmt: skip


class LocalSTS(AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman", "Retrieve semantically similar text")
    min_score, max_score = 0, 5

    def load_data(self, **ignored):
        rows = {"sentence1": FIRST, "sentence2": SECOND, "score": SCORES}
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})
        self.data_loaded = True


class LocalRetrieval(AbsTaskRetrieval):
    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10", {"query": "Given a question, retrieve an answer"})

    def load_data(self, **ignored):
        ids = [str(i) for i in range(len(FIRST))]
        corpus = datasets.Dataset.from_dict({"id": ids, "text": SECOND, "title": [""] * len(ids)})
        queries = datasets.Dataset.from_dict({"id": ids, "text": FIRST})
        split = {"corpus": corpus, "queries": queries, "relevant_docs": {i: {i: 1} for i in ids}, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class LocalClassification(AbsTaskClassification):
    metadata = metadata("LocalClassification", "Classification", "accuracy")
    samples_per_label, n_experiments = 4, 2

    def load_data(self, **ignored):
        texts = [f"{text} {i}" for i in range(6) for text in ("a dog barks loudly", "prices fell again")]
        split = datasets.Dataset.from_dict({"text": texts, "label": [0, 1] * 6})
        self.dataset = datasets.DatasetDict({"train": split, "test": split})
        self.data_loaded = True


@pytest.fixture(scope="module")
def l2v():
    return LLM2Vec.from_pretrained("tiny", device="cpu")


def test_three_tasks(l2v):
    encoder = MTEBEncoder(l2v, {"LocalClassification": "Classify the sentence:"})
    asked = []
    encode = l2v.encode
    l2v.encode = lambda texts, instruction=None, **options: asked.append(instruction) or encode(texts, instruction, **options)
    try:
        results = mteb.evaluate(encoder, [LocalSTS(), LocalRetrieval(), LocalClassification()], cache=None, co2_tracker=False)
    finally:
        del l2v.encode
    scores = {result.task_name: result.get_score() for result in results.task_results}
    told = [["Retrieve semantically similar text:", text] for text in FIRST + SECOND]
    vectors = l2v.encode(told, normalize=True)
    expected = spearman((vectors[:6] * vectors[6:]).sum(1), np.array(SCORES))
    assert scores["LocalSTS"] == pytest.approx(expected, abs=1e-6)
    assert scores["LocalRetrieval"] > 0.5 and scores["LocalClassification"] == 1.0
    assert {
        "Retrieve semantically similar text:",
        "Given a question, retrieve an answer:",
        "",
        "Classify the sentence:",
    } == set(asked)
    plain = spearman(cosine_scores(l2v, FIRST, SECOND), np.array(SCORES))
    assert np.isfinite(plain)


@pytest.mark.parametrize(
    ("prompt", "prompt_type", "expected"),
    [
        (None, None, ""),
        ("Find it", None, "Find it:"),
        ("Find it:", "query", "Find it:"),
        ("Find it", "document", ""),
        ({"query": "Ask;"}, "query", "Ask;"),
        ({"document": "x"}, "query", ""),
    ],
)
def test_instructions(l2v, prompt, prompt_type, expected):
    task = types.SimpleNamespace(name="T", prompt=prompt)
    assert MTEBEncoder(l2v).instruction(task, prompt_type) == expected
    assert MTEBEncoder(l2v, {"T": "Mine:"}).instruction(task, "query") == "Mine:"


def test_results_are_kept_by_what_makes_the_vectors(tmp_path):
    """mteb's cache gives the second encoder on one base its own score, not the first one's."""
    encoders = [
        LLM2Vec.from_pretrained("tiny", device="cpu", **options) for options in ({}, {}, {"causal": True}, {"pooling": "max"})
    ]
    metas = [MTEBEncoder(l2v).mteb_model_meta for l2v in encoders]
    assert metas[0].name == metas[1].name and len({(meta.name, meta.revision) for meta in metas}) == 3
    told = MTEBEncoder(encoders[0], {"LocalSTS": "Compare:"}).mteb_model_meta
    assert told.revision != metas[0].revision
    cache, scores = mteb.ResultCache(tmp_path), []
    for l2v in (encoders[0], encoders[2], encoders[0]):
        results = mteb.evaluate(MTEBEncoder(l2v), [LocalSTS()], cache=cache, co2_tracker=False)
        scores.append(results.task_results[0].get_score())
    assert scores[2] == pytest.approx(scores[0], abs=1e-5)


def test_unknown_task_is_refused_before_the_model_loads(tmp_path):
    with pytest.raises(ValueError, match="--tasks: 'Nope' not found"):
        mteb_adapter.main(["--model", str(tmp_path / "nowhere"), "--tasks", "Nope"])


def test_repeated_tasks_add_up(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: asked.extend(tasks) or [])
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        mteb_adapter.main(["--model", str(tmp_path / "nowhere"), "--tasks", "STS12", "--tasks", "STS13"])
    assert asked == ["STS12", "STS13"]
