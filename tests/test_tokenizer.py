"""Ids as transformers' AutoTokenizer gives them; and only the text's own tokens are pooled."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from conftest import TEXTS, write_tokenizer
from llm2vec_min.tokenizer import Tokenizer


def test_same_ids_as_transformers(tokenizer_folder):
    automatic = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    from_file = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_folder / "tokenizer.json"))
    mine = Tokenizer(tokenizer_folder)
    for text, row in zip(TEXTS, mine.encode(TEXTS), strict=True):
        assert row.ids.tolist() == (from_file(text)["input_ids"] or [mine.pad_id]), text
        # transformers 5 rebuilds Llama 2's normalizer, and then no longer puts a space before a leading space
        if not text.startswith(" "):
            assert row.ids.tolist() == (automatic(text)["input_ids"] or [mine.pad_id]), text


@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip()])
@pytest.mark.parametrize(
    "prefix, instruction, suffix", [("", "", ""), ("", "Find it:", ""), ("[INST] ", "Find it; ", " [/INST]")]
)
def test_pools_the_text_alone(tokenizer_folder, text, prefix, instruction, suffix):
    tokenizer = Tokenizer(tokenizer_folder)
    (row,) = tokenizer.encode([text], instruction=instruction, prefix=prefix, suffix=suffix)
    whole = prefix + (instruction.strip() + " " if instruction else "") + text + suffix
    if not prefix and not instruction:
        inserted = tokenizer.backend.encode(text).special_tokens_mask
        own = [id for id, special in zip(row.ids, inserted, strict=True) if not special]
        assert tokenizer.decode(row.ids[row.pooled]).strip() == tokenizer.decode(own).strip()
    decoded = tokenizer.decode(row.ids[row.pooled])
    assert text.strip() in decoded or "�" in decoded
    assert len(decoded) <= len(text) + 1, "at most the space before the text comes along"
    assert tokenizer.backend.encode(whole).ids == row.ids.tolist()


def test_the_joining_space_is_pooled_where_it_is_a_token_of_its_own(tmp_path):
    """The text alone would begin with such a token, too."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, "smollm2"))  # digits stand alone, so the space before them does
    (row,) = tokenizer.encode(["1984"], instruction="Find:")
    assert tokenizer.decode(row.ids[row.pooled]) == " 1984" and row.pooled.sum() == 5


def test_a_token_across_the_seam_is_pooled(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, "llama-2"))  # merges "th" and "e"
    (row,) = tokenizer.encode(["e cat"], prefix="th")
    assert tokenizer.decode(row.ids[row.pooled]).strip() == "the cat"


def test_truncation_cuts_the_text_only(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    for limit in (5, 9, 100):
        (row,) = tokenizer.encode([TEXTS[0]], max_length=limit)
        assert row.ids.tolist() == theirs(TEXTS[0], truncation=True, max_length=limit)["input_ids"]
    around = dict(instruction="Find:", prefix="[", suffix="]")
    whole, cut = (tokenizer.encode([TEXTS[0]], max_length=limit, **around)[0] for limit in (None, 20))
    assert len(cut.ids) == 20 and cut.ids[-1] == whole.ids[-1]
    np.testing.assert_array_equal(cut.ids[: cut.pooled.argmax()], whole.ids[: whole.pooled.argmax()])
    assert 0 < cut.pooled.sum() < whole.pooled.sum()
    with pytest.raises(ValueError, match="no room for the text within max_length 4"):
        tokenizer.encode([TEXTS[0]], max_length=4, instruction="A very long instruction that fills everything:")


def test_collate_pads_left(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    encoded = tokenizer.encode(["a cat", "a cat sat on the mat"])
    batch = tokenizer.collate(encoded)
    short = len(encoded[0].ids)
    assert batch.padding_mask[0].tolist() == [False] * (batch.input_ids.shape[1] - short) + [True] * short
    assert batch.input_ids[0, -short:].tolist() == encoded[0].ids.tolist()
    assert not (batch.pool_mask & ~batch.padding_mask).any()
    assert tokenizer.collate(encoded[:1]).padding_mask is None, "no mask where nothing is padded"


def test_many_texts_are_tokenized_in_portions(tokenizer_folder, monkeypatch):
    """`tokenizers` keeps a hundred bytes for every token."""
    tokenizer, portions = Tokenizer(tokenizer_folder), []
    whole = tokenizer.encode_batch
    expected = tokenizer.encode(TEXTS)
    monkeypatch.setattr("llm2vec_min.tokenizer.AT_ONCE", 50)
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: portions.append(texts) or whole(texts))
    for row, again in zip(expected, tokenizer.encode(TEXTS), strict=True):
        assert row.ids.tolist() == again.ids.tolist() and row.pooled.tolist() == again.pooled.tolist()
    assert sum(portions, []) == TEXTS and len(portions) > 1
    assert all(sum(map(len, texts[:-1])) < 50 for texts in portions)


def test_saved_as_it_was_read(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "there")
    tokenizer = Tokenizer(tmp_path / "there")
    shutil.rmtree(tmp_path / "there")
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (Path(tokenizer_folder) / path.name).read_bytes()
    assert Tokenizer(tmp_path / "saved").backend.to_str() == tokenizer.backend.to_str()


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: not found"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer fails"):
        Tokenizer(tmp_path)


def test_mask_token(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    assert tokenizer.backend.id_to_token(tokenizer.mask_id()) == "_"
    with pytest.raises(ValueError, match="the mask token '<mask>' is not in the vocabulary"):
        tokenizer.mask_id("<mask>")


def test_padding_truncation_and_dropout_of_the_file_are_off(tmp_path):
    """A tokenizer.json may hold all three; each would change the ids of a text with its neighbours, or at random."""
    write_tokenizer(tmp_path, "llama-2")
    plain = Tokenizer(tmp_path)
    texts = ["a cat sat", "two men play chess on a wooden board in the park"]
    expected = [row.ids.tolist() for row in plain.encode(texts)]
    assert len({len(ids) for ids in expected}) == 2
    for change in ("padding", "truncation", "dropout"):
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        if change == "padding":
            backend.enable_padding(length=64)
        elif change == "truncation":
            backend.enable_truncation(4)
        else:
            backend.model.dropout = 0.9
        (tmp_path / change).mkdir()
        backend.save(str(tmp_path / change / "tokenizer.json"))
        assert [row.ids.tolist() for row in Tokenizer(tmp_path / change).encode(texts)] == expected, change


def test_an_added_word_is_no_special_token(tmp_path):
    backend = Tokenizer(write_tokenizer(tmp_path, "llama-2")).backend
    backend.add_tokens(["zebra"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert {backend.id_to_token(id) for id in tokenizer.special_ids} == {"<unk>", "<s>", "</s>"}, "MNTP may mask the word"


def test_a_text_of_which_nothing_would_be_left_is_refused(tokenizer_folder):
    tokenizer, around = Tokenizer(tokenizer_folder), dict(instruction="Find:", prefix="[", suffix="]")
    (whole,) = tokenizer.encode([TEXTS[0]], **around)
    least = len(whole.ids) - whole.pooled.sum() + 1
    assert tokenizer.encode([TEXTS[0]], max_length=least, **around)[0].pooled.sum() == 1
    with pytest.raises(ValueError, match="no room for the text"):
        tokenizer.encode([TEXTS[0]], max_length=least - 1, **around)
