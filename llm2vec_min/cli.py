"""What every command line shares: a mistake is one clear line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def refuse(message: str) -> NoReturn:
    """For `ArgumentParser.error`: argparse's complaint as the same one line, without the usage."""
    raise ValueError(message)


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main` with the command line's arguments; a ValueError is a user's mistake."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; a training run with --save-every continues by the same command with --resume", file=sys.stderr)
        sys.exit(130)
