"""Schedule, loop, resume; both stages reproduce exactly and learn something."""

import gzip
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import llm2vec_min.model as model_file
from conftest import TEXTS
from llm2vec_min import LLM2Vec
from llm2vec_min.data import batches, iter_lines, pack_blocks, read_lines, read_pairs, read_split
from llm2vec_min.hub import resolve_data
from llm2vec_min.lora import add_lora
from llm2vec_min.training import distributed, mntp
from llm2vec_min.training import loop as loop_file
from llm2vec_min.training.loop import Loop, checksum
from llm2vec_min.training.mntp import held_out_score, train_mntp
from llm2vec_min.training.output import finish_output, identify, open_output, plan_output
from llm2vec_min.training.pretrain import held_out_loss, next_token_loss, pretrain
from llm2vec_min.training.settings import Settings, get_lr
from llm2vec_min.training.simcse import train_simcse

QUICK = dict(steps=6, batch_size=4, max_length=16, lr=1e-3, save_every=2, eval_every=100)


def train(model_folder, stage, output=None, **options):
    """A short run; returns (encoder, loop). Its folder keeps the checkpoints, as if it had been killed after the last step."""
    settings = Settings(**(QUICK | options.pop("settings", {})))
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", lm_head=True)
    torch.manual_seed(settings.seed)
    add_lora(l2v.decoder, r=4, dropout=options.pop("lora_dropout", 0.05))
    calls = 0

    def evaluate():
        nonlocal calls
        calls += 1
        return {"calls": calls}

    options = dict(output=output, quiet=True, evaluate=evaluate) | options
    if stage == "mntp":
        blocks = pack_blocks(l2v.tokenizer, TEXTS[:6] * 20, settings.max_length)
        loop = train_mntp(l2v, blocks[8:], blocks[:8], settings, **options)
    else:
        sentences = [f"{a[:9]} {b[:9]} {c}" for a in TEXTS[:3] for b in TEXTS[:3] for c in ("cat", "dog", "night")]
        loop = train_simcse(l2v, sentences, settings, **options)
    return l2v, loop


def weights(l2v):
    return {name: p.detach().clone() for name, p in l2v.decoder.named_parameters() if "lora_" in name}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_seed_reproduces_and_another_seed_does_not(model_folder, stage):
    one, two = (weights(train(model_folder, stage)[0]) for _ in range(2))
    assert same(one, two)
    assert not same(one, weights(train(model_folder, stage, settings=dict(seed=1))[0]))
    assert same(one, weights(train(model_folder, stage, settings=dict(eval_every=1))[0])), "evaluation changes nothing"


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_killed_run_resumes_to_the_same_weights(model_folder, stage, tmp_path, monkeypatch):
    whole = weights(train(model_folder, stage, tmp_path / "a" if (tmp_path / "a").mkdir() is None else None)[0])
    (tmp_path / "b").mkdir()
    from llm2vec_min import training

    update = training.Loop.update

    def die_at_step_5(self, *arguments):
        if self.step == 5:
            raise Killed
        update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Loop, "update", die_at_step_5)
        train(model_folder, stage, tmp_path / "b")
    assert (tmp_path / "b" / "checkpoint.safetensors").exists()
    resumed, loop = train(model_folder, stage, tmp_path / "b", resume=True)
    assert same(whole, weights(resumed))
    assert loop.start == 4
    steps = [[json.loads(line)["step"] for line in open(tmp_path / run / "metrics.jsonl")] for run in "ab"]
    assert steps[0] == steps[1]
    finish_output(tmp_path / "b", tmp_path / "b")
    assert not (tmp_path / "b" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_micro_batches_take_the_same_steps(model_folder, stage):
    """One pass of 8 rows or four of 2: the same losses and weights, but for rounding."""
    runs = []
    for size in (0, 2):
        settings = dict(steps=3, batch_size=8, micro_batch_size=size, attention_dropout=0.0)
        l2v, loop = train(model_folder, stage, settings=settings, lora_dropout=0.0)
        runs.append((weights(l2v), [record["loss"] for record in loop.history if "loss" in record]))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-4) and len(runs[0][1]) == 3
    for name in runs[0][0]:
        torch.testing.assert_close(runs[1][0][name], runs[0][0][name], atol=1e-5, rtol=1e-4)


