"""LLM2Vec: a decoder, its tokenizer and how to pool, from a name; text in, vectors out."""

from __future__ import annotations

import filecmp
import hashlib
import json
import shutil
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from os.path import expanduser, isdir
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import KEPT_WINDOW, PRESETS
from .device import pick_device, pick_dtype
from .files import member, new_folder, put, read_json, short, write_json
from .hub import FILES, find_preset, resolve
from .lora import LoRALinear, merge_lora
from .model import Decoder
from .pooling import POOLING_MODES, pool
from .tokenizer import Encoded, Tokenizer
from .weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapter_of,
    base_of,
    load_adapter,
    load_decoder,
    load_language_model,
    save_adapter,
    save_checkpoint,
)

MAX_TOKENS, MAX_TOKENS_CPU = 16384, 1024  # per forward pass in `encode`: enough to fill a GPU, a CPU
LLM2VEC_CONFIG = "llm2vec_config.json"
_mode_lock = threading.Lock()  # of the module, because a model with a lock in it cannot be copied
_encoding: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # decoder -> threads in `encode`, and the modes to return to


# The authors' llm2vec_config.json has the first two fields of SETTINGS. What they call last_token is `last`; eos_token and
# bos_token pool a special token, which this project never does: such a checkpoint needs `pooling=` given.
POOLING_ALIASES = {"last_token": "last"}
THEIR_POOLINGS = ("eos_token", "bos_token")


LINEAGE = ("adapters", "base_model_name_or_path", "preset")  # in llm2vec_config.json: what an encoder stands on
SETTINGS = {  # what an encoder takes from llm2vec_config.json: what each must be, in words and as a check
    "pooling_mode": (f"one of {', '.join(POOLING_MODES)}", lambda value: value in (*POOLING_MODES, *THEIR_POOLINGS)),
    "max_length": ("a whole number from 1 on", lambda value: type(value) is int and 1 <= value < 2**31),
    "causal": ("true or false", lambda value: type(value) is bool),
    "template": ("two strings", lambda value: isinstance(value, list) and [type(part) for part in value] == [str, str]),
    "adapters": ("a list of folders", lambda value: isinstance(value, list) and all(type(name) is str for name in value)),
    "base_model_name_or_path": ("a model's name", lambda value: isinstance(value, str)),
    "preset": ("a preset's name", lambda value: isinstance(value, str) and value in PRESETS),
}


def read_settings(folder: Path) -> dict:
    """A folder's llm2vec_config.json, the authors' or this project's; empty if there is none.

    Raises:
        ValueError: a field that is not what it should be.
    """
    path = member(folder, LLM2VEC_CONFIG)
    settings = {name: value for name, value in (read_json(path) if path.is_file() else {}).items() if value is not None}
    if isinstance(settings.get("pooling_mode"), str):
        settings["pooling_mode"] = POOLING_ALIASES.get(settings["pooling_mode"], settings["pooling_mode"])
    for name, (expected, holds) in SETTINGS.items():
        if name in settings and not holds(settings[name]):
            raise ValueError(f"{path}: {name} is {short(settings[name])}, expected {expected}")
    if settings.get("skip_instruction") is False:
        raise ValueError(
            f"{path}: skip_instruction is false, but an instruction is never pooled here; delete the field to accept that"
        )
    # the authors' files may have more fields; of these doc_max_length, where they cut a text before max_length, is not followed
    ours = {"stage", "exported_from"} & settings.keys()
    if ours and (unknown := settings.keys() - ours - SETTINGS.keys()):
        raise ValueError(
            f"{path}: {short(min(unknown))} is no setting that this version knows, and without it the vectors may differ"
        )
    if "adapters" in settings and "base_model_name_or_path" not in settings:
        raise ValueError(f"{path}: names adapters, but no base_model_name_or_path")
    return settings


