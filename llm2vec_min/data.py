"""Text files to lines, packed blocks and batches; each batch is a pure function of the seed and the step."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .device import rank
from .files import check_file
from .tokenizer import Tokenizer

MAX_LINE = 16 * 2**20  # bytes
BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
PACKED = {b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"BZh91AY&SY": ".bz2", b"PK\x03\x04": ".zip", b"\x28\xb5\x2f\xfd": ".zst"}
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def iter_parquet(path: Path) -> Iterator[str]:
    """The strings of a .parquet file's column "text" or "sentence", read a batch at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    check_file(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = next((name for name in ("text", "sentence") if name in file.schema_arrow.names), None)
        if column is None:
            raise ValueError(f"{path}: columns are {file.schema_arrow.names}, expected one named text or sentence")
        kind = str(file.schema_arrow.field(column).type)
        if not kind.startswith(("string", "large_string", "dictionary<values=string", "dictionary<values=large_string")):
            raise ValueError(f"{path}: column {column} holds {kind}, expected strings")
        for batch in file.iter_batches(columns=[column]):
            yield from (value or "" for value in batch.column(0).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None


def numbered_lines(path: str | Path, report: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file, plain or compressed (.gz, .xz), stripped; never more than one in memory.

    A line longer than MAX_LINE is cut there, and bytes that are no UTF-8 are read as \ufffd (in a cut line left out): a few do not end
    a run.

    Args:
        report: print in one line at the end how many lines were empty, cut or damaged.
    Raises:
        ValueError: it is no file, cannot be read, is packed, UTF-16 or 32, or more than one line in a hundred is no UTF-8; names it.
    """
    number = empty = cut = damaged = 0
    check_file(path)
    try:
        with OPENERS.get(Path(path).suffix.lower(), open)(path, "rb") as file:
            while line := file.readline(MAX_LINE):  # in bytes, where only "\n" ends a line, as other tools count
                number += 1
                if is_cut := len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                if number == 1:
                    if packed := next((name for begins, name in PACKED.items() if line.startswith(begins)), None):
                        what = f"name it ...{packed}" if packed in OPENERS else "unpack it first"
                        raise ValueError(f"{path}: holds compressed data ({packed}), expected plain text: {what}")
                    for begins, name in BOMS.items():
                        if line.startswith(begins):
                            raise ValueError(f"{path}: is {name.upper()}, expected UTF-8 (iconv -f {name} -t utf-8)")
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if b"\0" in line:
                        raise ValueError(
                            f"{path}: holds a zero byte in its first line; is it UTF-16 (iconv -f utf-16 -t utf-8)?"
                        )
                try:
                    text = line.decode(errors="ignore" if is_cut else "strict")
                except UnicodeDecodeError:
                    text, damaged = line.decode(errors="replace"), damaged + 1
                text = text.strip()
                cut, empty = cut + is_cut, empty + (not text)
                yield number, text
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable text file ({error})") from None
    if damaged * 100 > number:
        raise ValueError(f"{path}: not a readable text file ({damaged} of {number} lines are no UTF-8)")
    kinds = {"empty": empty, f"cut after {MAX_LINE >> 20} MB": cut, "with bytes that are no UTF-8": damaged}
    if report and any(kinds.values()) and rank() == 0:
        print(f"{path}: {number} lines, {', '.join(f'{count} {what}' for what, count in kinds.items() if count)}")


def iter_lines(path: str | Path, keep_empty: bool = False, report: bool = False) -> Iterator[str]:
    """The lines of a .txt or .jsonl file (or .json, .ndjson: on each line a string, or an object with "text"), plain or
    compressed (.gz, .xz), or of a .parquet file's column "text" or "sentence", stripped, empty ones left out.

    Raises:
        ValueError: not a readable file of that kind; names the file and the line.
    """
    path = Path(path)
    kind = next((suffix for suffix in map(str.lower, reversed(path.suffixes)) if suffix not in OPENERS), "")
    if kind == ".parquet":
        yield from (text.strip() for text in iter_parquet(path) if keep_empty or text.strip())
        return
    if kind in (".csv", ".tsv"):
        raise ValueError(f"{path}: is a table, expected .txt (a text a line, as it is), .jsonl or .parquet")
    for number, line in numbered_lines(path, report):
        if kind in (".jsonl", ".json", ".ndjson") and line:
            line = _text_of(line, f"{path}:{number}").strip()
        if keep_empty or line:
            yield line


def _text_of(line: str, where: str) -> str:
    """The text of a JSON line: a string, or an object's "text"."""
    try:
        record = json.loads(line)
        text = record if isinstance(record, str) else record["text"]
        text.encode()  # half of a surrogate pair, as a cut string leaves it, is no text
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text holds half of a surrogate pair at character {error.start}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # ValueError: not JSON, or 5,000 digits
        raise ValueError(
            f'{where}: expected a JSON string or an object with a string "text", found {line.strip()[:60]!r}'
        ) from None
    return text


def read_lines(paths: list[str | Path]) -> list[str]:
    """All lines of some files; a file named twice counts twice.

    Raises:
        ValueError: a file is missing or the files hold no text.
    """
    lines = [line for path in paths for line in iter_lines(path, report=True)]
    if not lines:
        raise ValueError(f"{', '.join(map(str, paths))}: no text in it")
    return lines


def read_split(paths: list[str | Path], every: int) -> tuple[list[str], list[str]]:
    """Lines to train on, and every `every`-th line of each file held out: a file named n times counts n times in the
    first list and once in the second."""
    train, held_out = [], []
    for path in dict.fromkeys(paths):
        lines = read_lines([path])
        held_out += lines[every - 1 :: every]
        train += [line for number, line in enumerate(lines, 1) if number % every] * paths.count(path)
    if not held_out:
        names = ", ".join(map(str, dict.fromkeys(paths)))
        raise ValueError(
            f"{names}: no file has {every} lines, and of each file one line in {every} is held out; give more text"
        )
    return train, held_out


def read_pairs(path: str | Path) -> tuple[np.ndarray, list[str], list[str]]:
    """Scores (N,) and two lists of N sentences, from lines of score <tab> sentence <tab> sentence.

    Raises:
        ValueError: a line that is not of this form, fewer than two lines, or all with one score.
    """
    scores, first, second = [], [], []
    for number, line in numbered_lines(path):
        fields = line.split("\t")
        try:
            score, (a, b) = float(fields[0]), fields[1:]
            if not math.isfinite(score) or "_" in fields[0] or not a or not b:  # 1_0 is Python's way to write 10
                raise ValueError
        except ValueError:
            if not line:
                continue
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, expected score<tab>sentence<tab>sentence") from None
        scores.append(score), first.append(a), second.append(b)
    if len(scores) < 2:
        raise ValueError(f"{path}: {len(scores)} pairs, at least 2 are needed")
    if len(set(scores)) == 1:
        raise ValueError(f"{path}: every score is {scores[0]:g}, expected different ones: there is no order to find")
    return np.array(scores), first, second


def pack_blocks(tokenizer: Tokenizer, lines: list[str], block_size: int, what: str = "the text") -> np.ndarray:
    """Lines as blocks of equal length, (N, block_size) int32: each line tokenized with its special tokens, all ids
    in one row, cut; no document mask, no position reset, the remainder dropped (as the authors train MNTP).

    Args:
        what: the text's name in the error.
    Raises:
        ValueError: the text does not fill one block.
    """
    pieces = [np.zeros(0, dtype=np.int32)]
    for start in range(0, len(lines), 10_000):
        for encoding in tokenizer.encode_batch(lines[start : start + 10_000], offsets=False):
            pieces.append(np.array(encoding.ids, dtype=np.int32))
    ids = np.concatenate(pieces)
    if len(ids) < block_size:
        raise ValueError(
            f"{what} has {len(ids)} tokens, at least one block of {block_size} is needed: give more text, or lower --max-length"
        )
    return ids[: len(ids) // block_size * block_size].reshape(-1, block_size)


def batches(count: int, batch_size: int, seed: int, start: int = 0, lengths=None) -> Iterator[np.ndarray]:
    """Endless batches of indices below `count`, each item at most once an epoch (what fills no whole
    batch waits for the next), reshuffled every epoch, from batch `start` on.

    With `lengths` (tokens per item), items of similar length share a batch, so that little padding is computed:
    shuffled items are sorted within pools of 32 batches, then the batches are shuffled.

    Raises:
        ValueError: fewer items than one batch.
    """
    per_epoch = count // batch_size
    if per_epoch == 0:
        raise ValueError(
            f"the data has {count} examples, fewer than one batch of {batch_size}: lower --batch-size, or give more text"
        )
    return _batches(count, batch_size, per_epoch, seed, start, lengths)  # a generator would refuse only when first asked


def _batches(count, batch_size, per_epoch, seed, start, lengths) -> Iterator[np.ndarray]:
    epoch, skip = divmod(start, per_epoch)
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(count)[: per_epoch * batch_size]
        if lengths is not None:
            pools = np.split(order, range(32 * batch_size, len(order), 32 * batch_size))
            order = np.concatenate([pool[np.argsort(np.asarray(lengths)[pool], kind="stable")] for pool in pools])
        rows = order.reshape(per_epoch, batch_size)
        yield from rng.permutation(rows)[skip:]
        epoch, skip = epoch + 1, 0