def test_loss_falls(model_folder):
    _, loop = train(model_folder, "mntp", settings=dict(steps=40, lr=5e-3))
    losses = [record["loss"] for record in loop.history if "loss" in record]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_small_numbers_keep_their_digits(model_folder):
    _, loop = train(model_folder, "mntp", settings=dict(steps=1, lr=1.2345e-12))
    assert [record["lr"] for record in loop.history if "lr" in record] == [1.2345e-12]


def test_nothing_to_train(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    with pytest.raises(ValueError, match="no weight to train.*add_lora"):
        train_simcse(l2v, ["a", "b", "c", "d"], Settings(steps=1, batch_size=2))


def test_mntp_refuses_causal(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, causal=True, device="cpu", lm_head=True)
    with pytest.raises(ValueError, match="this one is causal"):
        train_mntp(l2v, np.zeros((4, 4), int), np.zeros((4, 4), int), Settings())


def test_mntp_without_its_head(model_folder, tmp_path):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    with pytest.raises(ValueError, match="needs the output head.*lm_head=True"):
        train_mntp(l2v, np.zeros((4, 4), int), np.zeros((4, 4), int), Settings(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("sentences", "batch_size"), [(["one"], 2), (["one", "two", "three"], 1)])
def test_simcse_without_negatives(model_folder, sentences, batch_size):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    with pytest.raises(ValueError, match=f"{len(sentences)} sentences in batches of {batch_size}: .* it takes two"):
        train_simcse(l2v, sentences, Settings(batch_size=batch_size), quiet=True)


def test_schedule():
    s = Settings(steps=10, lr=1.0)
    assert [round(get_lr(i, s), 6) for i in (0, 5, 9)] == [1.0, 0.5, 0.1]
    s = Settings(steps=12, lr=1.0, warmup_steps=3)
    assert [get_lr(i, s) for i in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1.0] and get_lr(11, s) > 0
    s = Settings(steps=10, lr=1.0, schedule="cosine")
    assert get_lr(0, s) == 1 and get_lr(5, s) == pytest.approx(0.5)


def test_not_finite_loss_stops(model_folder):
    with pytest.raises(ValueError, match="lower --lr"):
        train(model_folder, "simcse", settings=dict(lr=1e30, max_grad_norm=1e30))


# ---- steps that go wrong ----


def poison(monkeypatch, bad_steps, what="loss"):
    """Makes the gradient or the loss of some steps NaN."""
    from llm2vec_min import training

    update = training.Loop.update

    def poisoned(self, loss, tokens):
        if self.step in bad_steps:
            if what == "loss":
                loss = loss * float("nan")
            else:
                next(iter(self.parameters.values())).grad.view(-1)[3] = float("inf")
        update(self, loss, tokens)

    monkeypatch.setattr(training.Loop, "update", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped(model_folder, tmp_path, monkeypatch, capsys, what):
    poison(monkeypatch, {1, 2, 4}, what)
    l2v, loop = train(model_folder, "mntp", tmp_path, quiet=False)
    assert all(torch.isfinite(weight).all() for weight in weights(l2v).values())
    records = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [r["step"] for r in records if "skipped" in r] == [2, 3, 5] and [r["step"] for r in records if "loss" in r] == [
        1,
        4,
        6,
    ]
    assert "skipped (2 in a row)" in capsys.readouterr().out
    assert loop.optimizer.state[next(iter(loop.parameters.values()))]["step"] == 3, "no moment has seen a bad gradient"


def test_five_in_a_row_stop_and_the_last_good_state_is_saved(model_folder, tmp_path, monkeypatch):
    settings = dict(steps=12, save_every=100)
    with monkeypatch.context() as patch:
        poison(patch, range(3, 99))
        with pytest.raises(
            ValueError, match="5 steps in a row up to 8 were not finite.*lower --lr.*after step 3 is saved, for --resume"
        ):
            train(model_folder, "mntp", tmp_path, settings=settings)
    resumed, loop = train(model_folder, "mntp", tmp_path, settings=settings, resume=True)
    assert loop.start == 3
    assert same(weights(resumed), weights(train(model_folder, "mntp", settings=settings)[0]))


def test_a_run_that_ends_in_more_skipped_steps_than_others_has_no_result(model_folder, monkeypatch):
    poison(monkeypatch, {3, 4, 5})
    train(model_folder, "mntp", settings=dict(steps=6))
    with pytest.raises(ValueError, match="2 of 3 steps, the last ones, were not finite, so there is no result"):
        poison(monkeypatch, {1, 2})
        train(model_folder, "mntp", settings=dict(steps=3))


def test_checkpoints_by_the_clock(model_folder, tmp_path, monkeypatch):
    from llm2vec_min.training import loop

    saved = []
    monkeypatch.setattr(loop.Loop, "_save_checkpoint", lambda self, step: saved.append(step))
    train(model_folder, "mntp", tmp_path, settings=dict(save_every=0))
    assert saved == [], "two minutes have not passed"
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    train(model_folder, "mntp", tmp_path, settings=dict(save_every=0))
    assert saved == [1, 2, 3, 4, 5]
    saved.clear()
    train(model_folder, "mntp", tmp_path, settings=dict(save_every=3))
    assert saved == [3], "--save-every alone decides"


def test_last_two_checkpoints_are_kept(model_folder, tmp_path):
    train(model_folder, "mntp", tmp_path)  # saves after 2 and 4 of 6 steps
    steps = {}
    for path in tmp_path.glob("checkpoint*"):
        with safetensors.safe_open(path, "pt") as file:
            steps[path.name] = file.metadata()["step"]
    assert steps == {"checkpoint.safetensors": "4", "checkpoint-before.safetensors": "2"}


def test_checkpoint_of_another_torch_or_run(model_folder, tmp_path, monkeypatch, capsys):
    train(model_folder, "mntp", tmp_path)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("9.9.0"))
    train(model_folder, "mntp", tmp_path, resume=True, quiet=False)
    assert "this is 9.9.0: the run goes on, not bit for bit" in capsys.readouterr().out
    path = tmp_path / "checkpoint.safetensors"
    tensors = {name.replace("q_proj", "x_proj"): t for name, t in load_file(path).items()}
    about = {"step": "4", "sha256": checksum("4", tensors), "torch": "9.9.0"}
    save_file(tensors, path, metadata=about)
    with pytest.raises(
        ValueError,
        match="checkpoint.safetensors: has other weights, or of other shapes, than this run trains: parameter.layers",
    ):
        train(model_folder, "mntp", tmp_path, resume=True)


# ---- output folders ----


def test_output_folder(tmp_path):
    run = tmp_path / "run"
    assert plan_output(run, dict(stage="mntp", lr=1)) == run and not run.exists(), "a plan writes nothing"
    open_output(run, dict(stage="mntp", lr=1))
    assert json.loads((run / "train_args.json").read_text()) == dict(stage="mntp", lr=1)
    with pytest.raises(ValueError, match="an unfinished run; --resume continues it"):
        plan_output(run, {})
    assert plan_output(run, dict(stage="mntp", lr=1), resume=True) == run
    assert plan_output(run, dict(stage="mntp", lr=1, output="by another way"), resume=True) == run
    with pytest.raises(ValueError, match="lr was 1, is 2"):
        plan_output(run, dict(stage="mntp", lr=2), resume=True)
    # a flag that the version of then did not have
    assert plan_output(run, dict(stage="mntp", lr=1, schedule="linear", matryoshka=[], processes=1), resume=True) == run
    with pytest.raises(ValueError, match="temperature was 0.05, is 0.5"):
        plan_output(run, dict(stage="mntp", lr=1, temperature=0.5), resume=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run; --overwrite starts anew"):
        plan_output(run, {})
    beside = plan_output(run, dict(stage="mntp", lr=2), overwrite=True)
    assert beside == tmp_path / "run.part"
    beside.mkdir()
    (beside / "train_args.json").write_text('{"stage": "mntp"}')
    (beside / "of an earlier try").touch()
    open_output(beside, dict(stage="mntp", lr=2))
    assert [p.name for p in beside.iterdir()] == ["train_args.json"]
    assert json.loads((run / "train_args.json").read_text()) == dict(stage="mntp", lr=1), (
        "the old run is whole until the new one has ended"
    )
    assert plan_output(run, dict(stage="mntp", lr=2), resume=True) == beside
    finish_output(beside, run)
    assert json.loads((run / "train_args.json").read_text()) == dict(stage="mntp", lr=2) and not (run / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="holds files, but not a run$"):
            plan_output(other, {}, **flags)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "train_args.json.part").touch()  # as a run that was killed at its very start leaves it
    assert plan_output(tmp_path / "begun", {}, resume=True) == tmp_path / "begun"
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        plan_output(other / "thesis.txt", {})


def test_held_out_score_does_not_depend_on_the_batch(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", lm_head=True)
    blocks = pack_blocks(l2v.tokenizer, TEXTS[:6] * 8, 16)[:10]
    scores = [
        held_out_score(l2v, blocks, Settings(batch_size=batch, micro_batch_size=micro))
        for batch, micro in ((10, 0), (4, 0), (8, 3))
    ]
    for score in scores[1:]:
        assert score == pytest.approx(scores[0], rel=1e-5)


def test_held_out_logits_are_made_in_pieces_as_in_training(model_folder, monkeypatch):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", lm_head=True)
    blocks = pack_blocks(l2v.tokenizer, TEXTS[:6] * 8, 16)[:10]
    whole, rows = held_out_score(l2v, blocks, Settings(batch_size=10)), []
    l2v.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    monkeypatch.setattr(mntp, "LOGITS_AT_ONCE", 7 * l2v.lm_head.out_features)
    assert held_out_score(l2v, blocks, Settings(batch_size=10)) == pytest.approx(whole, rel=1e-5)
    assert len(rows) > 2 and max(rows) == 7
    rows.clear()
    monkeypatch.setattr(mntp, "LOGITS_AT_ONCE", 2**26)
    monkeypatch.setattr(mntp, "world_size", lambda: 5)
    held_out_score(l2v, blocks, Settings(batch_size=10))
    assert len(rows) == 5, "no more rows at once than one of five processes trains on"


# ---- data ----


def test_lines(tmp_path):
    import lzma

    (tmp_path / "a.txt").write_text("one\n\n  two  \n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n"four"\n')
    gzip.open(tmp_path / "c.txt.gz", "wt").write("five\n")
    lzma.open(tmp_path / "d.txt.xz", "wt").write("six\n")
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt.gz", "d.txt.xz")]
    assert read_lines(paths) == ["one", "two", "three", "four", "five", "six"]
    assert list(iter_lines(paths[0], keep_empty=True)) == ["one", "", "two"]
    (tmp_path / "e.json").write_text('{"text": "three"}\n')
    assert read_lines([tmp_path / "e.json"]) == ["three"]
    (tmp_path / "e.json").write_text('{\n  "text": "three"\n}\n')
    with pytest.raises(ValueError, match="e.json:1: expected a JSON string or an object"):
        read_lines([tmp_path / "e.json"])
    train, held = read_split([paths[0], paths[0], paths[1]], every=2)
    assert (train, held) == (["one", "one", "three"], ["two", "four"])


def test_lines_are_what_other_tools_count(tmp_path):
    """No byte order mark in the text, upper-case suffixes, and only "\\n" ends a line."""
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfa cat\nsat\n")
    assert list(iter_lines(tmp_path / "bom.txt")) == ["a cat", "sat"]
    (tmp_path / "BOM.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "a cat"}\r\n"sat"\n')
    assert list(iter_lines(tmp_path / "BOM.JSONL")) == ["a cat", "sat"]
    (tmp_path / "returns.txt").write_bytes(b"one\rtwo\r\nthree\n")
    assert list(iter_lines(tmp_path / "returns.txt")) == ["one\rtwo", "three"]
    assert resolve_data(tmp_path) == [tmp_path / "BOM.JSONL", tmp_path / "bom.txt", tmp_path / "returns.txt"]


def test_utf_16_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("A cat sat down.\n" * 200, encoding="utf-16")
    with pytest.raises(ValueError, match="a.txt: is UTF-16, expected UTF-8"):
        read_lines([tmp_path / "a.txt"])


def test_the_last_suffix_says_what_a_file_is(tmp_path):
    (tmp_path / "wiki.json.txt").write_text("not JSON")
    assert list(iter_lines(tmp_path / "wiki.json.txt")) == ["not JSON"]
    with gzip.open(tmp_path / "a.b.JSON.gz", "wt") as file:
        file.write('{"text": "one"}')
    assert list(iter_lines(tmp_path / "a.b.JSON.gz")) == ["one"]


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for name, column in (("a", "text"), ("b", "sentence"), ("c", "words")):
        parquet.write_table(pyarrow.table({column: ["one", "", " two "]}), tmp_path / f"{name}.parquet")
    assert read_lines([tmp_path / "a.parquet", tmp_path / "b.parquet"]) == ["one", "two"] * 2
    assert list(iter_lines(tmp_path / "a.parquet", keep_empty=True)) == ["one", "", "two"]
    with pytest.raises(ValueError, match="columns are .'words'., expected one named text or sentence"):
        read_lines([tmp_path / "c.parquet"])
    parquet.write_table(pyarrow.table({"text": [["one", "two"]]}), tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match="column text holds list<.*expected strings"):
        read_lines([tmp_path / "lists.parquet"])
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="numbers.parquet: column text holds int64, expected strings"):
        read_lines([tmp_path / "numbers.parquet"])
    (tmp_path / "d.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="d.parquet: not a readable parquet file"):
        read_lines([tmp_path / "d.parquet"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="reading parquet needs pyarrow: pip install pyarrow"):
        read_lines([tmp_path / "a.parquet"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "empty.txt: no text in it"),
        ("bad.jsonl", b'{"text": "a"}\n{"words": 1}\n', "bad.jsonl:2: expected a JSON string"),
        ("null.jsonl", b'{"text": null}\n', 'null.jsonl:1: expected .* a string "text", found \'{"text": null}\''),
        ("five.jsonl", b'"a"\n{"text": 5}\n', "five.jsonl:2: expected"),
        ("list.jsonl", b'["a"]\n', "list.jsonl:1: expected"),
        ("cut.jsonl", b'"a"\n{"text": "cut \\ud83d"}\n', "cut.jsonl:2: the text holds half of a surrogate pair at character 4"),
        ("bad.txt.gz", b"not gzip", "bad.txt.gz: not a readable text file"),
        ("bad.txt", b"\xfd\xfe\xff", "bad.txt: not a readable text file"),
    ],
)
def test_bad_data(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lines([tmp_path / name])
    with pytest.raises(ValueError, match="nowhere.txt: not a readable"):
        read_lines([tmp_path / "nowhere.txt"])


def test_pairs(tmp_path):
    (tmp_path / "p.tsv").write_text("5.0\ta\tb\n0.5\tc\td\n")
    scores, first, second = read_pairs(tmp_path / "p.tsv")
    assert scores.tolist() == [5, 0.5] and first == ["a", "c"] and second == ["b", "d"]
    (tmp_path / "p.tsv").write_text("5.0\ta\tb\nhigh\tc\td\n")
    with pytest.raises(ValueError, match=r"p.tsv:2: found 'high\\tc\\td', expected score"):
        read_pairs(tmp_path / "p.tsv")


def test_batches_cover_an_epoch_and_resume():
    order = batches(10, 3, seed=0)
    first = [next(order) for _ in range(7)]
    epoch = np.concatenate(first[:3])
    assert len(set(epoch.tolist())) == 9
    assert not np.array_equal(first[0], first[3])
    again = batches(10, 3, seed=0, start=5)
    np.testing.assert_array_equal(next(again), first[5])
    with pytest.raises(ValueError, match="2 examples, fewer than one batch of 3: lower --batch-size"):
        batches(2, 3, seed=0)


def test_batches_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    grouped, plain = (
        np.mean([np.ptp(lengths[next(order)]) for _ in range(60)])
        for order in (batches(1000, 16, 0, lengths=lengths), batches(1000, 16, 0))
    )
    assert grouped < plain / 5


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    """Copied as it is, one row would be spread over all."""

    def loop(rank, **options):
        model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, rank, bias=False)})
        return Loop(model, Settings(steps=4, save_every=1), tmp_path / "run", arguments={"stage": "own"}, quiet=True, **options)

    for step in (first := loop(1)):
        first.model["lora_A"](torch.ones(1, 4)).sum().backward()
        first.update(torch.tensor(1.0), 1)
        if step == 2:
            break
    with pytest.raises(ValueError, match="other weights, or of other shapes, than this run trains: parameter.lora_A.weight"):
        loop(3, resume=True)
    assert loop(1, resume=True).start == 2


def test_a_forgotten_backward_is_found():
    model = torch.nn.Linear(2, 2)
    loop = Loop(model, Settings(steps=2), quiet=True)
    with pytest.raises(ValueError, match="no weight has a gradient: call loss.backward"):
        for _ in loop:
            loop.update(model(torch.ones(1, 2)).sum(), 1)


def test_a_weight_that_one_steps_loss_does_not_reach():
    """Two heads in turn: the other one's gradient is zero, but what Adam remembers of it still moves it."""
    heads = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    for step in (loop := Loop(heads, Settings(steps=2, lr=0.1), quiet=True)):
        before = [head.weight.detach().clone() for head in heads]
        loss = heads[step](torch.ones(1, 2)).sum()
        loss.backward()
        loop.update(loss, 1)
        assert [torch.equal(a, head.weight) for a, head in zip(before, heads, strict=True)] == [False, step == 0]


def test_more_numbers_for_the_metrics(tmp_path):
    model = torch.nn.Linear(2, 2)
    loop = Loop(model, Settings(steps=2), tmp_path / "run", arguments={"stage": "own"}, quiet=True)
    for step in loop:
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        loop.update(loss, 1, scale=torch.nn.Parameter(torch.tensor(step + 0.5)), other=np.float32(2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["scale"], line["other"], line["step"]) for line in lines] == [(0.5, 2, 1), (1.5, 2, 2)]
    with pytest.raises(ValueError, match="lr is a number of the loop's own"):
        loop.update(loss, 1, lr=1.0)


def test_gradients_from_before_do_not_enter_the_first_step():
    """Of another loss, or of a step that failed."""
    runs = []
    for spoiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        if spoiled:
            model.weight.grad = torch.full((2, 2), 1000.0)
        for _ in (loop := Loop(model, Settings(steps=2, lr=0.1), quiet=True)):
            model(torch.tensor([[1.0, -1.0]])).sum().backward()
            loop.update(torch.tensor(1.0), 1)
        runs.append(model.state_dict())
    assert same(*runs)


def test_how_a_loop_leaves_the_model_and_the_random_numbers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in (loop := Loop(model, Settings(steps=2), quiet=True)):
        model(torch.ones(1, 2)).sum().backward()
        loop.update(torch.tensor(1.0), 1)
    assert not model.training and torch.equal(torch.rand(3), expected)
    with pytest.raises(Killed):
        for _ in Loop(model, Settings(steps=2), quiet=True):
            assert model.training
            raise Killed
    assert not model.training
    for _ in Loop(model, Settings(steps=2), quiet=True):
        break
    assert not model.training


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_gradient_checkpointing_is_a_setting(model_folder, stage, monkeypatch):
    calls, checkpoint = [], model_file.checkpoint
    monkeypatch.setattr(model_file, "checkpoint", lambda *args, **options: calls.append(1) or checkpoint(*args, **options))
    plain, _ = train(model_folder, stage)
    assert not calls
    l2v, _ = train(model_folder, stage, settings=dict(gradient_checkpointing=True))
    assert len(calls) == QUICK["steps"] * len(l2v.decoder.layers)
    assert same(weights(plain), weights(l2v))


def test_a_resumed_loop_keeps_buffers(tmp_path):
    """A head's running means, say: written in place, or assigned."""

    class Assigned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    def run(folder, stop=None, resume=False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), Assigned())
        loop = Loop(model, Settings(steps=4, save_every=2, lr=0.1), folder, resume=resume, quiet=True)
        for step in loop:
            if step == stop:
                break
            model(torch.randn(4, 2)).square().sum().backward()
            loop.update(torch.tensor(1.0), 1)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", stop=3)
    resumed = run(tmp_path / "part", resume=True)
    assert whole["1.num_batches_tracked"] == 4 and whole["2.mean"].all() and same(whole, resumed)


def test_a_run_that_has_nothing_left_to_learn_has_no_result(tmp_path):
    model = torch.nn.Linear(2, 2)
    loop = Loop(model, Settings(steps=7), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="exactly 0 in the last 5 of 7 steps: the model has collapsed"):
        for step in loop:
            ((step < 2) * model(torch.ones(1, 2)).sum()).backward()
            loop.update(torch.tensor(1.0), 1)


def test_a_loss_of_zero_is_a_result():
    """Every margin is met: nothing to learn, nothing wrong."""
    model = torch.nn.Linear(2, 2)
    loop = Loop(model, Settings(steps=7), quiet=True)
    for _ in loop:
        loss = 0 * model(torch.ones(1, 2)).sum()
        loss.backward()
        loop.update(loss, 1)
    assert loop.history[-1]["grad_norm"] == 0


def test_metrics_are_json_where_a_score_is_undefined(tmp_path):
    model = torch.nn.Linear(2, 2)
    loop = Loop(model, Settings(steps=1), tmp_path / "run", evaluate=lambda: {"spearman": float("nan")}, quiet=True)
    for _ in loop:
        model(torch.ones(1, 2)).sum().backward()
        loop.update(torch.tensor(1.0), 1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 0, "spearman": null}' and len(lines) == 3


def test_a_file_named_like_the_metrics_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("my own\n")
    with pytest.raises(ValueError, match="metrics.jsonl: is no file of a run"):
        next(iter(Loop(torch.nn.Linear(2, 2), Settings(steps=1), tmp_path, quiet=True)))
    assert (tmp_path / "metrics.jsonl").read_text() == "my own\n"
    (tmp_path / "metrics.jsonl").write_text('{"st')  # torn by a kill
    next(iter(Loop(torch.nn.Linear(2, 2), Settings(steps=1), tmp_path, quiet=True)))


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="schedule is 'constant', expected one of linear, cosine"):
        Settings(schedule="constant")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n", "a.csv: is a table, expected .txt"),
        ("a.tsv.gz", b"", "a.tsv.gz: is a table"),
        ("a.txt", b"BZh91AY&SY", "a.txt: holds compressed data .*bz2.*unpack it first"),
        ("a.txt", gzip.compress(b"a", mtime=0), "a.txt: holds compressed data .*: name it [.]{3}[.]gz"),
        ("a.txt", "a\n".encode("utf-32"), "a.txt: is UTF-32, expected UTF-8 .iconv -f utf-32"),
    ],
)
def test_files_that_are_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lines([tmp_path / name])


