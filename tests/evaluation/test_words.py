"""Word states by hand, both readings; files; the probe."""

import lzma

import numpy as np
import pytest
import torch

from conftest import TEXTS, make_reference, write_tokenizer
from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import evaluate, words

COLUMNS = "-DOCSTART- -X- O\n\nThe DT B-NP\ncat NN I-NP\nsat VBD B-VP\n. . O\n  \n# NN B-NP\n"
UNIVERSAL = (
    "# text = vámonos al mar\n1-2\tvámonos" + "\t_" * 8 + "\n1\tvamos\tir\tVERB" + "\t_" * 6 + "\n2\tnos\tyo\tPRON" + "\t_" * 6
    + "\n2.1\tx\tx\tX" + "\t_" * 6 + "\n3\ta priori\tx\tADV" + "\t_" * 6 + "\n\n"
)  # fmt: skip


def test_files(tmp_path):
    (tmp_path / "a.conll").write_text(COLUMNS)
    assert words.read_words(tmp_path / "a.conll") == [
        (["The", "cat", "sat", "."], ["B-NP", "I-NP", "B-VP", "O"]), (["#"], ["B-NP"]),
    ]  # fmt: skip
    (tmp_path / "a.conllu.xz").write_bytes(lzma.compress(UNIVERSAL.encode()))
    assert words.read_words(tmp_path / "a.conllu.xz") == [(["vamos", "nos", "a priori"], ["VERB", "PRON", "ADV"])]


@pytest.mark.parametrize(
    ("names", "contents", "message"),
    [
        ("a", {"a": COLUMNS}, "expected two files, TRAIN,TEST"),
        ("a,b", {"a": COLUMNS, "b": "The DT B-NP\ncat\n"}, "b:2: found 'cat', expected columns"),
        ("a,b", {"a": COLUMNS, "b": "\n\n"}, "b: no sentence in it"),
        ("a,b", {"a": COLUMNS, "b": "The NOUN\n"}, "b: found the tags NOUN on 1 of 1 words, expected those of .*a: B-NP, B-VP"),
        ("a,b", {"a": "The O\n", "b": COLUMNS}, "b: found the tags B-NP, B-VP.* expected those of .*a: O"),
        ("a.conllu,b", {"a.conllu": "1\tx\ty\n", "b": COLUMNS}, "a.conllu:1: found .* ten columns"),
    ],
)
def test_bad_files(tmp_path, names, contents, message):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        words.read_probe(",".join(str(tmp_path / name) for name in names.split(",")))


@pytest.mark.parametrize("kind", ["llama-2", "llama-3", "smollm2"])
def test_states_by_hand(tmp_path, kind, monkeypatch):
    """Each word's tokens found from the text itself, the states of one sentence at a time without padding."""
    monkeypatch.setattr("llm2vec_min.encoder.MAX_TOKENS_CPU", 100)  # several batches
    make_reference("llama", vocab_size=600).save_pretrained(tmp_path)
    l2v = LLM2Vec.from_pretrained(write_tokenizer(tmp_path, kind), device="cpu", max_length=40)
    sentences = [text.split() for text in TEXTS if text.split()] + [["word"] * 60]
    layers = [0, 2, 3]
    ours = words.word_states(l2v, sentences, layers)
    row = 0
    for sentence in sentences:
        ids = l2v.tokenizer.backend.encode(" ".join(sentence)).ids[:40]
        hidden = l2v.decoder(torch.tensor([ids]), causal=False, all_layers=True)
        decoded = [l2v.tokenizer.backend.decode(ids[:n]) for n in range(len(ids) + 1)]
        if any("\N{REPLACEMENT CHARACTER}" in text for text in decoded):  # a prefix that ends within a character
            row += len(sentence)
            continue
        lengths = [len(text.replace(" ", "")) for text in decoded]  # letters seen after n tokens
        start = 0
        for word in sentence:
            mine = [n for n in range(len(ids)) if lengths[n] < start + len(word) and lengths[n + 1] > start]
            for layer in layers:
                for left in (False, True):
                    expected = [hidden[layer][0, max(n - left, 0)] for n in mine] or [torch.zeros(64)]
                    expected = torch.stack(expected).mean(0).detach().numpy()
                    np.testing.assert_allclose(ours[layer, left][row], expected, rtol=1e-4, atol=1e-4, err_msg=word)
            start, row = start + len(word), row + 1
    assert row == len(ours[3, False])


