"""Weights between files and modules: safetensors checkpoints in and out, and adapters in PEFT's format."""

from __future__ import annotations

import os
import re
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ModelConfig
from .files import read_json, write_json
from .lora import LoRALinear, add_lora
from .model import Decoder, LanguageModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _problems(missing, unexpected, wrong, most: int = 5) -> str:
    """All that does not fit, in one sentence; empty when everything does."""
    found = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        if names := sorted(names):
            more = f" and {len(names) - most} more" if len(names) > most else ""
            found.append(f"{what}: {', '.join(names[:most])}{more}")
    return "; ".join(found)


def _open(path: Path, device="cpu"):
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    try:
        return safetensors.safe_open(path, framework="pt", device=str(device))
    except Exception as error:  # SafetensorError is a plain Exception
        raise ValueError(f"{path}: not a readable safetensors file, perhaps cut short ({error})") from None


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, converted from `pytorch_model*.bin` first if there is nothing else.

    Raises:
        ValueError: no weights in the folder, or an index that names a file outside it.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)) and list(folder.glob("pytorch_model*.bin")):
        folder = convert_bin(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / INDEX}: weight_map must name files of its own folder, found {names}")
        return [folder / name for name in names]
    raise ValueError(f"{folder}: no weights found, expected {SINGLE}, {INDEX} or pytorch_model*.bin")


def convert_bin(folder: Path) -> Path:
    """Rewrites `pytorch_model*.bin` as safetensors, shard by shard, and returns the folder that holds them.

    That is the folder itself, or one in ~/.cache/llm2vec_min when it is read-only. Pickles are opened only here and
    only with `weights_only=True`, which runs no code from the file.
    """
    target = folder
    if not os.access(folder, os.W_OK):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        target = cache / "llm2vec_min" / re.sub(r"\W+", "-", str(folder.resolve())).strip("-")
        target.mkdir(parents=True, exist_ok=True)
        if (target / INDEX).is_file():
            return target
    weight_map = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        try:
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"{path}: not a readable weight file ({str(error).splitlines()[0]})") from None
        name = path.stem.replace("pytorch_model", "model") + "-converted.safetensors"
        # clone: safetensors takes no tensors that share memory, as tied embeddings do
        save_file({key: t.clone() for key, t in state.items()}, target / (name + ".part"), metadata={"format": "pt"})
        os.replace(target / (name + ".part"), target / name)
        weight_map |= dict.fromkeys(state, name)
    write_index(target, weight_map)  # last: only complete conversions are found
    return target


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
                shape = tuple(file.get_slice(key).get_shape())
                missing.discard(name)
                if name not in expected:
                    unexpected.append(key)
                elif shape != expected[name]:
                    wrong.append(f"{key} is {shape}, expected {expected[name]}")
                else:
                    state[name] = file.get_tensor(key).to(dtype)
    if problems := _problems(missing, unexpected, wrong):
        raise ValueError(f"{folder}: the weights do not fit config.json; {problems}")
    model.load_state_dict(state, assign=True)


def load_decoder(folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a full or headless checkpoint folder, frozen, in eval mode.

    Tensors are memory-mapped, so a weight that needs no cast is not copied on the host.

    Raises:
        ValueError: an unsupported config, missing or broken files, keys or shapes that do not fit (all in one error).
    """
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_folder(folder))
    _load_into(model, folder, device, dtype, lambda key: None if key == "lm_head.weight" else key.removeprefix("model."))
    model.source = str(folder)
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
    model.model.source = str(folder)
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
        save_file(tensors, folder / (name + ".part"), metadata={"format": "pt"})
        os.replace(folder / (name + ".part"), folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        write_index(folder, weight_map)


# ---- Adapters, in PEFT's format ----


def save_adapter(decoder: Decoder, folder: str | Path, base_model: str) -> None:
    """Writes the decoder's LoRA weights as `PeftModel.from_pretrained(AutoModel, folder)` reads them."""
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        raise ValueError("the model has no adapter to save")
    any_layer = next(iter(layers.values()))
    alpha = any_layer.alpha
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": any_layer.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": any_layer.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
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
    folder = Path(folder)
    save_file(tensors, folder / (ADAPTER + ".part"), metadata={"format": "pt"})
    os.replace(folder / (ADAPTER + ".part"), folder / ADAPTER)
    write_json(folder / ADAPTER_CONFIG, config)


def load_adapter(decoder: Decoder, folder: str | Path) -> None:
    """Puts a LoRA adapter from a PEFT folder on the decoder, in place; it is neither merged nor trainable.

    Keys of adapters trained on the decoder alone and on a ...ForCausalLM both fit.

    Raises:
        ValueError: not a plain LoRA adapter, or one for another model: names every kind of misfit at once.
    """
    folder = Path(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    where = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for option in ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(option):
            raise ValueError(f"{where}: {option} is {config[option]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {config['bias']!r}, only 'none' is supported")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{where}: r is {r!r} and lora_alpha is {alpha!r}, expected numbers")
    if config.get("use_rslora"):
        alpha = alpha * r**0.5  # that variant scales by alpha / sqrt(r)

    state: dict[str, Tensor] = {}
    unexpected = []
    with _open(folder / ADAPTER) as file:
        for key in file.keys():
            match = re.fullmatch(r"base_model\.model\.(?:model\.)?(.+\.lora_[AB])(?:\.default)?\.weight", key)
            if match:
                state[match[1] + ".weight"] = file.get_tensor(key).float()
            else:
                unexpected.append(key)
    linear = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    targets = {name.rpartition(".lora_")[0] for name in state}
    unexpected += sorted(targets - linear.keys())
    wrong, missing = [], []
    for name in sorted(targets & linear.keys()):
        shapes = {"lora_A": (r, linear[name].in_features), "lora_B": (linear[name].out_features, r)}
        for child, shape in shapes.items():
            tensor = state.get(f"{name}.{child}.weight")
            if tensor is None:
                missing.append(f"{name}.{child}")
            elif tuple(tensor.shape) != shape:
                wrong.append(f"{name}.{child} is {tuple(tensor.shape)}, expected {shape}")
    # An adapter sits on every layer or on none: fewer than the model has is another model's.
    kinds = {re.sub(r"layers\.\d+\.", "", name) for name in targets & linear.keys()}
    if not config.get("layers_to_transform"):
        layers = range(decoder.config.num_hidden_layers)
        missing += [n for kind in kinds for i in layers if (n := f"layers.{i}.{kind}") not in targets]
    problems = _problems(missing, unexpected, wrong) or ("" if state else "it is empty")
    if problems:
        base = config.get("base_model_name_or_path")
        raise ValueError(f"{folder}: the adapter (made for {base}) does not fit {decoder.source or 'this model'}; {problems}")
    add_lora(decoder, r, alpha, config.get("lora_dropout", 0.0), targets)
    decoder.load_state_dict({k: v.to(decoder.norm.weight.device) for k, v in state.items()}, strict=False, assign=True)
    decoder.requires_grad_(False)
