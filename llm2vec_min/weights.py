"""Weights between files and modules: safetensors checkpoints in and out, and adapters in PEFT's format."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ModelConfig, is_positive
from .files import give_usual_mode, locked, member, put, read_json, short, write_json
from .lora import LoRALinear, add_lora
from .model import Decoder, LanguageModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_HEADER = 8 * 2**20  # bytes of a safetensors header; 80,000 tensors
FLOATS = ("F64", "F32", "F16", "BF16")  # whole numbers and 8 bits are quantized weights, which mean something else


# what a PEFT adapter's config may ask for beside plain LoRA
UNSUPPORTED = (
    "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora",
    "alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters",
)  # fmt: skip


def _problems(missing, unexpected, wrong, most: int = 5) -> str:
    """All that does not fit, in one sentence; empty when everything does."""
    found = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape or dtype", wrong)):
        if names := sorted(names):
            more = f" and {len(names) - most} more" if len(names) > most else ""
            found.append(f"{what}: {', '.join(repr(name[:160])[1:-1] for name in names[:most])}{more}")
    return "; ".join(found)


def _open(path: Path, device="cpu"):
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    try:
        with open(path, "rb") as file:  # safetensors checks every offset and shape, but a header of up to 100 MB
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"a header of {size} bytes, expected at most {MAX_HEADER}")
        return safetensors.safe_open(path, framework="pt", device=str(device))
    except Exception as error:  # SafetensorError is a plain Exception
        reason = repr(str(error)[:300])[1:-1]  # it quotes names of any kind
        raise ValueError(f"{path}: not a readable safetensors file, perhaps cut short ({reason})") from None


def _misfit(file, key: str, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor, from the file's header alone; empty if nothing is."""
    found, dtype = tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()
    if found != shape:
        return f"{key} is {found}, expected {shape}"
    return "" if dtype in FLOATS else f"{key} holds {dtype}, expected one of {', '.join(FLOATS)}"


