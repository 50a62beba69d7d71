"""The loss by hand in float64, with every kind of candidate; each option; what is refused."""

import gzip
import json
import lzma
import math
import re

import numpy as np
import pytest
import torch

import train
from conftest import TEXTS
from llm2vec_min import LLM2Vec
from llm2vec_min.lora import add_lora
from llm2vec_min.training import supervised
from llm2vec_min.training.loop import trainable_parameters
from llm2vec_min.training.settings import Settings
from llm2vec_min.training.supervised import candidate_mask, explain, filter_negatives, flatten, share_out, supervised_loss
from llm2vec_min.training.triplets import DataSet, Triplet, draw, read_triplets

PLAIN = [Triplet("q0", "p0", ("n0",)), Triplet("q1", "p1", ("n1",)), Triplet("q2", "p2", ("n2",))]
CASES = {
    "plain": PLAIN,
    "no negatives": [t._replace(negatives=()) for t in PLAIN],
    "lists": [Triplet("q0", "p0", ("a", "b", "c")), Triplet("q1", "p1"), Triplet("q2", "p2", ("d",))],
    "several positives of a query": [Triplet("q0", "p0", ("n0",)), Triplet("q0", "p1", ("n0",)), PLAIN[2]],
    "one positive of two queries": [Triplet("q0", "p", ("n0",)), Triplet("q1", "p", ("n1",)), Triplet("q2", "p2")],
    "a negative that answers another query": [
        Triplet("q0", "p0", ("p1",)),
        Triplet("q1", "p1", ("p0", "p2")),
        Triplet("q2", "p2"),
    ],
    "a negative that is another query": [Triplet("q0", "p0", ("q1",)), PLAIN[1], Triplet("q2", "q1")],
    "an instruction's wrong answer": [Triplet("q0", "p0", ("p1",), "A:"), Triplet("q0", "p1", ("p0",), "B:"), PLAIN[2]],
    "the same row twice": [PLAIN[0], PLAIN[0], PLAIN[1]],
}


def vector_of(text: str) -> np.ndarray:
    return np.random.default_rng([ord(letter) for letter in text]).normal(size=16)


def by_hand(triplets, temperature=0.02, in_batch=True, size=16) -> tuple[float, list[int]]:
    """The mean loss, and how many negatives each query has, pair by pair."""
    total, negatives = 0.0, []
    for i, (query, positive, own, instruction, _) in enumerate(triplets):
        right = [query] + [t.positive for t in triplets if (t.query, t.instruction) == (query, instruction)]
        wrong = [text for text in own if text not in right]
        for j, t in enumerate(triplets):
            if j != i and in_batch:
                wrong += [text for text in (t.positive, *t.negatives) if text not in right]
        q = vector_of(query)[:size]
        scores = []
        for text in [positive, *wrong]:
            v = vector_of(text)[:size]
            scores.append(q @ v / math.sqrt(q @ q) / math.sqrt(v @ v) / temperature)
        peak = max(scores)
        total += peak + math.log(sum(math.exp(s - peak) for s in scores)) - scores[0]
        negatives.append(len(wrong))
    return total / len(triplets), negatives


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_loss_by_hand(case, in_batch):
    triplets = CASES[case]
    vectors = torch.from_numpy(np.stack([vector_of(text) for _, text in flatten(triplets)])).float()
    compared = candidate_mask(triplets, in_batch)
    expected, negatives = by_hand(triplets, in_batch=in_batch)
    assert (compared.sum(dim=1) - 1).tolist() == negatives
    assert supervised_loss(vectors, compared).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_texts_that_differ_behind_the_cut_are_equal(model_folder, monkeypatch):
    """To the model they are one; only a wrong answer that it can tell apart is compared with."""
    head = " ".join(TEXTS[:3])
    rows = [Triplet("one", f"{head} x", ("other",)), Triplet("two", f"{head} y", ("none",))]
    seen, loss = [], supervised.supervised_loss
    monkeypatch.setattr(
        supervised, "supervised_loss", lambda vectors, compared, *more: seen.append(compared) or loss(vectors, compared, *more)
    )
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    add_lora(l2v.decoder, r=2)
    for length in (8, 512):
        settings = Settings(steps=1, batch_size=2, max_length=length)
        supervised.train_supervised(l2v, [DataSet("some", rows)], settings, quiet=True)
    cut, whole = (sorted(compared.tolist()) for compared in seen)
    assert cut == [[False, True, True, True], [True, False, True, True]] and whole == [[True] * 4] * 2