def test_ndjson_is_jsonl(tmp_path):
    (tmp_path / "a.ndjson").write_text('{"text": "one"}\n"two"\n')
    assert read_lines([tmp_path / "a.ndjson"]) == ["one", "two"]


def test_too_few_lines_to_hold_some_out(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="a.txt: no file has 3 lines, and of each file one line in 3 is held out"):
        read_split([tmp_path / "a.txt"], every=3)


def test_a_run_is_not_trained_over(model_folder, tmp_path):
    """Finished or not; a new one in its folder would go on, once resumed, from the old one's state."""
    folder = tmp_path / "run"
    l2v, _ = train(model_folder, "mntp", folder, settings=dict(save_every=2))
    l2v.base_model, l2v.adapters = str(model_folder), []

    def refused(message, *resumes):
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for resume in resumes:
            with pytest.raises(ValueError, match=message):
                train(model_folder, "mntp", folder, resume=resume)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    refused("holds an unfinished run; go on with it", False)
    l2v.save_run(folder, "mntp")
    finish_output(folder)
    assert not list(folder.glob("checkpoint*"))
    refused("holds a finished run or a model", False, True)
    folder = folder.rename(tmp_path / "run.part")
    refused("holds a finished run or a model", False)


def test_damaged_checkpoints(model_folder, tmp_path, monkeypatch):
    """One that cannot be read now stays; one that is torn makes way, never for a whole one; two torn ones for a new start."""
    folder = tmp_path / "run"
    train(model_folder, "mntp", folder, settings=dict(save_every=2))
    new, old = folder / "checkpoint.safetensors", folder / "checkpoint-before.safetensors"
    whole = new.read_bytes(), old.read_bytes()
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    add_lora(l2v.decoder, r=4)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", lambda *a, **k: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(ValueError, match="cannot be read now .full.; nothing was changed"):
            Loop(l2v.decoder, Settings(**QUICK), folder, resume=True, quiet=True)
    assert (new.read_bytes(), old.read_bytes()) == whole
    new.write_bytes(whole[0][:99])
    loop = Loop(l2v.decoder, Settings(**QUICK), folder, resume=True, quiet=True)
    assert loop.start == 2 and old.read_bytes() == whole[1] and not new.exists()
    old.write_bytes(whole[1][:99])
    _, loop = train(model_folder, "mntp", folder, resume=True)
    assert loop.start == 0 and loop.step == 5


