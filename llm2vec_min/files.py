"""Files written whole or not at all: each beside its place first, then renamed. Files of strangers read with care."""

from __future__ import annotations

import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

MAX_JSON = 8 * 2**20  # bytes; ten times the largest index of a decoder's shards
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 80
short = _repr.repr  # a value in an error message: one short line, whatever a stranger's file holds


def member(folder: str | Path, name: str) -> Path:
    """The path of a file in a folder that may come from a stranger.

    Raises:
        ValueError: the name, or a link of that name, leads out of the folder, or leads nowhere. (In the hub's cache every
            file is a link into the `blobs` beside `snapshots`.)
    """
    path = Path(folder) / name
    try:
        home, end = Path(folder).resolve(), path.resolve()
        leads_nowhere = path.is_symlink() and not path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle (before Python 3.13), a zero byte
        raise ValueError(f"{folder}: {short(name)} is no file's name ({error})") from None
    if leads_nowhere:
        raise ValueError(f"{folder}: {short(name)} is a link to what is not there")
    homes = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    if not any(end.is_relative_to(place) for place in homes):
        raise ValueError(f"{folder}: {short(name)} leads out of its folder, to {end}; if that is meant, put a copy there")
    return path


def check_file(path: str | Path) -> None:
    """ValueError for what can be read only once, or has no end."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(
            f"{path}: is a pipe, a device or a folder, expected a file (write what comes through a pipe to one first)"
        )


def read_json(path: str | Path) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: it holds anything else, more than 8 MB, a key twice in one object, NaN, or half a character; names the file.
    """

    def once(pairs: list[tuple]) -> dict:
        value: dict = {}
        for key, item in pairs:
            if key in value:
                raise ValueError(f"the key {short(key)} stands twice in one object")
            value[key] = item
        return value

    def no_number(name: str):
        raise ValueError(f"{name} is no number")

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON >> 20} MB")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800", half of a character, is JSON but no text
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def give_usual_mode(path: Path) -> None:
    """Gives a file or folder that safetensors or tempfile made for its owner alone the mode of any new one there."""
    beside = path.with_name(path.name + ".mode")
    with suppress(OSError):  # not every file system has modes
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode & 0o777
        beside.unlink()
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


def put(beside: str | Path, path: str | Path) -> None:
    """Renames a file that was written beside its place, both on the disk before the next line runs: after a power cut
    there is the old file or the new one."""
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
        folder = os.open(Path(path).parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def write_json(path: str | Path, value: dict) -> None:
    """Writes atomically: a killed run leaves the old file or the new one, never half of one."""
    beside = Path(f"{path}.part")
    beside.unlink(missing_ok=True)  # it may be a link, which writing would follow
    plain = lambda x: x.item() if isinstance(x, np.generic) else str(x)  # noqa: E731  numpy's numbers are numbers
    beside.write_text(json.dumps(value, indent=2, default=plain) + "\n", encoding="utf-8")
    put(beside, path)


def replace_folder(new: Path, output: Path) -> None:
    """Renames `new` to `output`. A folder there is moved aside first and removed last: one of the two is whole at any time."""
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))  # a name that nobody else has
    try:
        if output.exists():
            os.replace(output, aside / output.name)
        os.replace(new, output)
    finally:
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(output: str | Path, wait: bool = False) -> Iterator[None]:
    """Keeps a second command off the same output while this one lives; the system drops the lock with the process. Where no
    lock can be had (Windows, nothing can be written beside the output), there is none.

    Args:
        wait: for a command that holds it.
    Raises:
        ValueError: another command holds it.
    """
    output = Path(output)
    path = output.with_name(output.name + ".lock")
    while True:
        try:
            import fcntl

            # a file of that name that holds something is the user's: neither emptied nor removed, and no link is followed
            file = open(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
        except (ImportError, OSError) as error:
            if isinstance(error, PermissionError) and path.exists():
                raise ValueError(f"{output}: another user's command is writing it, or left {path} behind") from None
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except BlockingIOError:
            raise ValueError(f"{output}: another command is writing it now") from None
        except FileNotFoundError:
            held = False
        except OSError:
            held = True  # a file system without locks
        if held:
            break
        file.close()  # the command that ended just now has removed this very file: a lock on it keeps nobody off
    try:
        yield
    finally:
        if os.fstat(file.fileno()).st_size == 0:
            path.unlink(missing_ok=True)
        file.close()


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes `output`'s place (and replaces a folder there) when the block ends well.

    Raises:
        ValueError: it cannot be written.
    """
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=output.parent))
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error})") from None
    try:
        give_usual_mode(part)
        yield part
        replace_folder(part, output)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