def not_finite(state: dict[str, Tensor]) -> str:
    """The tensors that hold NaN or infinity, a few by name; empty if none does. One sum of each tells."""
    sums = torch.stack([tensor.sum() for tensor in state.values()]).tolist()
    names = [name for name, total in zip(state, sums, strict=True) if not math.isfinite(total)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, converted from `pytorch_model*.bin` first if there is nothing else.

    Raises:
        ValueError: no weights in the folder, or an index or a link that names a file outside it.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)) and list(folder.glob("pytorch_model*.bin")):
        folder = convert_bin(folder)
    if (folder / SINGLE).is_file():
        return [member(folder, SINGLE)]
    if (folder / INDEX).is_file():
        index = member(folder, INDEX)
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise ValueError(f"{index}: weight_map must name files of its own folder, found {short(weight_map)}")
        return [member(folder, name) for name in sorted(set(names))]
    raise ValueError(f"{folder}: no weights found, expected {SINGLE}, {INDEX} or pytorch_model*.bin")


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a `pytorch_model*.bin`, memory-mapped. Pickles are opened only here.

    Raises:
        ValueError: it holds anything else, or says more than it holds; or a torch whose `weights_only=True` runs code.
    """
    if torch.__version__ < (2, 6):  # CVE-2025-32434
        raise ValueError(f"{path}: torch {torch.__version__} can be made to run code by such a file; update to 2.6 or later")
    try:
        most = path.stat().st_size
        with zipfile.ZipFile(path) as archive:  # torch would unpack what is compressed, whatever its size
            if sum(item.file_size for item in archive.infolist()) > most:
                raise ValueError("its parts are larger than the file")
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
            raise ValueError(f"holds a {type(state).__name__}, expected named tensors")
        total = 0
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise ValueError(f"{short(key)} is no plain tensor")
            total += tensor.nbytes
        if total > 4 * most:  # tied weights are there once and named twice
            raise ValueError(f"its tensors say {total} bytes")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable weight file ({reason})") from None
    return state


def convert_bin(folder: Path) -> Path:
    """Rewrites `pytorch_model*.bin` as safetensors, shard by shard, and returns the folder that holds them.

    That is one in ~/.cache/llm2vec_min, never the model's own: a hub cache is shared with other libraries.
    """
    paths = [member(folder, path.name) for path in sorted(folder.glob("pytorch_model*.bin"))]
    state = repr([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llm2vec_min" / "converted"
    target = cache / hashlib.sha256(state.encode()).hexdigest()[:32]
    if target.is_dir():  # renamed when it was whole
        return target
    part = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(target, wait=True):  # of several processes one converts, the others wait for it
            if target.is_dir():
                return target
            part = Path(tempfile.mkdtemp(dir=cache))
            weight_map = {}
            for path in paths:
                name = path.stem.replace("pytorch_model", "model") + "-converted.safetensors"
                # clone: safetensors takes no tensors that share memory, as tied embeddings do, nor transposed ones
                tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in read_bin(path).items()}
                write_tensors(part / name, tensors)
                weight_map |= dict.fromkeys(tensors, name)
            write_index(part, weight_map)
            give_usual_mode(part)
            os.replace(part, target)
    except (OSError, safetensors.SafetensorError) as error:
        if not target.is_dir():  # else another process was faster, where there are no locks
            raise ValueError(f"{folder}: its weights could not be converted to {target} ({error})") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return target


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, whole or not at all."""
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata={"format": "pt"})
    give_usual_mode(beside)
    put(beside, path)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def _load_into(model: nn.Module, folder: str | Path, device, dtype: torch.dtype, rename) -> None:
    """Replaces a meta-device model's parameters by the checkpoint's, each mapped straight to its place.

    Args:
        rename: checkpoint key -> parameter name, or None for a key this model does not use.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    missing, unexpected, wrong = set(expected), [], []
    for path in checkpoint_files(folder):
        with _open(path, device) as file:
            for key in file.keys():
                name = rename(key)
                if name is None or name.endswith("rotary_emb.inv_freq"):  # a buffer of old checkpoints; we compute it
                    continue
                missing.discard(name)
                if name not in expected:
                    unexpected.append(key)
                elif misfit := _misfit(file, key, expected[name]):
                    wrong.append(misfit)
                elif name in state:
                    wrong.append(f"{key} is there twice")
                else:
                    state[name] = file.get_tensor(key).to(dtype)
    if problems := _problems(missing, unexpected, wrong):
        raise ValueError(f"{folder}: the weights do not fit config.json; {problems}")
    if broken := not_finite(state):
        raise ValueError(f"{folder}: NaN, infinity, or a number too large for {dtype} in {broken}")
    model.load_state_dict(state, assign=True)


def load_decoder(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a full or headless checkpoint folder, frozen, in eval mode.

    Tensors are memory-mapped, so a weight that needs no cast is not copied on the host; it is read once, to see that it is
    finite.

    Raises:
        ValueError: an unsupported config, missing or broken files, keys or shapes that do not fit (all in one error).
    """
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_folder(folder))
    _load_into(model, folder, device, dtype, lambda key: None if key == "lm_head.weight" else key.removeprefix("model."))
    model.source = str(Path(folder).resolve())
    return model.requires_grad_(False).eval()


def load_language_model(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A full checkpoint with its output head, frozen, in eval mode; tied heads share the embedding's tensor."""
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.from_folder(folder))
    tied = model.config.tie_word_embeddings

    def rename(key: str) -> str | None:
        if key == "lm_head.weight":
            return None if tied else key
        return key if key.startswith("model.") else f"model.{key}"

    if tied:  # one parameter, not two
        del model.lm_head.weight
    _load_into(model, folder, device, dtype, rename)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.source = str(Path(folder).resolve())
    return model.requires_grad_(False).eval()


