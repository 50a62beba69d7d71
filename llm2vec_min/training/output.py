"""The folder that a run works in: planned, opened, resumed, finished. What is in it before the result:

train_args.json                 the exact arguments, so that --resume can tell another run
metrics.jsonl                   a line for every step and evaluation
checkpoint.safetensors          the state to resume from; checkpoint-before.safetensors is the one before
"""

from __future__ import annotations

import hashlib
import shutil
from fnmatch import fnmatch
from pathlib import Path

from ..files import check_file, read_json, replace_folder, write_json
from .settings import Settings

ARGUMENTS = "train_args.json"
METRICS = "metrics.jsonl"
OWN = ("config.json", "generation_config.json", "llm2vec_config.json", "adapter_config.json", "adapter_model.*", "model.safetensors",
       "model-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "tokenizer*", "*_tokens*.json", "vocab.*",
       "merges.txt", "chat_template.jinja", "README.md", "LICENSE*", ".gitattributes", ".DS_Store", ".tmp*", ARGUMENTS, METRICS,
       "checkpoint*.safetensors", "*.part")  # fmt: skip
OWN_FOLDERS = ("adapters", ".cache", ".ipynb_checkpoints")
FREE = ("output", "eval", "eval_every", "save_every")  # the weights do not depend on them
CHECKPOINT, BEFORE = "checkpoint.safetensors", "checkpoint-before.safetensors"  # the last two


def plan_output(output: str | Path, arguments: dict, *, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder a run is to work in; nothing is written yet. It is the output itself, or `OUTPUT.part` beside it while an
    earlier run stands there, which stays whole until `finish_output` puts the new one in its place.

    Raises:
        ValueError: the output already holds something, or `resume` finds files there that are no run, or one with other arguments.
    """
    output = Path(output).expanduser()
    beside = output.with_name(output.name + ".part")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file, expected a folder")
    work = beside if resume and is_run(beside) else output
    if not is_run(work):
        if is_foreign(work):
            raise ValueError(f"--output {work}: holds files, but not a run")
        return work
    if resume:
        check_resumed(work, arguments)
        return work
    if not overwrite:
        state = "a run" if is_finished(output) else "an unfinished run; --resume continues it"
        if is_run(beside):
            state += f", and {beside} the unfinished one that was to replace it; --resume continues that"
        raise ValueError(f"--output {output}: already holds {state}; --overwrite starts anew")
    if guests := sorted(path.name for path in output.iterdir() if not is_own(path)) if output.is_dir() else []:
        raise ValueError(
            f"--output {output}: --overwrite would remove what is no part of the run: {', '.join(guests[:5])}"
            f"{' ...' if len(guests) > 5 else ''}; move it, or take another folder"
        )
    return beside


def check_resumed(work: Path, arguments: dict) -> None:
    """ValueError if there is a run in `work` that was started with other arguments."""
    if not is_run(work):
        return
    # a setting that its version did not have is taken for the default
    before = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(Settings()).items()} | read_json(work / ARGUMENTS)
    if changed := [k for k in before if k in arguments and k not in FREE and before[k] != arguments[k]]:
        found = ", ".join(f"{name} was {before[name]!r}, is {arguments[name]!r}" for name in changed)
        raise ValueError(f"--resume: {work} was started with other arguments: {found}; give those it was started with")


def is_run(folder: Path) -> bool:
    try:
        return (folder / ARGUMENTS).is_file() and "stage" in read_json(folder / ARGUMENTS)
    except ValueError:
        return False


def is_own(path: Path) -> bool:
    """By its name something that a run writes into its folder, or the system or the hub beside it."""
    return path.name in OWN_FOLDERS if path.is_dir() else any(fnmatch(path.name, pattern) for pattern in OWN)


def is_metrics(path: Path) -> bool:
    """Its first line says a step, or it was cut off there."""
    with open(path, "rb") as file:
        line = file.readline(2**16)
    start = b'{"step": '
    return line.startswith(start) or start.startswith(line)


def is_foreign(folder: Path) -> bool:
    """It holds more than what a run that was killed at its very start has left."""
    return folder.is_dir() and any(path.name != ARGUMENTS + ".part" for path in folder.iterdir())


def is_finished(work: Path) -> bool:
    """config.json is written last, and only then is the checkpoint removed."""
    return (work / "config.json").is_file() and not (work / CHECKPOINT).exists()


def open_output(work: Path, arguments: dict | None = None) -> None:
    """Makes a run's folder, once every check has passed, and notes the exact arguments in it.

    Raises:
        ValueError: it cannot be written, or holds a run or a model.
    """
    # what an earlier try to replace a run has left
    if work.name.endswith(".part") and work.is_dir() and work.with_name(work.name.removesuffix(".part")).is_dir():
        if not is_run(work) and is_foreign(work):
            raise ValueError(f"--output: {work} is in the way and is no run of ours; move it")
        shutil.rmtree(work, ignore_errors=True)
    if has_checkpoint(work):
        raise ValueError(f"{work}: holds an unfinished run; go on with it (--resume, resume=True) or take another folder")
    if is_finished(work):
        raise ValueError(f"{work}: holds a finished run or a model; take another folder, or move it")
    if (work / METRICS).is_file() and not is_metrics(work / METRICS):
        raise ValueError(f"{work / METRICS}: is no file of a run; a run would write its own here: take another folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / METRICS).unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        if arguments is not None:
            write_json(work / ARGUMENTS, arguments)
    except OSError as error:
        raise ValueError(f"--output {work}: cannot be written ({error})") from None


def finish_output(work: str | Path, output: str | Path | None = None) -> None:
    """The run's result is saved in `work`: puts it in its place, `output`, if that is another, and drops the checkpoint, which
    is no longer needed."""
    work, output = Path(work).expanduser(), Path(output or work).expanduser()
    if work != output:
        replace_folder(work, output)
    # what a kill has left beside a file of the run (safetensors writes into .tmp files), and last the checkpoint, which
    # `is_finished` looks for
    left = [path for path in output.glob("*.part") if path.with_suffix("").exists() and path.is_file()]
    left += [path for path in output.glob(".tmp??????") if path.is_file()]
    for path in (*left, output / (CHECKPOINT + ".part"), output / BEFORE, output / CHECKPOINT):
        path.unlink(missing_ok=True)


def has_checkpoint(work: Path) -> bool:
    return any((work / name).is_file() for name in (CHECKPOINT, BEFORE))


def identify(paths: list[str]) -> dict[str, str]:
    """What is in each file, for the run's arguments: a resumed run must read what it has begun with."""
    found = {}
    for path in paths:
        check_file(path)
        try:
            with open(path, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(2**20):
                    digest.update(block)
            found[f"SHA-256 of {path}"] = digest.hexdigest()[:16]
        except OSError as error:
            raise ValueError(f"{path}: not a readable text file ({error})") from None
    return found