def find_chain(name: str | Path, above: tuple[str, ...] = ()) -> tuple[str, list[Path], dict]:
    """What a name stands for: (base model, adapters to apply in order, settings of llm2vec_config.json).

    A run of this project lists its adapters, the earlier stages' first; the folder of one of these is that stage. A bare
    PEFT folder, as the authors publish them, names its base, which may again be such a folder. Their second adapters do not say
    that they stand on the first: for these the preset does. Anything else is a base by itself.

    Of a hub model all is downloaded but the base's weights.

    Args:
        above: the adapters' names that led here.
    Raises:
        ValueError: a broken settings file, an adapter without a base, or adapters that name each other.
    """
    if str(name) in above:
        raise ValueError(f"{name}: names itself as its base model, by way of {', '.join(above)}")
    preset, local = find_preset(name), isdir(expanduser(name)) and str(name) not in PRESETS
    if preset is not None and preset.adapters and not local:  # adapters on top of what the preset's model stands for
        base, chain, settings = find_chain(preset.model, (*above, str(name)))
        last = preset.adapters[-1] if str(name) in PRESETS else name  # a hub id may name a revision
        folders = [resolve(adapter, FILES) for adapter in (*preset.adapters[:-1], last)]
        return base, chain + folders, settings | read_settings(folders[-1])
    folder = resolve(name, FILES)
    settings = read_settings(folder)
    if preset is not None:
        settings = {"template": list(preset.template)} | settings
    if "adapters" in settings:  # a run
        return settings["base_model_name_or_path"], [member(folder, name) for name in settings["adapters"]], settings
    place = folder.resolve()
    run = place.parent.parent
    whole = read_settings(run) if place.parent.name == "adapters" else {}
    names = whole.get("adapters", [])
    if (own := f"adapters/{place.name}") in names:  # an earlier stage of a run, which stands on those before it
        return whole["base_model_name_or_path"], [member(run, name) for name in names[: names.index(own) + 1]], whole
    if (folder / "train_args.json").is_file() and not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
        raise ValueError(
            f"{name}: is an unfinished run; train.py with --resume, and the arguments it was started with, ends it"
        )
    if (folder / ADAPTER_CONFIG).is_file():  # a bare PEFT folder: what its base stands for, then itself
        base = base_of(folder)
        named = (folder / "config.json").is_file() and read_json(member(folder, "config.json")).get("_name_or_path")
        if named and named != str(base).partition("@")[0]:  # the authors' adapters lie beside one, which names the hub's base
            base = named
        if not base or base == str(name) or not isinstance(base, str):
            raise ValueError(
                f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {short(base)}, expected another model's name"
            )
        try:
            base, chain, before = find_chain(base, (*above, str(name)))
        except ValueError as error:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: its base model: {error}") from None
        return base, [*chain, folder], before | settings
    if str(name) in PRESETS and not Path(PRESETS[str(name)].model).is_dir():  # from here on: a base by itself
        name = PRESETS[str(name)].model  # its hub id, which other libraries know too
    return str(folder.resolve()) if local else str(name), [], settings