def test_negatives_that_are_one_string():
    with pytest.raises(ValueError, match="data set some: negatives is 'bad', expected a tuple of texts"):
        draw([DataSet("some", [Triplet("q", "p", "bad")] * 4)], Settings(batch_size=2))


def test_what_the_cases_hold():
    """The reference above does tell them apart."""
    numbers = {case: by_hand(triplets)[1] for case, triplets in CASES.items()}
    assert numbers["plain"] == [5, 5, 5] and numbers["lists"] == [6, 6, 6]
    assert numbers["several positives of a query"] == [4, 4, 5]
    assert numbers["one positive of two queries"] == [3, 3, 4]
    assert numbers["a negative that answers another query"] == [4, 4, 4]
    assert numbers["a negative that is another query"] == [4, 2, 3]
    assert numbers["an instruction's wrong answer"] == [4, 4, 5]
    assert by_hand(PLAIN, in_batch=False)[1] == [1, 1, 1]


def test_matryoshka_is_the_mean_over_sizes():
    vectors = torch.from_numpy(np.stack([vector_of(text) for _, text in flatten(PLAIN)])).float()
    expected = np.mean([by_hand(PLAIN, 0.1, size=size)[0] for size in (2, 8, 16)])
    assert supervised_loss(vectors, candidate_mask(PLAIN), 0.1, (2, 8)).item() == pytest.approx(expected, rel=1e-4)


