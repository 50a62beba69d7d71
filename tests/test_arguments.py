"""What a command is told reaches what it is for: each flag of the commands that load an encoder, seen where it arrives."""

import json

import numpy as np
import pytest
import torch

import embed
import train
from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import __main__ as evaluation
from llm2vec_min.evaluation import doctor
from llm2vec_min.interop import export, mteb_adapter

MODEL = {"adapters": ["a", "b"], "dtype": "bfloat16"}
MODEL_FLAGS = ["--adapter", "a", "--adapter", "b", "--dtype", "bfloat16", "--device", "cpu"]


class Reached(Exception):
    """The end of what a test looks at."""


@pytest.fixture
def loaded(monkeypatch):
    """What `from_pretrained` was called with; what it gives is `tiny`."""
    tiny, calls = LLM2Vec.from_pretrained("tiny", device="cpu"), []

    def from_pretrained(name="tiny", **options):
        calls.append({"name": name} | options)
        return tiny

    monkeypatch.setattr(LLM2Vec, "from_pretrained", from_pretrained)
    return calls


def stop_at(monkeypatch, place, name) -> list:
    """Calls of `place.name`, the first of which ends the command."""
    calls = []

    def reached(*arguments, **options):
        calls.append((arguments, options))
        raise Reached

    monkeypatch.setattr(place, name, reached)
    return calls


def test_evaluation(loaded, monkeypatch, tmp_path):
    (tmp_path / "p.tsv").write_text("1\ta\tb\n2\tc\td\n")
    (tmp_path / "w.conll").write_text("a X\n\nb Y\n")
    calls = stop_at(monkeypatch, evaluation, "measure")
    tasks = [f"sts:{tmp_path}/p.tsv", f"words:{tmp_path}/w.conll,{tmp_path}/w.conll"]
    with pytest.raises(Reached):
        evaluation.main(["--model", "tiny", *MODEL_FLAGS, "--tasks", *tasks, "--causal", "--pooling", "max", "--max-length", "9",
                         "--limit", "5", "--layers", "1", "2", "--instruction", "sts=Find:"])  # fmt: skip
    assert loaded == [MODEL | {"name": "tiny", "device": "cpu", "causal": True, "pooling": "max", "max_length": 9}]
    ((_, options),) = calls
    expected = {"limit": 5, "layers": [1, 2], "instructions": {"sts": "Find:"}, "show_progress": True}
    assert options == expected


def test_the_direction_can_be_said_either_way(loaded, monkeypatch, tmp_path):
    (tmp_path / "p.tsv").write_text("1\ta\tb\n2\tc\td\n")
    stop_at(monkeypatch, evaluation, "measure")
    stop_at(monkeypatch, LLM2Vec, "encode")
    stop_at(monkeypatch, LLM2Vec, "keep_adapters")
    for flags, causal in ((["--causal"], True), (["--no-causal"], False), ([], None)):
        for call in (
            lambda: evaluation.main(["--model", "tiny", "--tasks", f"sts:{tmp_path}/p.tsv", *flags]),
            lambda: embed.main(["a", *flags]),
            lambda: train.main(["--stage", "simcse", "--output", str(tmp_path / "run"), *flags]),
        ):
            with pytest.raises(Reached):
                call()
            assert loaded.pop().get("causal") is causal


def test_embed(loaded, monkeypatch):
    calls = stop_at(monkeypatch, LLM2Vec, "encode")
    with pytest.raises(Reached):
        embed.main(["a", "b", "--model", "tiny", *MODEL_FLAGS, "--causal", "--pooling", "max", "--max-length", "9",
                    "--instruction", "Find:", "--batch-size", "3", "--dim", "5"])  # fmt: skip
    (found,) = loaded
    assert str(found.pop("device")) == "cpu"
    assert found == MODEL | {"name": "tiny", "causal": True, "pooling": "max", "max_length": 9}
    (((tiny, encoded), options),) = calls
    assert [row.ids.tolist() for row in encoded] == [row.ids.tolist() for row in tiny.tokenize(["a", "b"], "Find:")]
    assert options == {"batch_size": 3, "normalize": True, "dim": 5}


