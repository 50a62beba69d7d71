"""Random damage to every kind of file: it is read, or refused by a ValueError of one line; nothing else ever happens.

`pytest -m fuzz`, about two minutes. Seeds count from 0 and stand in the failure; FUZZ_SECONDS=3600 looks longer.
"""

import copy
import gzip
import itertools
import json
import lzma
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from llm2vec_min import LLM2Vec
from llm2vec_min.data import iter_lines, read_pairs
from llm2vec_min.files import read_json
from llm2vec_min.lora import add_lora
from llm2vec_min.weights import adapter_of, load_adapter, load_decoder, save_adapter

pytestmark = pytest.mark.fuzz
SECONDS = float(os.environ.get("FUZZ_SECONDS", 10))  # for each target
ODD = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e308, 10**9, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "a", "0", "null",
    "../../x", "/etc/passwd", "\0", "\ud800", "é" * 99, "x" * 10_000, [], [0], [[]], {}, {"": 0}, {"a": {"a": {}}}, ["a", "b"], "mean", "tiny",
]  # fmt: skip
TEXTS = ["", "a cat", "\0", "emoji 🙂 and 漢字", "<s></s><unk>", "_ " * 50, "\u0301\u200b", "x" * 500]


def paths(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(item, (*path, key))


def damage_json(rng: random.Random, value):
    """One place of a JSON value replaced, removed, doubled or renamed."""
    places = [path for path in itertools.islice(paths(value), 20_000) if path]
    if not places:
        return copy.deepcopy(rng.choice(ODD))
    *way, last = rng.choice(places)
    parent = value
    for key in way:
        parent = parent[key]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(rng.choice(ODD))] = parent.pop(last)
    elif kind == 2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[last])
    else:
        parent[last] = copy.deepcopy(rng.choice(ODD))
    return value


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    data, at = bytearray(data), rng.randrange(max(1, len(data)))
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        del data[at : at + rng.randrange(1, 9)]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        data[at:at] = data[at : at + rng.randrange(1, 200)]
    else:
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(max(1, len(data)))] = rng.randrange(256)
    return bytes(data)


def damage(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        value = json.loads(data)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            value = damage_json(rng, value)
        data = json.dumps(value).encode("utf-8", "surrogatepass")
    elif path.suffix == ".safetensors" and rng.random() < 0.6:  # its header, with the length made to fit
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(damage_json(rng, json.loads(data[8 : 8 + size]))).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = damage_bytes(rng, data)
    path.write_bytes(data)


def rounds(place: Path, original: Path):
    """(seed's generator, a fresh copy of the folder) until the time is over."""
    end = time.monotonic() + SECONDS
    for seed in itertools.count():
        if time.monotonic() > end and seed > 20:
            return
        folder = place / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        yield seed, random.Random(seed), folder


def one_line(error: ValueError, folder: Path) -> bool:
    return "\n" not in str(error) and len(str(error)) < 3000 and str(folder) in str(error)


@pytest.fixture(scope="module")
def sharded(model_folder, tmp_path_factory):
    """A model in shards, with settings of its own."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    LLM2Vec.from_pretrained(model_folder, device="cpu").save(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = load_decoder(model_folder).state_dict()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "llm2vec_config.json",
        "a.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_model_files(sharded, tmp_path, file):
    read = 0
    for seed, rng, folder in rounds(tmp_path, sharded):
        damage(rng, folder / file)
        try:
            l2v = LLM2Vec.from_pretrained(folder, device="cpu")
            l2v.encode(TEXTS, "Find:")
            read += 1
        except ValueError as error:
            assert one_line(error, folder) or "no room for the text" in str(error), f"seed {seed}: {error}"
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert read, "some damage does no harm"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_files(model_folder, tmp_path, file):
    decoder = load_decoder(model_folder)
    add_lora(decoder, r=2)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", *adapter_of(decoder, "base"))
    for seed, rng, folder in rounds(tmp_path, tmp_path / "adapter"):
        damage(rng, folder / file)
        try:
            load_adapter(load_decoder(model_folder), folder)
        except ValueError as error:
            assert one_line(error, folder), f"seed {seed}: {error}"
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


def test_data_files(tmp_path):
    original = tmp_path / "data"
    original.mkdir()
    lines = "".join(f"{i} some text é 🙂\n" for i in range(50)).encode()
    records = "".join(json.dumps({"text": f"line {i}", "more": [i]}) + "\n" for i in range(50)).encode()
    (original / "a.txt").write_bytes(lines), (original / "b.jsonl").write_bytes(records)
    (original / "c.txt.gz").write_bytes(gzip.compress(lines)), (original / "d.jsonl.xz").write_bytes(lzma.compress(records))
    (original / "e.tsv").write_text("".join(f"{i}.5\tone {i}\ttwo {i}\n" for i in range(20)))
    (original / "f.json").write_text(json.dumps({"STSBenchmark": "Find:", "Other": {"query": "Q:", "passage": ""}}))
    for seed, rng, folder in rounds(tmp_path, original):
        path = rng.choice(sorted(folder.iterdir()))
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
        try:
            if path.suffix == ".tsv":
                read_pairs(path)
            elif path.suffix == ".json":
                read_json(path)
            else:
                assert all(isinstance(line, str) for line in iter_lines(path))
        except ValueError as error:
            assert one_line(error, folder), f"seed {seed}, {path.name}: {error}"
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {path.name}: {type(error).__name__}: {error}") from error


def test_instructions(model_folder):
    """Any text with any instruction and template: finite vectors, or the one line about max_length."""
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", max_length=24)
    end, pieces = time.monotonic() + SECONDS, [*TEXTS, "[INST] ", " ", "\n", ":", "</s>", "<0x0A>", "a" * 70]
    for seed in itertools.count():
        if time.monotonic() > end:
            return
        rng = random.Random(seed)
        text, instruction, prefix, suffix = (
            "".join(rng.choices(pieces, k=rng.randrange(4))) + "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD7FF), rng.randrange(0xE000, 0x110000)])) for _ in range(rng.randrange(5)))
            for _ in range(4)
        )  # fmt: skip
        l2v.template = (prefix, suffix)
        try:
            vector = l2v.encode(text, instruction)
            assert abs(vector).max() < 1e4, f"seed {seed}"
        except ValueError as error:
            assert "no room for the text within max_length 24" in str(error), f"seed {seed}: {error}"