def save_checkpoint(model: nn.Module, folder: str | Path, dtype: torch.dtype, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a model's weights as safetensors, in shards when they are larger than one; tied heads are left out.

    Layers with an adapter are merged one by one on their way to the file: the model stays as it is, and memory grows
    by one shard. Each file is written beside its place and renamed, the index last.
    """
    folder = Path(folder)
    tied = isinstance(model, LanguageModel) and model.config.tie_word_embeddings
    shards, size = [{}], 0
    adapted = {name + ".weight": m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or (tied and name == "lm_head.weight"):
            continue
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for key, tensor in shard.items():
            whole = adapted[key].merged_weight() if key in adapted else tensor.detach()
            tensors[key] = whole.to("cpu", dtype).contiguous()
        write_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        write_index(folder, weight_map)


# ---- Adapters, in PEFT's format ----


def adapter_of(decoder: Decoder, base_model: str) -> tuple[dict, dict[str, Tensor]]:
    """The decoder's LoRA weights as `PeftModel.from_pretrained(AutoModel, folder)` reads them: config and tensors.

    Raises:
        ValueError: no adapter, or layers whose rank, alpha or dropout differ.
    """
    linear = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: module for name, module in linear.items() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no adapter to save")
    (r, alpha, dropout), *others = {(module.r, module.alpha, module.dropout) for module in layers.values()}
    if others:
        raise ValueError(
            f"the adapter's layers differ in (r, alpha, dropout): {(r, alpha, dropout)} and {others[0]}; its file has one of each"
        )
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    on_all = len(layers) == sum(name.rpartition(".")[2] in kinds for name in linear)
    base, revision = (base_model, "") if Path(base_model).is_dir() else base_model.partition("@")[::2]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": revision or None,  # of the base
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": kinds if on_all else sorted(layers),
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {}
    for name, module in layers.items():
        for child in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{name}.{child}.weight"] = getattr(module, child).weight.detach().cpu().contiguous()
    return config, tensors


def base_of(folder: Path) -> object:
    """What an adapter's adapter_config.json names as its base model, as `owner/name@revision` where it names a revision."""
    config = read_json(member(folder, ADAPTER_CONFIG))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    on_hub = isinstance(base, str) and "@" not in base and not Path(base).exists()
    return f"{base}@{revision}" if on_hub and isinstance(revision, str) and revision else base


def save_adapter(folder: str | Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Writes what `adapter_of` returned into a folder."""
    write_tensors(Path(folder) / ADAPTER, tensors)
    write_json(Path(folder) / ADAPTER_CONFIG, config)


def _adapted_layers(config: dict, linear: list[str], found: set[str]) -> tuple[list[str], list[str]]:
    """Of a decoder's linear layers those that an adapter_config.json names, and what it names that is not there.

    As in PEFT a list holds whole names, and ends of names, which stand for the layers of that end in `layers_to_transform` (all
    if that is empty); `exclude_modules` takes some away. A pattern is not read: it stands for all layers of the kinds that are
    found, so that an adapter which leaves some of them out is taken to be another model's.
    """
    named, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    numbers = config.get("layers_to_transform")
    numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
    layer_of = {name: int(name.split(".")[1]) for name in linear}
    all_layers = range(1 + max(layer_of.values()))
    layers = [i for i in all_layers if not numbers or i in numbers]
    absent = [f"layers.{i}" for i in numbers if i not in all_layers]

    def kind(name: str) -> str:
        return re.sub(r"^layers\.\d+\.", "", name)

    def plain(names: list) -> set[str]:
        return {str(name).removeprefix("model.") for name in names}

    def ends_with(name: str, ends: set[str]) -> bool:
        parts = name.split(".")
        return any(".".join(parts[i:]) in ends for i in range(len(parts)))

    if isinstance(named, list) and isinstance(excluded, list):
        ends, without = plain(named), plain(excluded)
        whole = {name for name in ends if name != kind(name)}
        absent += sorted(whole - set(linear))
        names = [name for name in linear if ends_with(name, ends) and not ends_with(name, without)]
    else:
        whole, kinds = set(), {kind(name) for name in found}
        names = [name for name in linear if kind(name) in kinds]
    return [name for name in names if name in whole or layer_of[name] in layers], absent


def load_adapter(decoder: Decoder, folder: str | Path) -> None:
    """Puts a LoRA adapter from a PEFT folder on the decoder, in place; it is neither merged nor trainable.

    Keys of adapters trained on the decoder alone and on a ...ForCausalLM both fit.

    Raises:
        ValueError: not a plain LoRA adapter, or one for another model: names every kind of misfit at once.
    """
    folder = Path(folder)
    where = member(folder, ADAPTER_CONFIG)
    if not where.is_file():
        raise ValueError(f"{folder}: is no adapter, expected a PEFT folder with {ADAPTER_CONFIG} and {ADAPTER}")
    config = read_json(where)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {short(config.get('peft_type'))}, expected 'LORA'")
    for option in UNSUPPORTED:
        if config.get(option):
            raise ValueError(f"{where}: {option} is {short(config[option])}, which is not supported")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal", "eva", "mica"):
        raise ValueError(
            f"{where}: init_lora_weights is {short(config['init_lora_weights'])}, which changes the base too; not supported"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {short(config['bias'])}, only 'none' is supported")
    r, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(r) is not int or not 1 <= r <= 2**16:
        raise ValueError(f"{where}: r is {short(r)}, expected a whole number from 1 to {2**16}")
    if not is_positive(alpha):
        raise ValueError(f"{where}: lora_alpha is {short(alpha)}, expected a number above 0")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: lora_dropout is {short(dropout)}, expected a number in [0, 1)")
    if type(config.get("use_rslora") or False) is not bool:
        raise ValueError(f"{where}: use_rslora is {short(config['use_rslora'])}, expected true or false")
    if config.get("use_rslora"):
        alpha = alpha * r**0.5  # that variant scales by alpha / sqrt(r)

    if (folder / "adapter_model.bin").is_file() and not (folder / ADAPTER).is_file():
        raise ValueError(f"{folder}: holds an adapter_model.bin, expected {ADAPTER}; load it with peft and save it again")
    linear = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    state: dict[str, Tensor] = {}
    wrong, unexpected = [], []
    with _open(member(folder, ADAPTER)) as file:
        for key in file.keys():
            match = re.fullmatch(r"base_model\.model\.(?:model\.)?((.+)\.lora_([AB]))(?:\.default)?\.weight", key)
            if not match or match[2] not in linear or match[1] + ".weight" in state:
                unexpected.append(match[1] if match else key)
                continue
            layer = linear[match[2]]
            shape = (r, layer.in_features) if match[3] == "A" else (layer.out_features, r)
            misfit = _misfit(file, key, shape)
            wrong += [misfit] if misfit else []
            state[match[1] + ".weight"] = torch.empty(0) if misfit else file.get_tensor(key).float()
    targets = {name.rpartition(".lora_")[0] for name in state}
    missing = [f"{name}.lora_{c}" for name in targets for c in "AB" if f"{name}.lora_{c}.weight" not in state]
    expected, absent = _adapted_layers(config, list(linear), targets)
    missing += absent + [name for name in expected if name not in targets]
    unexpected += sorted(targets - set(expected))
    problems = _problems(missing, unexpected, wrong) or ("" if state else "it is empty")
    if missing and any(isinstance(config.get(name), str) for name in ("target_modules", "exclude_modules")):
        problems += " (target_modules or exclude_modules is a pattern, which is not read; a list of names may leave layers out)"
    if problems:
        base = config.get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: the adapter (made for {short(base)}) does not fit {decoder.source or 'this model'}; {problems}"
        )
    if broken := not_finite(state):
        raise ValueError(f"{folder}: NaN or infinity in {broken}; its training may have diverged")
    add_lora(decoder, r, alpha, dropout, targets)
    decoder.load_state_dict({k: v.to(decoder.norm.weight.device) for k, v in state.items()}, strict=False, assign=True)
    decoder.requires_grad_(False)
