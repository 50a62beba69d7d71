"""A model's name to a local folder: presets, local folders, Hugging Face hub ids."""

from __future__ import annotations

import re
from pathlib import Path

from .config import PRESETS, Preset, read_json

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "llm2vec_config.json",
)
# Weights as transformers saves them. Repositories also hold others (consolidated.safetensors, onnx/) of the same size.
SAFETENSORS = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
PICKLES = r"pytorch_model(-\d+-of-\d+)?\.bin"


def resolve(name: str | Path) -> Path:
    """The local folder of a model: a preset's name, a folder, or a hub id (`owner/name`, `owner/name@revision`).

    Hub models are downloaded on first use, only the files that are needed, into huggingface_hub's cache.

    Raises:
        ValueError: nothing of that name, or the hub's refusal and what to do about it.
    """
    name = PRESETS[str(name)].model if str(name) in PRESETS else name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        what = "is a file, expected a folder" if folder.exists() else "is neither a folder nor a hub id (owner/name)"
        raise ValueError(f"model {str(name)!r} {what}; presets are {', '.join(PRESETS)}")
    return download(str(name))


def find_preset(name: str | Path) -> Preset | None:
    """The preset of a preset's name, of its hub id, or of a run whose base is one of these; without a download."""
    path = Path(name) / "llm2vec_config.json"
    if path.is_file():
        name = read_json(path).get("base_model_name_or_path", name)
    name = str(name)
    return PRESETS.get(name) or next((p for p in PRESETS.values() if name == (p.model, *p.adapters)[-1]), None)


def download(name: str) -> Path:
    """The needed files of a hub repository, as a folder of huggingface_hub's cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    repo, _, revision = name.partition("@")
    revision = revision or None
    try:
        try:
            files = HfApi().list_repo_files(repo, revision=revision)
        except (hub.OfflineModeIsEnabled, ConnectionError):
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        weights = [f for f in files if re.fullmatch(SAFETENSORS, f)] or [f for f in files if re.fullmatch(PICKLES, f)]
        wanted = [f for f in files if f in FILES] + weights
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except hub.GatedRepoError:
        raise ValueError(
            f"model {repo!r} is gated: accept its licence at https://huggingface.co/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except hub.RevisionNotFoundError:
        raise ValueError(f"model {repo!r} has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise ValueError(
            f"model {repo!r} is neither a local folder nor a hub repository (a private one needs HF_TOKEN); "
            f"presets are {', '.join(PRESETS)}"
        ) from None
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {repo!r} could not be downloaded ({reason}); without a network, download it elsewhere with "
            f"`hf download {repo}` and pass the folder"
        ) from None
