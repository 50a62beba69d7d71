"""Files written whole or not at all: each beside its place first, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def read_json(path: str | Path) -> dict:
    """A JSON object from a file; ValueError that names the file when it holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: str | Path, value: dict) -> None:
    """Writes atomically: a killed run leaves the old file or the new one, never half of one."""
    beside = Path(f"{path}.part")
    beside.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)


def replace_folder(new: Path, output: Path) -> None:
    """Renames `new` to `output`. A folder there is moved aside first and removed last: one of the two is whole at any time."""
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.replace(output, old)
    os.replace(new, output)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes `output`'s place (and replaces a folder there) when the block ends well.

    Raises:
        ValueError: it cannot be written.
    """
    output = Path(output)
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        replace_folder(part, output)
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