class LLM2Vec(nn.Module):
    """A text encoder.

    Args:
        decoder: with or without an adapter.
        causal: True = tokens see what is before them only; False = LLM2Vec.
        pooling: mean, weighted_mean, last, first or max.
        max_length: tokens per text, special tokens and instruction included; longer texts are cut.
        template: (prefix, suffix) of a chat template around instruction and text.
        base_model: name of the decoder's checkpoint; default: where it was loaded from.
        adapters: folders of what is merged into it.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        causal: bool = False,
        pooling: str = "mean",
        max_length: int = 512,
        template: tuple[str, str] = ("", ""),
        base_model: str = "",
        adapters: list[Path] | None = None,
    ):
        super().__init__()
        if pooling not in POOLING_MODES:
            raise ValueError(f"pooling is {pooling!r}, expected one of {', '.join(POOLING_MODES)}")
        if not isinstance(causal, (bool, np.bool_)):
            raise ValueError(f"causal is {causal!r}, expected True or False")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, expected at least 1 token")
        if [type(part) for part in template] != [str, str]:
            raise ValueError(f"template is {short(template)}, expected what stands before and after a text")
        self.decoder, self.tokenizer = decoder, tokenizer
        tokenizer.limit_vocabulary(decoder.config.vocab_size)
        self.causal, self.pooling, self.max_length, self.template = bool(causal), pooling, max_length, tuple(template)
        self.base_model, self.adapters = base_model or decoder.source, list(adapters or [])
        self.lm_head: nn.Linear | None = None
        self.preset: str | None = None  # whose recipe a later stage takes, where the base model's name does not tell

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        *,
        adapters: list[str | Path] = (),
        causal: bool | None = None,
        pooling: str | None = None,
        max_length: int | None = None,
        template: tuple[str, str] | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        lm_head: bool = False,
    ) -> LLM2Vec:
        """Loads a run's output folder, a preset, a hub id or a local checkpoint, and merges its adapters in order.

        Args:
            adapters: further PEFT folders or hub ids, merged on top.
            causal, pooling, max_length, template: default to what the folder was saved with, else False, "mean", 512, no template.
            dtype: of the weights: float32 or bfloat16; default: bfloat16 on a GPU, float32 on the CPU.
            device: default: the first GPU if there is one, else the CPU.
            lm_head: also load the base's output head, as `.lm_head`; MNTP needs it.
        Raises:
            ValueError: what is wrong with the name, the files, or an adapter that is for another model.
        """
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # not a public name: it may go
        is_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
        if dtype == torch.bfloat16 and device.type == "cpu" and is_avx and not has_bfloat16():
            warnings.warn("bfloat16 on a CPU that has no instructions for it: float32 is several times faster", stacklevel=2)
        base, chain, settings = find_chain(name)
        for adapter in [adapters] if isinstance(adapters, (str, Path)) else adapters:
            if str(adapter) in PRESETS:
                raise ValueError(f"{adapter}: is a preset, a model with its adapters, expected one adapter's folder or hub id")
            chain.append(resolve(adapter))
            own = read_settings(chain[-1])
            if len(own.get("adapters", ())) > len(chain):
                raise ValueError(
                    f"{adapter}: stands on {len(own['adapters']) - 1} earlier adapters: make it the model, or name them first"
                )
            settings |= {k: v for k, v in own.items() if k in SETTINGS and k not in LINEAGE}
        for one, other in combinations([folder / ADAPTER for folder in chain], 2):
            if one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False):
                raise ValueError(f"{name}: an adapter is there twice: {one} and {other} are the same")
        try:
            base_folder = resolve(base)
        except ValueError as error:
            if not chain:
                raise
            raise ValueError(f"{name}: its base model was not found: {error} (the name stands in {LLM2VEC_CONFIG})") from None
        if lm_head:
            language_model = load_language_model(base_folder, device, dtype)
            decoder = language_model.model
        else:
            decoder = load_decoder(base_folder, device, dtype)
        for adapter in chain:
            load_adapter(decoder, adapter)
            merge_lora(decoder)
        folders = (*reversed(chain), base_folder)  # the newest tokenizer counts
        if not settings and None in (pooling, causal) and any(member(folder, "modules.json").is_file() for folder in folders):
            warnings.warn(
                f"{name}: was made for sentence-transformers; its pooling, its prompts and whether it is causal are not read. Give "
                f"what it was trained with: pooling=... (now {pooling or 'mean'!r}), causal=... (now {bool(causal)}), and "
                "its prompt, if it has one, as the instruction",
                stacklevel=2,
            )
        pooling = pooling or settings.get("pooling_mode", "mean")
        if pooling in THEIR_POOLINGS:
            raise ValueError(
                f"{name}: its {LLM2VEC_CONFIG} says pooling_mode {pooling!r}, a special token's state, which is never pooled here; "
                f"name another, pooling=... or --pooling, of {', '.join(POOLING_MODES)}"
            )
        if max_length is not None and max_length > decoder.config.max_position_embeddings:
            most = decoder.config.max_position_embeddings
            warnings.warn(
                f"max_length is {max_length}, but the model was made for {most} positions: states get worse", stacklevel=2
            )
        home = next((folder for folder in folders if member(folder, "tokenizer.json").is_file()), base_folder)
        if causal is None:
            causal = settings.get("causal", False)
        l2v = cls(
            decoder,
            Tokenizer(home),
            causal=causal,
            pooling=pooling,
            max_length=settings.get("max_length", 512) if max_length is None else max_length,
            template=settings.get("template", ("", "")) if template is None else template,
            base_model=base,
            adapters=chain,
        )
        l2v.preset = settings.get("preset")
        l2v.lm_head = language_model.lm_head if lm_head else None
        return l2v.eval()

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.decoder.config.hidden_size

    @property
    def max_tokens(self) -> int:
        """Tokens that fill this encoder's device, per forward pass without gradients."""
        return MAX_TOKENS_CPU if self.device.type == "cpu" else MAX_TOKENS

    # ---- text to vectors ----

    def tokenize(self, texts: list, instruction: str | None = None, max_length: int | None = None) -> list[Encoded]:
        """Ids and pooled positions of each text; an item may also be an [instruction, text] pair of its own."""
        max_length = self.max_length if max_length is None else max_length
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, expected at least 1 token")
        if isinstance(texts, (str, bytes, dict)):
            raise ValueError(f"expected a list of texts, found a {type(texts).__name__}: {short(texts)}")
        pairs = [(instruction, item) if isinstance(item, str) else item for item in texts]
        for item in pairs:
            whole = isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[1], str)
            if not whole or not isinstance(item[0] or "", str):
                raise ValueError(f"expected a text or an [instruction, text] pair, found {short(item)}")
            for text in item:
                try:
                    (text or "").encode()
                except UnicodeEncodeError:
                    raise ValueError(f"found a text that is no valid Unicode: {short(text)}") from None
        prefix, suffix = self.template
        return self.tokenizer.encode(
            [text for _, text in pairs],
            instruction=[i or "" for i, _ in pairs],
            max_length=max_length,
            prefix=prefix,
            suffix=suffix,
        )

    def states(self, encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, C) of one left-padded batch, and which of them belong to the text, (B, T) bool."""
        batch = self.tokenizer.collate(encoded, self.device)
        return self.decoder(batch.input_ids, batch.padding_mask, causal=self.causal), batch.pool_mask

    def embed(self, texts: list, instruction: str | None = None) -> Tensor:
        """Embeddings of one batch, (N, C) float32, with gradients: first `add_lora(l2v.decoder)` or
        `l2v.decoder.requires_grad_()`, and `l2v.train()` for dropout. ValueError for no text."""
        if len(texts) == 0:
            raise ValueError("no text to embed")
        return pool(*self.states(self.tokenize(texts, instruction)), self.pooling)

    @torch.no_grad()
    def encode(
        self,
        texts: str | list,
        instruction: str | None = None,
        *,
        batch_size: int | None = None,
        pooling: str | None = "default",
        normalize: bool = False,
        dim: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """Embeddings of any number of texts.

        Args:
            texts: one text, a list of texts, a list of [instruction, text] pairs, or what `tokenize` made of them.
            instruction: put before each text, and not pooled; documents usually get none.
            batch_size: most texts per forward pass; default: as many as fill the device. Texts are sorted by length, so
                that little is padded.
            pooling: another than the model's own; None gives the states of each text's own tokens instead.
            normalize: scale each vector to length 1.
            dim: keep only the first `dim` numbers of each vector; for a model that was trained with `--matryoshka`.
        Returns:
            (N, C) float32, or (N, dim); (C,) for one text, a list of (T_i, C) for pooling=None. A vector does not depend on the
            batch it was in, up to rounding: less than 3e-5 of its length in float32 (1e-4 for SmolLM2-135M); in bfloat16 about
            0.01 after contrastive training, and more before it. An empty text has no token of its own and gives zeros
            (normalised or not).
        """
        if isinstance(texts, str):
            options = dict(batch_size=batch_size, pooling=pooling, normalize=normalize, dim=dim, show_progress=show_progress)
            return self.encode([texts], instruction, **options)[0]
        if dim is not None and not 0 < dim <= self.width:
            raise ValueError(f"dim is {dim}, expected a number from 1 to {self.width}, the size of this model's vectors")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1 text")
        mode = self.pooling if pooling == "default" else pooling
        texts = texts if isinstance(texts, (bytes, dict)) else list(texts)  # these two are for `tokenize` to refuse
        tokenized = isinstance(texts, list) and bool(texts) and isinstance(texts[0], Encoded)
        if tokenized and instruction:
            raise ValueError("an instruction is put before texts, and these are tokenized already: give it to `tokenize`")
        encoded = texts if tokenized else self.tokenize(texts, instruction)
        lengths = [len(row.ids) for row in encoded]
        batches = []  # (indices, their vectors, on the way to the host)
        with self._without_dropout(), tqdm(total=len(encoded), desc="encoding", unit="text", disable=not show_progress) as bar:
            for rows in sorted_batches(lengths, batch_size or len(encoded), self.max_tokens):
                hidden, pool_mask = self.states([encoded[i] for i in rows])
                vectors = (hidden.float() if mode is None else pool(hidden, pool_mask, mode))[..., :dim]
                if normalize:
                    vectors = nn.functional.normalize(vectors, dim=-1)
                batches.append((rows, vectors.to("cpu", non_blocking=True)))
                bar.update(len(rows))
        if self.device.type != "cpu":  # once, at the end: the next batch does not wait for the copy of the one before
            torch.accelerator.synchronize(self.device)
        if mode is None:
            results: list = [None] * len(encoded)
            for rows, vectors in batches:
                for i, states in zip(rows, vectors.numpy(), strict=True):
                    results[i] = states[len(states) - lengths[i] :][encoded[i].pooled]
            return results
        width = batches[0][1].shape[-1] if batches else dim or self.width  # a pooling of your own may change it
        result = np.zeros((len(encoded), width), dtype=np.float32)
        for rows, vectors in batches:
            result[rows] = vectors.numpy()
        return result

    def fingerprint(self) -> str:
        """16 hex digits that differ between encoders whose vectors differ: other weights, adapters, dtype, tokenizer or
        settings; not with where the files lie. Of each weight it reads up to 256 numbers, which a retraining changes."""
        said = {**self.settings(), "config": self.decoder.config.to_dict()}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        digest.update(self.tokenizer.backend.to_str().encode())
        samples = []
        digest.update(repr([m.scaling for m in self.decoder.modules() if isinstance(m, LoRALinear)]).encode())
        for name, weight in self.decoder.state_dict().items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            step = max(1, weight.numel() // 256) | 1  # odd, or a matrix of 2^n columns would give the same few of them
            samples.append(weight.flatten()[::step][:256].float())
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """The decoder in eval mode until the last thread that encodes with it is through, then as the first one found it."""
        decoder = self.decoder
        with _mode_lock:
            threads, modes = _encoding.get(decoder) or (0, [(module, module.training) for module in decoder.modules()])
            _encoding[decoder] = threads + 1, modes
            decoder.eval()
        try:
            yield
        finally:
            with _mode_lock:
                threads, modes = _encoding.pop(decoder)
                if threads > 1:
                    _encoding[decoder] = threads - 1, modes
                else:
                    for module, training in modes:
                        module.training = training

    # ---- to disk ----

    def save(self, output: str | Path, *, dtype: str | torch.dtype | None = None, overwrite: bool = False) -> None:
        """Writes one plain folder with all adapters merged, for `from_pretrained`; `interop.export_model` writes what
        transformers and sentence-transformers load, too.

        Args:
            dtype: of the stored weights; default: as they are.
            overwrite: replace an earlier folder of this kind.
        Raises:
            ValueError: the folder exists, or cannot be written.
        """
        output = Path(output).expanduser()
        self.check_place(output, overwrite)
        with new_folder(output) as folder:
            self.write_merged(folder, dtype)

    def check_place(self, output: str | Path, overwrite: bool) -> None:
        """ValueError unless `output` is free, or a merged folder that may be replaced (never a run: it holds what cannot be
        made again)."""
        config = Path(output) / LLM2VEC_CONFIG
        is_merged = config.is_file() and "exported_from" in read_json(config)
        if Path(output).exists() and not (overwrite and is_merged):
            reason = "already exists; overwrite=True, or --overwrite, replaces it" if is_merged else "exists and is no export"
            raise ValueError(f"{output}: {reason}")

    def write_merged(self, folder: Path, dtype: str | torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9) -> None:
        """Merged weights, config, tokenizer and llm2vec_config.json into an empty folder."""
        dtype = pick_dtype(dtype or self.decoder.norm.weight.dtype, self.device)
        save_checkpoint(plain(self.decoder), folder, dtype, max_shard_bytes)
        config = self.decoder.config
        window = {"sliding_window": config.sliding_window}
        if config.sliding_window is not None and self.max_length <= config.sliding_window:
            # no text is long enough for it to matter, and some versions of transformers lose is_causal with it
            window = {"sliding_window": None, KEPT_WINDOW: config.sliding_window}
        name = str(dtype).removeprefix("torch.")
        # transformers >= 5.2 builds a bidirectional mask from is_causal, and from nothing else
        changes = {"is_causal": self.causal, **window, "torch_dtype": name, "dtype": name}
        write_json(folder / "config.json", config.to_dict() | changes | {"pad_token_id": self.tokenizer.pad_id})
        self.tokenizer.save(folder)
        write_json(folder / LLM2VEC_CONFIG, {**self.settings(), **self._recipe(), "exported_from": self.base_model})

    def settings(self) -> dict:
        """What llm2vec_config.json says of how this encoder reads and pools a text. Whatever else a run changes in its encoder
        belongs here, in `SETTINGS` and where `from_pretrained` reads them: so runs and merged folders keep it, and the
        fingerprint sees it."""
        return {
            "causal": self.causal,
            "pooling_mode": self.pooling,
            "max_length": self.max_length,
            "template": list(self.template),
        }

    def _recipe(self) -> dict:
        return {"preset": self.preset} if self.preset else {}

    def keep_adapters(self, folder: str | Path) -> None:
        """Copies the merged adapters' files into a folder and uses the copies from then on: the originals may be replaced while
        a new one trains.

        Raises:
            ValueError: one has gone since it was loaded.
        """
        for file in (adapter / name for adapter in self.adapters for name in (ADAPTER, ADAPTER_CONFIG)):
            if not file.is_file():
                raise ValueError(f"{file}: has gone since it was loaded")
        for number, adapter in enumerate(self.adapters):
            target = Path(folder, str(number))
            target.mkdir(parents=True, exist_ok=True)
            for name in (ADAPTER, ADAPTER_CONFIG, "train_args.json"):
                if (adapter / name).is_file():  # an adapter of others comes without its arguments
                    shutil.copyfile(adapter / name, target / (name + ".part"))
                    put(target / (name + ".part"), target / name)
            self.adapters[number] = target

    def save_run(self, output: str | Path, stage: str) -> None:
        """Writes a stage's result: all but the base weights, so that the folder can be moved and loaded by its name.

        The newest adapter lies at the top, where PEFT finds it; those it stands on in `adapters/`.

        Raises:
            ValueError: there is no adapter or no base to name, other weights than the adapter's are trainable or were trained, an
                adapter was merged since the base was loaded, or `output` is a run that this one stands on.
        """
        output, decoder = Path(output).expanduser(), plain(self.decoder)
        changes = sum(vars(module).get("changes", 0) for module in self.modules())
        kept = {id(p) for m in decoder.modules() if isinstance(m, LoRALinear) for p in (m.lora_A.weight, m.lora_B.weight)}
        lost = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in kept]
        if changes != len(self.adapters):
            raise ValueError(
                f"the base's weights were changed {changes} times (an adapter merged, or they themselves trained), but the encoder was "
                f"loaded with {len(self.adapters)} adapters, and a run would lose the other changes: save() writes the whole model"
            )
        if not self.base_model:
            raise ValueError(
                "the encoder has no base model to name; set base_model, the folder or hub id of its decoder's weights"
            )
        if lost:
            raise ValueError(
                f"{lost[0]} is trainable ({len(lost)} such weights), and a run keeps its adapter only: freeze it, or take it off "
                "and save it apart; save(ANOTHER_FOLDER) writes the whole decoder"
            )
        for number, adapter in enumerate(self.adapters):
            home, place = output.resolve(), adapter.resolve()
            if place.is_relative_to(home) and place != home / "adapters" / str(number):
                raise ValueError(f"{output}: holds an adapter that this run stands on; save the run into a folder of its own")
        config, tensors = adapter_of(decoder, self.base_model)
        self.keep_adapters(output / "adapters")
        output.mkdir(parents=True, exist_ok=True)
        save_adapter(output, config, tensors)
        names = [f"adapters/{number}" for number in range(len(self.adapters))]
        self.tokenizer.save(output)
        write_json(
            output / LLM2VEC_CONFIG,
            {
                "base_model_name_or_path": self.base_model,
                **self._recipe(),
                "adapters": [*names, "."],
                "stage": stage,
                **self.settings(),
            },
        )
        # last: with it the run is finished
        write_json(
            output / "config.json", self.decoder.config.to_dict() | {"_name_or_path": self.base_model, "is_causal": self.causal}
        )


def plain(decoder: Decoder) -> Decoder:
    """The decoder inside what `torch.compile(decoder)` has made of it, where weights have other names."""
    return getattr(decoder, "_orig_mod", decoder)


def sorted_batches(lengths: list[int], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first (so memory peaks at once): at most `batch_size` of them,
    or `max_tokens` once padded; one at least."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or lengths[batch[0]] * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