def test_a_signal_to_another_process_stops_this_one_too(tmp_path, monkeypatch):
    """The sum over the processes says so: else one would save and end while the others wait for it."""
    model = torch.nn.Linear(2, 2)
    loop = Loop(model, Settings(steps=3), tmp_path / "run", arguments={"stage": "own"}, quiet=True)

    def all_reduce(tensors):
        tensors[1] += 1  # what the other one adds to this process's 0

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1, which is saved"):
        for _ in loop:
            model(torch.ones(1, 2)).sum().backward()
            loop.update(torch.tensor(1.0), 1)


def test_all_processes_begin_with_the_weights_of_the_first(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda tensor, src: sent.append((tensor, src)))
    model = torch.nn.Linear(2, 2)
    Loop(model, Settings(steps=3), quiet=True)
    assert [src for _, src in sent] == [0, 0]
    for (tensor, _), parameter in zip(sent, model.parameters(), strict=True):
        assert tensor.data_ptr() == parameter.data_ptr()


def test_adam_is_the_usual_one():
    loop = Loop(torch.nn.Linear(2, 2), Settings(steps=3, adam_beta2=0.95, weight_decay=0.1), quiet=True)
    assert loop.optimizer.defaults["betas"] == (0.9, 0.95) and loop.optimizer.defaults["weight_decay"] == 0.1


