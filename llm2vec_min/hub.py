"""Names to local files: models (presets, folders, Hugging Face hub ids) and data sets."""

from __future__ import annotations

import fnmatch
import re
from os.path import basename, dirname, exists, expanduser, isdir, isfile, join
from pathlib import Path

from .config import PRESETS, Preset
from .files import read_json

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "llm2vec_config.json",
    "modules.json",
    "train_args.json",
    "adapters/*/adapter_config.json",  # the earlier stages of a run
    "adapters/*/adapter_model.safetensors",
    "adapters/*/train_args.json",
)
# Weights as transformers saves them. Repositories also hold others (consolidated.safetensors, onnx/) of the same size.
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")  # taken only where there are no safetensors


def resolve(name: str | Path, files: tuple[str, ...] = (*FILES, *SAFETENSORS)) -> Path:
    """The local folder of a model: a preset's name (its base), a folder, or a hub id (`owner/name`, `owner/name@revision`).

    Hub models are downloaded on first use, only the files that are needed, into huggingface_hub's cache.

    Args:
        files: patterns of the files that are needed.

    Raises:
        ValueError: nothing of that name, or the hub's refusal and what to do about it.
    """
    while str(name) in PRESETS:  # one may stand on another, as tiny-mntp does on tiny
        name = PRESETS[str(name)].model
    folder = Path(expanduser(name))
    if isdir(folder) and str(name):
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        what = "is a file, expected a folder" if isfile(folder) else "is neither a folder nor a hub id (owner/name)"
        raise ValueError(f"model {str(name)!r} {what}; presets are {', '.join(PRESETS)}")
    repo, _, revision = str(name).partition("@")
    if isdir(folder.parent) and not revision and not find_preset(name):  # a path mistyped, or a run that is not there yet
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir() and not path.name.startswith("."))
        raise ValueError(
            f"model {str(name)!r}: no such folder; {folder.parent} holds {', '.join(there[:12]) or 'none'} "
            f"(the hub's repository of this name is {name}@main)"
        )
    return fetch(repo, revision or None, "model", files)


def find_preset(name: str | Path) -> Preset | None:
    """The preset of a preset's name, of its hub id (at any revision), or of a run or merged folder that was trained with one
    or whose base is one of these; without a download."""
    name = str(name)
    for depth in range(9):  # from a run to its base, and on; no further than this, since two folders may name each other
        folder = expanduser(name).rstrip("/") or name
        path = join(folder, "llm2vec_config.json")
        if not isfile(path) and basename(dirname(folder)) == "adapters":  # an earlier stage of a run
            path = join(dirname(dirname(folder)), "llm2vec_config.json")
        if name in PRESETS or not isfile(path):  # unlike pathlib's, no error for what no file can be called
            break
        try:
            settings = read_json(path)
        except ValueError:
            if depth == 0:
                raise
            break  # what it once came from need not be whole
        name = str(
            next((settings[key] for key in ("preset", "base_model_name_or_path", "exported_from") if settings.get(key)), name)
        )
    if not exists(name):
        name = name.partition("@")[0]
    return PRESETS.get(name) or next((p for p in PRESETS.values() if name == (p.model, *p.adapters)[-1]), None)


DATASETS = {  # name -> (hub data set, files): what the paper trains MNTP and SimCSE on
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1/train-*.parquet"),
    "wiki1m": ("princeton-nlp/datasets-for-simcse", "wiki1m_for_simcse.txt"),
}
TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz", ".parquet")


def resolve_data(name: str | Path) -> list[Path]:
    """The text files of a data set's name (downloaded on first use), a folder, or a file.

    Raises:
        ValueError: a folder without text files, or the hub's refusal.
    """
    path = Path(expanduser(name))
    if not str(name):
        raise ValueError("--data: found an empty name, expected a file, a folder or a data set")
    if str(name) in DATASETS and not path.exists():
        repo, pattern = DATASETS[str(name)]
        files = sorted(fetch(repo, None, "dataset", (pattern,)).glob(pattern))
        if not files:
            raise ValueError(f"data set {name!r}: the cache holds no {pattern} of {repo}, and without a network it stays so")
        return files
    if path.is_dir():
        files = sorted(
            p for p in path.rglob("*")
            if p.name.lower().endswith(TEXT_SUFFIXES) and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )  # fmt: skip
        if not files:
            raise ValueError(f"{path}: a folder without text files ({', '.join(TEXT_SUFFIXES)})")
        return files
    return [path]


def fetch(repo: str, revision: str | None, kind: str, patterns: tuple[str, ...]) -> Path:
    """The files of a hub repository that fit the patterns, as a folder of huggingface_hub's cache.

    Args:
        kind: "model" or "dataset".
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub

    where = dict(repo_id=repo, repo_type=kind, revision=revision)
    kind_flag = " --repo-type dataset" if kind == "dataset" else ""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        if constants.is_offline_mode():
            return Path(snapshot_download(**where, allow_patterns=list(patterns), local_files_only=True))
        files = HfApi().list_repo_files(**where)
        if SAFETENSORS[0] in patterns and not any(fnmatch.filter(files, pattern) for pattern in SAFETENSORS):
            patterns += PICKLES
        return Path(snapshot_download(**where, allow_patterns=list(patterns)))
    except hub.GatedRepoError:
        raise ValueError(
            f"{kind} {repo!r} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except hub.RevisionNotFoundError:
        raise ValueError(f"{kind} {repo!r} has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise ValueError(
            f"{kind} {repo!r} is neither a local folder nor a hub repository (a private one needs HF_TOKEN); "
            f"presets are {', '.join(PRESETS)}"
        ) from None
    except Exception as error:  # network errors come as those of whatever HTTP library huggingface_hub uses
        try:  # no network, but downloaded before
            return Path(snapshot_download(**where, allow_patterns=list(patterns), local_files_only=True))
        except Exception:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        here = f" is no folder in {Path.cwd()} and" if kind == "model" else ""
        raise ValueError(
            f"{kind} {repo!r}{here} could not be downloaded ({reason}); without a network, run "
            f"`hf download {repo}{kind_flag}` where there is one and copy what it made under ~/.cache/huggingface/hub here"
        ) from None
