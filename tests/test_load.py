"""Large and broken input files: bounded memory, lines counted, nothing fatal in the middle."""

import errno
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import embed
from llm2vec_min import LLM2Vec
from llm2vec_min import data as data_module
from llm2vec_min.data import iter_lines, read_lines

ROOT = Path(__file__).parent.parent
MEASURE = """
import sys
from pathlib import Path
import embed
from llm2vec_min import LLM2Vec
from llm2vec_min.data import iter_lines
from test_hostile import peak_memory

model, place, lines = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
LLM2Vec.from_pretrained(model, device="cpu").encode(["warm"] * 200)

before = peak_memory(reset=True)
assert [len(line) for line in iter_lines(place / "bomb.txt.xz")] == [2**24]
print("bomb", peak_memory() - before)

before = peak_memory(reset=True)
flags = ["--model", model, "--device", "cpu", "--max-length", "8", "--output", str(place / "x.npy")]
embed.main([*flags, "--input", str(place / "texts.txt")])
print("texts", peak_memory() - before)
"""


def measure(model_folder, place: Path, count: int) -> dict[str, float]:
    zeros = lzma.compress(b"a" * 2**26)
    (place / "bomb.txt.xz").write_bytes(zeros * 5)  # 320 MB in one line
    with open(place / "texts.txt", "w") as file:
        for number in range(count):
            file.write(f"text {number}\n")
            if number == count // 2:
                file.write("a long story " * 4_000_000 + "\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model_folder), str(place), str(count)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{count + 1} lines, 1 cut after 16 MB" in done.stdout
    rows = np.load(place / "x.npy", mmap_mode="r")
    few = [0, count // 2, count // 2 + 2, count]
    texts = [f"text {i}" for i in (0, count // 2, count // 2 + 1, count - 1)]
    expected = LLM2Vec.from_pretrained(model_folder, device="cpu", max_length=8).encode([*texts, "a long story " * 9])
    np.testing.assert_allclose(rows[[*few, count // 2 + 1]], expected, rtol=1e-5, atol=1e-5)
    return {
        name: float(mb)
        for name, mb in (line.split() for line in done.stdout.splitlines() if line.split()[0] in ("bomb", "texts"))
    }


def test_one_long_line_among_short_ones(model_folder, tmp_path):
    mb = measure(model_folder, tmp_path, 3000)
    assert mb["bomb"] < 200 and mb["texts"] < 200, mb


@pytest.mark.slow
def test_a_million_lines(model_folder, tmp_path):
    mb = measure(model_folder, tmp_path, 1_000_000)
    assert mb["texts"] < 400, mb


def test_empty_and_damaged_lines_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_LINE", 2**20)
    path = tmp_path / "text.txt"
    lines = [
        b"\xef\xbb\xbffirst",
        *[b"line %d" % i for i in range(300)],
        b"",
        b"  ",
        b"caf\xe9",
        b"long " * 2**20,
        "é".encode() * 2**20,
        b"last",
    ]
    path.write_bytes(b"\n".join(lines))
    read = read_lines([path])
    assert read[0] == "first" and read[301] == "caf\ufffd" and read[-1] == "last" and len(read) == len(lines) - 2
    assert [len(line.encode()) for line in read[302:304]] == [2**20, 2**20]
    said = capsys.readouterr().out
    assert f"{path}: 307 lines, 2 empty, 2 cut after 1 MB, 1 with bytes that are no UTF-8\n" == said
    list(iter_lines(path, keep_empty=True))
    assert capsys.readouterr().out == "", "reported once, not at every reading"


def test_a_zero_byte_far_in_ends_no_run(tmp_path):
    path = tmp_path / "web.txt"
    path.write_bytes(b"fine\n" * 9 + b"a \0 b\n")
    assert read_lines([path])[-1] == "a \0 b"


def test_mostly_damaged_is_no_text(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\n" * 98 + b"caf\xe9\n" * 2)
    with pytest.raises(ValueError, match="latin.txt: not a readable text file .2 of 100 lines are no UTF-8"):
        read_lines([path])


def test_a_full_disk_shows_before_the_first_chunk(model_folder, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    flags = [
        "--model",
        str(model_folder),
        "--device",
        "cpu",
        "--input",
        str(tmp_path / "texts.txt"),
        "--output",
        str(tmp_path / "x.npy"),
    ]

    def full(descriptor, offset, size):
        assert size == 128 + 2 * 64 * 4
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(LLM2Vec, "encode", lambda *a, **k: pytest.fail("a chunk was begun"))
        with pytest.raises(ValueError, match="x.npy: cannot be written .*No space left"):
            embed.main(flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt"]
    embed.main(flags)
    assert np.load(tmp_path / "x.npy").shape == (2, 64)