def test_no_line_is_lost_between_two_portions(model_folder):
    from llm2vec_min.tokenizer import Tokenizer

    tokenizer = Tokenizer(model_folder)
    each = len(tokenizer.encode(["a"])[0].ids)
    assert pack_blocks(tokenizer, ["a"] * 20_001, 1).size == 20_001 * each


def test_an_evaluation_is_without_dropout_and_gradients():
    model, seen = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()), []
    evaluate = lambda: seen.append((model.training, torch.is_grad_enabled())) or {}  # noqa: E731
    loop = Loop(model, Settings(steps=2, eval_every=1), evaluate=evaluate, quiet=True)
    for _ in loop:
        assert model.training
        model(torch.ones(1, 2)).sum().backward()
        loop.update(torch.tensor(1.0), 1)
    assert seen == [(False, False)] * 3


def test_a_column_with_gaps(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert list(iter_lines(tmp_path / "a.parquet", keep_empty=True)) == ["one", "", "two"]


def test_batches_of_similar_length_come_in_no_order_and_in_other_company_each_epoch():
    lengths = np.arange(1024)  # two pools of 32 batches
    order = batches(1024, 16, seed=0, lengths=lengths)
    epochs = [[next(order) for _ in range(64)] for _ in range(2)]
    rising = np.mean(np.diff([lengths[rows].mean() for rows in epochs[0]]) > 0)
    assert 0.25 < rising < 0.75, "not from short to long"
    first, second = ({frozenset(rows.tolist()) for rows in epoch} for epoch in epochs)
    assert not first & second


def test_five_skipped_steps_that_are_not_in_a_row_stop_nothing(model_folder, monkeypatch):
    poison(monkeypatch, {1, 2, 3, 5, 6})
    _, loop = train(model_folder, "mntp", settings=dict(steps=8))
    assert [r["step"] for r in loop.history if "loss" in r] == [1, 5, 8]


def test_the_clock_starts_anew_with_every_checkpoint(model_folder, tmp_path, monkeypatch):
    now, saved = [0.0], []
    update, save = loop_file.Loop.update, loop_file.Loop._save_checkpoint
    monkeypatch.setattr(loop_file, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))

    def slow(self, *arguments):
        now[0] += 50  # seconds; checkpoints are 120 apart
        update(self, *arguments)

    monkeypatch.setattr(loop_file.Loop, "update", slow)
    monkeypatch.setattr(loop_file.Loop, "_save_checkpoint", lambda self, step: saved.append(step) or save(self, step))
    train(model_folder, "mntp", tmp_path, settings=dict(steps=10, save_every=0))
    assert saved == [3, 6, 9]