@pytest.mark.parametrize("adapter", [True, False])
def test_export(loaded, monkeypatch, tmp_path, adapter):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "spearman": 55.5}\n')
    calls = stop_at(monkeypatch, export, "export_model")
    flags = MODEL_FLAGS if adapter else MODEL_FLAGS[4:]
    with pytest.raises(Reached):
        export.main(["--model", str(tmp_path), *flags, "--output", "out", "--prompt", "query=Find:", "--normalize",
                     "--no-sentence-transformers", "--overwrite"])  # fmt: skip
    expected = {"adapters": ["a", "b"] if adapter else [], "dtype": "bfloat16", "device": "cpu"}
    assert loaded == [expected | {"name": str(tmp_path)}]
    ((_, output), options), *_ = calls
    scores = options.pop("scores")
    assert output == "out" and (scores is None if adapter else list(scores.values()) == [55.5]), "not this model's score"
    assert options == {
        "dtype": "bfloat16", "prompts": {"query": "Find:"}, "normalize": True, "sentence_transformers": False, "overwrite": True,
    }  # fmt: skip


def test_doctor(loaded, monkeypatch):
    calls = stop_at(monkeypatch, doctor, "examine")
    with pytest.raises(Reached):
        doctor.main(["--model", "tiny", *MODEL_FLAGS, "--tolerance", "0.25"])
    assert loaded == [MODEL | {"name": "tiny", "device": "cpu"}] and calls[0][1]["tolerance"] == 0.25


def test_mteb(loaded, monkeypatch, tmp_path):
    mteb = pytest.importorskip("mteb")
    (tmp_path / "i.json").write_text(json.dumps({"STS12": "Find:"}))
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: tasks)
    monkeypatch.setattr(mteb, "ResultCache", lambda folder: folder)
    calls = stop_at(monkeypatch, mteb, "evaluate")
    with pytest.raises(Reached):
        mteb_adapter.main(["--model", "tiny", *MODEL_FLAGS, "--tasks", "STS12", "--instructions", str(tmp_path / "i.json"),
                           "--output", "there"])  # fmt: skip
    assert loaded == [MODEL | {"name": "tiny", "device": "cpu"}]
    (((encoder, tasks), options),) = calls
    assert (tasks, options) == (["STS12"], {"cache": "there"})
    assert encoder.instructions == {"STS12": "Find:"}
    vectors = encoder.encode(
        [{"text": ["a cat", "two dogs run"]}], task_metadata=type("T", (), {"name": "STS12", "prompt": None})
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_deterministic(monkeypatch, tmp_path):
    stop_at(monkeypatch, train, "use_deterministic")
    flags = ["--output", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(Reached):
        train.main(["--deterministic", *flags])
    stop_at(monkeypatch, train, "run_stage")
    monkeypatch.setattr(train, "use_deterministic", lambda: pytest.fail("nobody asked"))
    with pytest.raises(Reached):
        train.main(flags)


@pytest.mark.parametrize("device, expected", [("cuda", torch.bfloat16), ("cpu", torch.float32), ("mps", torch.float32)])
def test_the_dtype_of_a_device(device, expected):
    from llm2vec_min.device import pick_dtype

    assert pick_dtype(None, torch.device(device)) == expected
    assert pick_dtype("float32", torch.device(device)) == torch.float32


@pytest.mark.parametrize("flags, expected", [([], None), (["--symmetric"], []), (["--symmetric", "a", "b"], ["a", "b"])])
def test_symmetric(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "a.jsonl").write_text("{}")
    calls = stop_at(monkeypatch, train, "read_triplets")
    with pytest.raises(Reached):
        train.main(["--stage", "supervised", "--data", str(tmp_path / "a.jsonl"), "--ratio", "a=2", *flags, "--eval", "",
                    "--output", str(tmp_path / "run"), "--device", "cpu"])  # fmt: skip
    assert calls == [(([str(tmp_path / "a.jsonl")], expected, ["a=2"]), {})]


def test_the_card_has_the_last_score_not_the_best(monkeypatch, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "spearman": 77.7}\n{"step": 2, "spearman": 55.5}\n')
    seen = []
    monkeypatch.setattr(LLM2Vec, "from_pretrained", lambda *a, **o: None)
    monkeypatch.setattr(export, "export_model", lambda *a, **o: seen.append(o["scores"]))
    export.main(["--model", str(tmp_path), "--output", "out"])
    assert [list(scores.values()) for scores in seen] == [[55.5]]