def test_useless_vectors_lose_what_guessing_loses():
    triplets = CASES["several positives of a query"]
    loss = supervised_loss(torch.ones(3 + 6, 4), candidate_mask(triplets))
    assert loss.item() == pytest.approx((2 * math.log(5) + math.log(6)) / 3, rel=1e-6)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_text_is_encoded_somewhere(monkeypatch, processes):
    lengths = np.random.default_rng(0).integers(1, 50, 13)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(supervised, "world_size", lambda: processes)
        monkeypatch.setattr(supervised, "rank", lambda rank=rank: rank)
        mine, places = share_out(lengths)
        shares.append(mine)
        assert (np.diff(lengths[mine[: 13 // processes]]) <= 0).all()
    assert len({len(mine) for mine in shares}) == 1
    assert np.concatenate(shares)[places].tolist() == list(range(13)), "each finds its own vector"


# ---- with a model ----


@pytest.fixture
def l2v(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    torch.manual_seed(0)
    add_lora(l2v.decoder, r=4, dropout=0.0)
    for name, parameter in trainable_parameters(l2v.decoder).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return l2v


def some_triplets(count=24) -> list[Triplet]:
    """With lists of negatives, some rows without any, and instructions."""
    return [
        Triplet(
            f"{TEXTS[i % 4]} {i}",
            f"{i} {TEXTS[(i + 1) % 4][:20]}",
            tuple(f"no {n} {i}" for n in range(i % 3)),
            "Find:",
            i % 2 == 0,
        )
        for i in range(count)
    ]


def losses(loop):
    return [record["loss"] for record in loop.history if "loss" in record]


def run(l2v, triplets=None, **changes):
    settings = Settings(**(dict(steps=2, batch_size=8, max_length=32, lr=1e-3, temperature=0.1) | changes))
    return supervised.train_supervised(l2v, [DataSet("some", triplets or some_triplets())], settings, quiet=True)


def test_first_step_is_the_loss_of_the_encoders_own_vectors(l2v):
    """Template, instruction, pooling and direction are those of `encode`."""
    l2v.template, l2v.pooling, l2v.causal = ("[INST] ", " [/INST]"), "weighted_mean", True
    triplets = some_triplets(8)
    vectors = {}
    for t in triplets:
        vectors[t.query] = l2v.encode(t.query, t.instruction)
        for text in (t.positive, *t.negatives):
            vectors[text] = l2v.encode(text, t.instruction if t.symmetric else None)
    total = 0.0
    for t in triplets:
        candidates = [t.positive] + [text for other in triplets for text in (other.positive, *other.negatives)]
        cosines = [
            vectors[t.query].astype(float) @ vectors[text]
            / np.linalg.norm(vectors[t.query]) / np.linalg.norm(vectors[text]) / 0.1 for text in candidates
        ]  # fmt: skip
        total += math.log(sum(map(math.exp, cosines[1:]))) - cosines[0]
    loop = run(l2v, triplets, steps=1, max_length=512)
    assert losses(loop)[0] == pytest.approx(total / 8, rel=1e-4)


@pytest.mark.parametrize("size", [1, 5])
def test_gradcache_takes_the_same_steps(model_folder, size):
    weights = []
    for micro_batch_size in (0, size):
        l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
        torch.manual_seed(0)
        add_lora(l2v.decoder, r=4, dropout=0.0)
        loop = run(l2v, steps=3, micro_batch_size=micro_batch_size)
        weights.append((losses(loop), {n: p.detach() for n, p in trainable_parameters(l2v.decoder).items()}))
    assert weights[1][0] == pytest.approx(weights[0][0], rel=1e-4)
    for name, expected in weights[0][1].items():
        torch.testing.assert_close(weights[1][1][name], expected, atol=1e-5, rtol=1e-4)


def test_all_processes_filter_by_the_cosines_of_the_first(l2v, monkeypatch):
    """One rounding apart, and their batches would not be of one size."""
    triplets = some_triplets(9)
    own = filter_negatives(l2v, triplets, 0.95)
    monkeypatch.setattr(supervised.distributed, "broadcast", lambda tensors: [tensor.fill_(0.5) for tensor in tensors])
    told = filter_negatives(l2v, triplets, 0.95)
    assert own != triplets and all(not t.negatives for t in told), "0.5 is above 95 % of 0.5"


def test_filter_drops_what_is_nearer_than_its_share_of_the_positive(l2v):
    triplets = some_triplets(9)
    triplets[0] = Triplet("a cat sat", "a cat sat down", ("a cat sat", "1984", "a cat sat down here"))
    left = []
    for share in (0.5, 0.95):
        kept = filter_negatives(l2v, triplets, share)
        for before, after in zip(triplets, kept, strict=True):
            query = l2v.encode(before.query, before.instruction, normalize=True)
            instruction = before.instruction if before.symmetric else None
            positive, *negatives = l2v.encode([before.positive, *before.negatives], instruction, normalize=True)
            near = share * (query @ positive)
            expected = [t for t, v in zip(before.negatives, negatives, strict=True) if query @ v <= near]
            assert list(after.negatives) == expected and after[:2] == before[:2]
        left.append(sum(len(t.negatives) for t in kept))
        assert "a cat sat" not in kept[0].negatives
    assert left == sorted(set(left)) and left[-1] < sum(len(t.negatives) for t in triplets), "each share keeps another number"


def test_filter_reads_as_far_as_training_does(l2v):
    one, other = ("a cat sat down " * 8 + end for end in ("and slept", "1984 " * 8))
    rows = [Triplet("cats", one, (other,)), Triplet("cats", other, (one,))]
    left = {size: sum(len(t.negatives) for t in filter_negatives(l2v, rows, 0.9999, size)) for size in (8, 512)}
    assert left == {8: 0, 512: 1}, "cut at 8 tokens both texts are one; whole, one of them is nearer"


def test_filter_in_training_is_said_and_used(l2v, capsys, monkeypatch):
    batches, count = [], supervised.candidate_mask
    monkeypatch.setattr(supervised, "candidate_mask", lambda batch, *more: batches.append(batch) or count(batch, *more))
    triplets = [Triplet(f"{i} cats", f"{i} dogs", (f"{i} cats", "what?")) for i in range(8)]
    settings = Settings(steps=1, batch_size=8, max_length=32, filter_negatives=1.01)
    loop = supervised.train_supervised(l2v, [DataSet("some", triplets)], settings)
    said = re.search(r"(\d+) of 16 hard negatives left out: above 101% of the positive's cosine", capsys.readouterr().out)
    assert len(losses(loop)) == 1 and {sum(len(t.negatives) for t in batch) for batch in batches} == {16 - int(said[1])}
    assert int(said[1]) >= 8, "each query is a negative of its own"


def test_options_reach_the_loss(model_folder):
    first = set()
    for options in ({}, dict(in_batch_negatives=False), dict(matryoshka=(8, 16)), dict(temperature=0.05), dict(max_length=9)):
        l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
        add_lora(l2v.decoder, r=4)
        first.add(losses(run(l2v, steps=1, **options))[0])
    assert len(first) == 5


def test_explanation(l2v):
    words = explain(l2v, [Triplet("q", "p", ("n",), "Find:"), *PLAIN], Settings()).splitlines()
    assert words[0] == "instruction of the query: Find:"
    assert [line.split()[:2] for line in words[1:4]] == [[name, "cosine"] for name in ("query", "positive", "negative")]
    assert words[4] == "negatives of a query: 7 (3 other positives, 4 hard negatives, less what equals its query or positive)"
    assert words[5] == "loss of guessing: 2.079, the logarithm of 8 candidates"
    assert "negatives of a query: 0 to 3\n" in explain(l2v, CASES["lists"], Settings(in_batch_negatives=False))
    repeated = [Triplet("q", "p", ("q", "n")), *PLAIN]
    assert "  n" in explain(l2v, repeated, Settings()).splitlines()[2], (
        "not the one that repeats the query, which is not counted"
    )
    long = [[Triplet("a " * size, "b")] for size in (40, 60)]
    cut, whole = ({explain(l2v, rows, Settings(max_length=n)).splitlines()[1] for rows in long} for n in (9, 512))
    assert len(cut) == 1 and len(whole) == 2, "the texts are read as far as in training"
    l2v.template = ("<|user|>", "")
    assert explain(l2v, PLAIN, Settings()).splitlines()[0].startswith("query")


def test_shorter_vectors_are_the_first_numbers(l2v):
    whole = l2v.encode(TEXTS)
    np.testing.assert_array_equal(l2v.encode(TEXTS, dim=8), whole[:, :8])
    np.testing.assert_allclose(np.linalg.norm(l2v.encode("a", dim=8, normalize=True)), 1, rtol=1e-6)
    assert l2v.encode([], dim=8).shape == (0, 8)
    for dim in (0, 65, -1):
        with pytest.raises(ValueError, match=f"dim is {dim}, expected a number from 1 to 64"):
            l2v.encode(TEXTS, dim=dim)


def test_refusals_before_the_first_step(l2v):
    with pytest.raises(ValueError, match="--matryoshka 64: expected numbers from 1 to 63"):
        run(l2v, matryoshka=(8, 64))
    with pytest.raises(ValueError, match="data set some has 5 triplets, fewer than --batch-size 8"):
        run(l2v, some_triplets(5))
    with pytest.raises(ValueError, match="data set some has no hard negatives .* --no-in-batch-negatives leaves nothing else"):
        run(l2v, [t._replace(negatives=()) for t in some_triplets()], in_batch_negatives=False)
    with pytest.raises(ValueError, match="data set some has no hard negatives"):
        run(l2v, [t._replace(negatives=(t.query,)) for t in some_triplets()], in_batch_negatives=False)
    with pytest.raises(ValueError, match="no text in it is a wrong answer to one of its queries, nothing to tell apart"):
        run(l2v, [t._replace(positive="science", negatives=()) for t in some_triplets()])
    with pytest.raises(ValueError, match="nothing to tell apart"):
        run(l2v, [t._replace(query="one", negatives=(), instruction="") for t in some_triplets()])
    run(l2v, [t._replace(positive="science", negatives=(t.query,), instruction="") for t in some_triplets()], steps=1)
    alike = [t._replace(negatives=(t.query + "!", t.query)) for t in some_triplets()]
    with pytest.raises(ValueError, match="data set some, filtered, has no hard negatives .that differ from their query"):
        run(l2v, alike, in_batch_negatives=False, filter_negatives=0.01)
    sets = [DataSet("kept", some_triplets()), DataSet("lost", alike)]
    with pytest.raises(ValueError, match="data set lost, filtered,"):
        settings = Settings(steps=8, batch_size=8, max_length=32, in_batch_negatives=False, filter_negatives=0.9)
        supervised.train_supervised(l2v, sets, settings, quiet=True)
    with pytest.raises(ValueError, match="--matryoshka 8 8: expected each size once"):
        run(l2v, matryoshka=(8, 8))
    with pytest.raises(ValueError, match="leaves no room for the text within max_length 32"):
        run(l2v, [t._replace(instruction="many words " * 20) for t in some_triplets()])


# ---- data ----


def test_draw_takes_one_data_set_a_batch_by_size_and_ratio():
    sets = [DataSet("a", PLAIN * 100), DataSet("b", PLAIN * 20, 2.0), DataSet("c", PLAIN * 20)]
    order = draw(sets, Settings(steps=2000, batch_size=10))
    assert all(len(set(np.digitize(rows, [300, 360]))) == 1 and len(set(rows)) == 10 for rows in order)
    of_each = np.bincount([np.digitize(rows[0], [300, 360]) for rows in order]) / 2000
    assert of_each == pytest.approx([300 / 480, 120 / 480, 60 / 480], abs=0.03)
    epoch = np.concatenate([rows for rows in order if rows[0] < 300][:30])
    assert sorted(epoch) == list(range(300)), "each triplet once an epoch"
    assert not np.array_equal(order[0], draw(sets, Settings(steps=1, batch_size=10, seed=1))[0])


def write(path, *records):
    with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
        file.write("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_files(tmp_path):
    plain = write(tmp_path / "a.jsonl", {"query": " q ", "positive": "p", "negative": "n"}, "", {"query": "q", "positive": "p"})
    lists = write(
        tmp_path / "b.jsonl.gz",
        {"query": "q", "positive": ["x", "y"], "negative": ["n", "y", "x", "m"], "instruction": "Find:"},
    )
    other = write(tmp_path / "c.jsonl.xz", {"query": "q", "positive": "p", "negative": None})
    sets, equal = read_triplets([plain, lists, other], symmetric=["b"], ratios=["a=2", "c=0.5"])
    assert [(s.name, s.ratio) for s in sets] == [("a", 2), ("b", 1), ("c", 0.5)]
    assert sets[0].triplets == [Triplet("q", "p", ("n",)), Triplet("q", "p")]
    again = write(tmp_path / "again.jsonl", {"query": "q", "positive": "p", "negative": ["r", "n"]}, {"query": "q", "positive": "r"},
                  {"query": "s", "positive": "t", "negative": "r"})  # fmt: skip
    both = write(tmp_path / "both.jsonl", *({"query": "q", "positive": p, "negative": n, "instruction": i}
                                           for p, n, i in (("x", "y", "A:"), ("y", "x", "B:"), ("z", "n", " "))))  # fmt: skip
    assert [t.negatives for t in read_triplets([both])[0][0].triplets] == [("y",), ("x",), ("n",)], "each under its instruction"
    (others,), left_out = read_triplets([again])
    assert [t.negatives for t in others.triplets] == [("n",), (), ("r",)] and left_out == 1, "right for q in any line"
    assert sets[1].triplets == [Triplet("q", text, ("n", "m"), "Find:", True) for text in "xy"] and equal == 4
    everywhere, _ = read_triplets([plain, lists, lists, other], symmetric=[])
    assert all(t.symmetric for s in everywhere for t in s.triplets) and len(everywhere[1].triplets) == 4
    (tmp_path / "more").mkdir()
    same = write(tmp_path / "more" / "a.jsonl", {"query": "q", "positive": "p"})
    assert [s.name for s in read_triplets([plain, same])[0]] == [f"{tmp_path.name}/a", "more/a"]
    pair = [write(tmp_path / "more" / f"nli.{language}.jsonl", {"query": "q", "positive": "p"}) for language in ("en", "de")]
    assert [s.name for s in read_triplets(pair)[0]] == ["more/nli.en.jsonl", "more/nli.de.jsonl"], "each file is a data set"
    for folder in ("x", "y"):
        (tmp_path / folder / "more").mkdir(parents=True)
    far = [write(tmp_path / folder / "more" / "a.jsonl", {"query": "q", "positive": "p"}) for folder in ("x", "y")]
    with pytest.raises(ValueError, match="would both be the data set more/a; rename one, or its folder"):
        read_triplets(far)
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"query":' + "[" * 100_000)
    with pytest.raises(ValueError, match="deep.jsonl:1: is not JSON"):
        read_triplets([deep])
    deep.write_text('{"query": ' + "1" * 5000 + "}")  # more digits than Python reads
    with pytest.raises(ValueError, match="deep.jsonl:1: is not JSON"):
        read_triplets([deep])


def test_the_authors_folder(tmp_path, monkeypatch):
    folder = tmp_path / "echo-data"
    folder.mkdir()
    row = {"query": "q", "positive": "p", "negative": "n"}
    paths = [write(folder / f"{name}.jsonl", row) for name in ("allnli_split1", "allnli_split2", "nq", "mine")]
    sets, _ = read_triplets(paths)
    assert [s.name for s in sets] == ["allnli", "nq", "mine"]
    asymmetric, symmetric = sets[0].triplets
    assert asymmetric.instruction == "Given a premise, retrieve a hypothesis that is entailed by the premise;"
    assert symmetric.instruction == "Retrieve semantically similar text;"
    assert [t.symmetric for t in (asymmetric, symmetric, *sets[1].triplets)] == [False, True, False]
    assert sets[2].triplets[0].instruction == ""
    monkeypatch.chdir(folder)
    assert read_triplets([path.name for path in paths])[0] == sets, "also seen from inside"
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert read_triplets([f"../{path.name}" for path in paths])[0] == sets, "also from further down"
    with pytest.raises(ValueError, match="would both be the data set nq"):
        read_triplets([paths[2], write(folder / "nq.jsonl.gz", row)])
    with pytest.raises(ValueError, match="would both be the data set allnli"):
        read_triplets([*paths[:2], write(folder / "allnli_split2.jsonl.gz", row)])
    assert read_triplets([write(tmp_path / "nq.jsonl", row)])[0][0].triplets[0].instruction == "", "in that folder only"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"a.jsonl:2: is not JSON"),
        ("[1]", r"a.jsonl:2: holds a list, expected a JSON object"),
        ({"positive": "p"}, r'a.jsonl:2: "query" is missing; a line is {"query"'),
        ({"query": "q"}, r'a.jsonl:2: "positive" is missing'),
        ({"query": "q", "positive": "p", "negatives": ["n"]}, r'a.jsonl:2: has the field "negatives", .* expected "negative"'),
        ({"query": "q", "positive": "p", "hard_negative": "n"}, r'a.jsonl:2: has the field "hard_negative", which is not read'),
        ({"query": "q", "positive": "p", "negative_1": "n"}, r'several texts are a list in "negative"'),
        ({"query": "q", "positive": "p", "Instruction": "i"}, r'has the field "Instruction", .* expected "instruction"'),
        ({"query": "q", "positive": []}, r'a.jsonl:2: "positive" is \[\], expected a text or a list of texts'),
        ({"query": " ", "positive": "p"}, r'a.jsonl:2: "query" is \' \', expected a text; a line is'),
        ({"query": "q", "positive": "p", "negative": [""]}, r'a.jsonl:2: "negative" is \[\'\'\]'),
        ('{"query": "q", "positive": "half \\ud83d"}', 'a.jsonl:2: "positive" holds half of a surrogate pair'),
        ({"query": "q", "positive": "p", "negative": 3}, r'a.jsonl:2: "negative" is 3, expected a text or a list'),
        ({"query": ["q", "r"], "positive": "p"}, r'a.jsonl:2: "query" and "instruction" are one text each'),
        ({"query": "q", "positive": "p", "instruction": 3}, r'a.jsonl:2: "query" and "instruction" are one text each'),
        ({"query": "q", "positive": "p", "instruction": []}, r'a.jsonl:2: "query" and "instruction" are one text each'),
        ('{"query": "q", "positive": "p", "instruction": "\\ud83d"}', 'a.jsonl:2: "instruction" holds half of a surrogate'),
    ],
)
def test_bad_lines(tmp_path, line, message):
    write(tmp_path / "more.jsonl", {"query": "q", "positive": "p", "negative": "n", "negatives": 3, "Query": 4})
    assert read_triplets([tmp_path / "more.jsonl"])[0][0].triplets[0].negatives == ("n",), "more fields may stand beside"
    path = write(tmp_path / "a.jsonl", {"query": "q", "positive": "p"}, line)
    with pytest.raises(ValueError, match=message):
        read_triplets([path])


def test_bad_names_and_files(tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": "q", "positive": "p"})
    for ratio in ("b=2", "a=much", "a", "a=0", "a=-1", "a=inf", "a=nan"):
        with pytest.raises(ValueError, match=f"--ratio {ratio}: expected NAME=NUMBER, above 0; the data sets are a$"):
            read_triplets([path], ratios=[ratio])
    with pytest.raises(ValueError, match="--symmetric b: not a data set; they are a$"):
        read_triplets([path], symmetric=["b"])
    with pytest.raises(ValueError, match="--symmetric: none of these data sets has an instruction"):
        read_triplets([path], symmetric=[])
    with pytest.raises(ValueError, match="empty.jsonl: no triplet in it"):
        read_triplets([write(tmp_path / "empty.jsonl", "")])
    with pytest.raises(ValueError, match="nowhere.jsonl: not a readable text file"):
        read_triplets([tmp_path / "nowhere.jsonl"])


# ---- the command ----


@pytest.fixture
def flags(tmp_path, model_folder):
    records = [
        {"query": t.query, "positive": t.positive, "negative": [*t.negatives, t.positive], "instruction": "Find:"}
        for t in some_triplets()
    ]
    path = write(tmp_path / "some.jsonl", *records)
    return ["--stage", "supervised", "--model", str(model_folder), "--data", str(path), "--steps", "4", "--batch-size", "8",
            "--max-length", "32", "--device", "cpu", "--output", str(tmp_path / "run")]  # fmt: skip


def test_command_keeps_direction_pooling_and_template(flags, tmp_path, capsys):
    base = LLM2Vec.from_pretrained(flags[3], device="cpu", causal=True, pooling="last")
    base.template = ("[INST] ", " [/INST]")
    base.save(tmp_path / "start")
    flags[3] = str(tmp_path / "start")
    train.main(flags)
    out = capsys.readouterr().out
    assert "some: 24 triplets\n24 negatives equal a positive of their query: left out" in out and "loss of guessing" in out
    run = LLM2Vec.from_pretrained(tmp_path / "run", device="cpu")
    assert (run.causal, run.pooling, run.template) == (True, "last", ("[INST] ", " [/INST]"))
    arguments = json.loads((tmp_path / "run" / "train_args.json").read_text())
    assert arguments["temperature"] == 0.02 and arguments["warmup_steps"] == 300 and arguments["lr"] == 2e-4
    assert json.loads((tmp_path / "run" / "llm2vec_config.json").read_text())["stage"] == "supervised"


def test_flags_given_twice_add_up_and_a_batch_of_one_has_hard_negatives(flags, tmp_path):
    train.main([*flags, "--batch-size", "1", "--no-in-batch-negatives", "--matryoshka", "8", "--matryoshka", "16",
                "--symmetric", "some", "--symmetric", "some", "--steps", "1"])  # fmt: skip
    arguments = json.loads((tmp_path / "run" / "train_args.json").read_text())
    assert arguments["matryoshka"] == [8, 16] and arguments["symmetric"] == [["some"], ["some"]]


def test_killed_run_resumes_to_the_same_weights(flags, tmp_path, monkeypatch):
    flags += ["--save-every", "2", "--filter-negatives", "0.9", "--matryoshka", "8", "16", "--ratio", "some=2", "--symmetric",
              "--warmup-steps", "0", "--lr", "1e-2"]  # fmt: skip
    train.main(flags)
    whole = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    flags[flags.index("--output") + 1] = str(tmp_path / "killed")
    update = supervised.Loop.update

    def die_at_step_3(self, *arguments):
        if self.step == 3:
            raise KeyboardInterrupt
        update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised.Loop, "update", die_at_step_3)
        train.main(flags)
    train.main([*flags, "--resume"])
    assert (tmp_path / "killed" / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size", "50"], "data set some has 24 triplets, fewer than --batch-size 50"),
        (["--batch-size", "1"], "--batch-size is 1: the negatives are the other texts of the batch"),
        (["--filter-negatives", "-1"], "--filter-negatives is -1.0, expected a share"),
        (["--filter-negatives", "95"], "--filter-negatives is 95.0, expected a share of the positive's cosine, such as 0.95"),
        (["--attention-dropout", "0.1"], "--attention-dropout: is for --stage simcse, supervised does not read it"),
        (["--matryoshka", "99"], "--matryoshka 99: expected numbers from 1 to 63"),
        (["--ratio", "x=1"], "--ratio x=1: expected NAME=NUMBER"),
        (["--ratio", "some=1", "some=2"], "--ratio some=2: some has a ratio already"),
    ],
)
def test_mistakes(flags, argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main([*flags, *argv])


def test_data_is_needed_but_for_tiny(flags):
    del flags[4:6]
    with pytest.raises(ValueError, match="--data: give one or more .jsonl files of"):
        train.main(flags)


def test_the_seed_decides_which_data_sets_and_which_triplets():
    sets = [DataSet(name, PLAIN * 20) for name in "ab"]
    one, other = (np.array(draw(sets, Settings(steps=40, batch_size=10, seed=seed))) for seed in (0, 1))
    assert not np.array_equal(one[:, 0] < 60, other[:, 0] < 60)
    one, other = (draw(sets[:1], Settings(steps=1, batch_size=10, seed=seed))[0] for seed in (0, 1))
    assert not np.array_equal(one, other)