def test_probe_reads_what_the_state_holds(tmp_path):
    """Tags that follow from the word itself: read at the word nearly all right; one to the left of it, where the causal
    model has not yet seen it, far fewer."""
    rng = np.random.default_rng(0)
    kinds = {
        "B-ANIMAL": ["cat", "dog", "horse", "bird"],
        "B-MONEY": ["bank", "price", "tax", "loan"],
        "O": ["the", "of", "and", "with"],
    }

    def write(name, count):
        lines = []
        for _ in range(count):
            for _ in range(6):
                tag = rng.choice(list(kinds))
                lines.append(f"{rng.choice(kinds[tag])}\t{tag}")
            lines.append("")
        (tmp_path / name).write_text("\n".join(lines))

    write("train.conll", 80), write("test.conll", 30)
    task = f"words:{tmp_path}/train.conll,{tmp_path}/test.conll"
    l2v = LLM2Vec.from_pretrained("tiny", device="cpu", causal=True)
    L = l2v.decoder.config.num_hidden_layers
    scores = {name: s["value"] for name, s in evaluate(l2v, [task], layers=[1, L])[task].items()}
    both = ["token_accuracy", "span_f1", "token_accuracy_left", "span_f1_left"]
    assert list(scores) == both + [name + "_layer_1" for name in both]
    assert scores["token_accuracy"] > 97 and scores["span_f1"] > 97 and scores["token_accuracy_layer_1"] > 97
    assert scores["token_accuracy_left"] < 70 and scores["span_f1_left"] < 60
    for wrong in (99, -1):
        with pytest.raises(ValueError, match=f"--layers {wrong}: expected 0 .embeddings. to {L}"):
            evaluate(l2v, [task], layers=[wrong])


def test_conllu_under_another_name_is_refused(tmp_path):
    """Its numbers would be read as words, and _ as every tag: a perfect score."""
    (tmp_path / "a.conll").write_text(UNIVERSAL)
    with pytest.raises(ValueError, match=r"a.conll:\d+: found ten columns.*CoNLL-U, whose name must end in .conllu"):
        words.read_words(tmp_path / "a.conll")
    (tmp_path / "A.CONLLU").write_text(UNIVERSAL)
    (tmp_path / "b.conllu").write_text(UNIVERSAL)
    assert words.read_words(tmp_path / "A.CONLLU") == words.read_words(tmp_path / "b.conllu")
    (tmp_path / "c.conll").write_text("100\u00a0000 B-NUM\n")
    assert words.read_words(tmp_path / "c.conll") == [(["100\u00a0000"], ["B-NUM"])]


def test_no_spans_in_parts_of_speech(tmp_path):
    (tmp_path / "a.conllu").write_text(UNIVERSAL * 3)
    task = f"words:{tmp_path}/a.conllu,{tmp_path}/a.conllu"
    scores = evaluate(LLM2Vec.from_pretrained("tiny", device="cpu"), [task])[task]
    assert list(scores) == ["token_accuracy", "token_accuracy_left"] and scores["token_accuracy"]["value"] == 100


def test_limit_cuts_the_sentences(tmp_path, monkeypatch):
    (tmp_path / "w.conll").write_text("a X\nb Y\n\n" * 30)
    data = words.read_probe(f"{tmp_path}/w.conll,{tmp_path}/w.conll")
    l2v = LLM2Vec.from_pretrained("tiny", device="cpu")
    assert {len(score.groups) for score in words.score_words(l2v, data, 5, None).values()} <= {5, 10}