def test_a_file_is_known_by_all_that_is_in_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 3 * 2**20)
    before = identify([str(path)])
    path.write_bytes(b"x" * (3 * 2**20 - 1) + b"y")
    assert identify([str(path)]) != before


def test_the_checkpoint_before_alone_is_still_a_run(model_folder, tmp_path):
    train(model_folder, "mntp", tmp_path)
    (tmp_path / "checkpoint.safetensors").rename(tmp_path / "checkpoint-before.safetensors")  # a kill between two renames
    with pytest.raises(ValueError, match="holds an unfinished run"):
        open_output(tmp_path)
    assert train(model_folder, "mntp", tmp_path, resume=True)[1].start == 4


def test_the_loss_of_pretraining_is_transformers(both):
    theirs, mine = both("llama")
    ids = torch.randint(257, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(next_token_loss(mine, ids), expected, rtol=1e-5, atol=1e-5)
        assert held_out_loss(mine, ids.numpy(), 4) == pytest.approx(expected.item(), rel=1e-5), "blocks count alike"


def test_micro_batches_of_pretraining_take_the_same_steps(both):
    blocks = np.random.default_rng(0).integers(0, 257, (24, 12))
    losses = []
    for size in (0, 4):  # of 6: 4 and 2
        settings = Settings(steps=3, batch_size=6, micro_batch_size=size, lr=1e-3)
        model = both("llama")[1].requires_grad_(True)
        losses.append([r["loss"] for r in pretrain(model, blocks, blocks[:6], settings, quiet=True).history if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
