"""What every command line shares: a mistake is one clear line and exit code 2."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

from .config import PRESETS
from .device import DTYPES

PACKAGE = Path(__file__).resolve().parent


def refuse(message: str) -> NoReturn:
    """For `ArgumentParser.error`: argparse's complaint as the same one line, without the usage."""
    raise ValueError(message)


def add_model_flags(
    parser: argparse.ArgumentParser,
    default: str | None = None,
    device: str = "the first GPU if there is one",
) -> None:
    """The flags of every command that uses an encoder: which one, and how it runs. Its complaints become one line."""
    parser.error = refuse
    shown = f" [{default}]" if default else ""
    parser.add_argument("--model", default=default, required=default is None,
                        help=f"a run's output folder, a checkpoint folder, a hub id or a preset ({', '.join(PRESETS)}){shown}")  # fmt: skip
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR",
                        help="PEFT folder or hub id to merge on top; give it again for the next")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights [bfloat16 on a GPU, float32 on the CPU]")
    parser.add_argument("--device", help=f"cpu, cuda, mps [{device}]")


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the command line's arguments. A ValueError that a check of this project raised is a user's mistake, told
    in a line; any other is a mistake in the code, and shows where."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal or pipe that is not UTF-8 stops nothing
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, SafetensorError) as error:  # a full disk is not our mistake either
        last = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(last.filename).resolve()
        is_ours = file.is_relative_to(PACKAGE) or file.parent == PACKAGE.parent  # train.py, embed.py
        is_check = is_ours and (last.line or "raise").startswith("raise")  # without the source there is no line
        if isinstance(error, ValueError) and not is_check:
            raise
        path = Path(sys.argv[0])
        print(f"{path.parent.name if path.stem == '__main__' else path.name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(str(error) or "stopped (train.py --resume and embed.py --input go on where they were)", file=sys.stderr)
        sys.exit(130)
