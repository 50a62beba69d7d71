"""What a model is (`ModelConfig`) and how the paper trains it (`PRESETS`)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from .files import member, read_json, short

# What transformers assumes when config.json leaves a field out (its LlamaConfig, MistralConfig and Qwen2Config). What else
# tells families apart is where `model_type` is read: here, in `model.py`, and where `memory.py` counts parameters.
FAMILY_DEFAULTS = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131072),
    "qwen2": dict(num_key_value_heads=32, attention_bias=True, max_position_embeddings=32768),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_TYPES = {  # and the numbers that each needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# The name, in an export, of a sliding window that no text is long enough for: transformers must not see it (`write_merged`).
KEPT_WINDOW = "llm2vec_sliding_window"
# Beyond the largest decoders there are: a file that says more is broken, or meant to fill the memory.
MOST = dict(vocab_size=2**22, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=256, num_attention_heads=1024,
            num_key_value_heads=1024, head_dim=1024)  # fmt: skip


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 2**63  # torch takes no larger integer


@dataclass
class ModelConfig:
    """The architecture of a decoder; fields are named as in a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=lambda: {"rope_type": "default"})
    sliding_window: int | None = None  # causal: the last w tokens, the own one included; bidirectional: within w
    attention_bias: bool = False  # on q, k, v (and, except in Qwen2, o)
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        for name, kind in ((f.name, f.type) for f in fields(self)):
            value, most = getattr(self, name), MOST.get(name, 2**31)
            if kind == "int" or (kind == "int | None" and value is not None):
                if type(value) is not int or not 1 <= value <= most:
                    raise ValueError(f"{name} is {short(value)}, expected a whole number from 1 to {most}")
            elif kind == "float" and not is_positive(value):
                raise ValueError(f"{name} is {short(value)}, expected a number above 0 and below 2^63")
            elif kind == "bool" and type(value) is not bool:
                raise ValueError(f"{name} is {short(value)}, expected true or false")
            assert kind in ("int", "int | None", "float", "bool", "str", "dict"), f"{name}: no check for a field of type {kind}"
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number: rotary embeddings turn pairs")
        rope = self.rope_scaling
        for name in ROPE_TYPES[rope["rope_type"]]:
            if not is_positive(rope.get(name)):
                raise ValueError(f"rope_scaling: {name} is {short(rope.get(name))}, expected a number above 0 and below 2^63")
        if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
            raise ValueError(
                f"rope_scaling: low_freq_factor ({rope['low_freq_factor']}) is not below high_freq_factor ({rope['high_freq_factor']})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> ModelConfig:
        """Reads the fields of a `config.json` as transformers 4 or 5 writes it.

        Raises:
            ValueError: an unsupported `model_type`, `hidden_act` or rope type, or a missing size.
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILY_DEFAULTS:
            raise ValueError(f"{source}: model_type is {short(model_type)}, supported are {', '.join(FAMILY_DEFAULTS)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{source}: hidden_act is {short(raw['hidden_act'])}, only 'silu' (SwiGLU) is supported")
        missing = [name for name in REQUIRED if not isinstance(raw.get(name), int)]
        if missing:
            raise ValueError(f"{source}: no whole number for {', '.join(missing)}")

        given = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw and raw[name] is not None}
        known = FAMILY_DEFAULTS[model_type] | given
        if raw.get("num_key_value_heads", 0) is None:  # null: as many as query heads; left out: the family's default
            known["num_key_value_heads"] = raw["num_attention_heads"]
        if "sliding_window" in raw:  # null switches it off
            known["sliding_window"] = raw["sliding_window"]
        if raw.get(KEPT_WINDOW) is not None:
            known["sliding_window"] = raw[KEPT_WINDOW]
        if model_type == "qwen2":  # always with biases on q, k, v, and with a second switch for the window, off by default
            known["attention_bias"] = True
        types = raw.get("layer_types")
        all_are = lambda kind: isinstance(types, list) and bool(types) and all(found == kind for found in types)  # noqa: E731
        if model_type == "qwen2" and known.get("sliding_window") is not None:
            is_on = bool(raw.get("use_sliding_window", False)) and not all_are("full_attention")
            first = raw.get("max_window_layers", 28)  # without layer_types, layers from this one on have the window
            if is_on and types is None and first != 0:
                if type(first) is not int or first < raw["num_hidden_layers"]:
                    raise ValueError(
                        f"{source}: max_window_layers is {short(first)}, but a window on some of the layers only is not supported"
                    )
                is_on = False
            if not is_on:
                known["sliding_window"] = None
        if model_type == "llama":  # transformers' has no window
            known["sliding_window"] = None
        elif known.get("sliding_window") is not None and types is not None and not all_are("sliding_attention"):
            raise ValueError(
                f"{source}: layer_types is {short(types)}, but a window on some of the layers only is not supported"
            )
        known.setdefault("num_key_value_heads", raw["num_attention_heads"])
        known.setdefault("head_dim", raw["hidden_size"] // max(1, raw["num_attention_heads"]))

        # transformers 5 keeps everything about rotary embeddings in one dict, transformers 4 in two fields.
        ropes = []
        for rope in filter(None, (raw.get("rope_parameters"), raw.get("rope_scaling"))):
            if not isinstance(rope, dict):
                raise ValueError(f"{source}: rope_parameters or rope_scaling is {short(rope)}, expected an object")
            kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None] or ["default"]
            numbers = {name: value for name, value in rope.items() if name not in ("rope_type", "type") and value is not None}
            ropes.append({"rope_theta": raw.get("rope_theta", 10000.0), **numbers, "rope_type": kinds[0]})
            said = [(name, ropes[0].get(name), ropes[-1].get(name)) for name in ropes[0] | ropes[-1]]
            for name, one, other in [("rope_type", kinds[0], kinds[-1]), *said]:
                if one != other:
                    raise ValueError(f"{source}: {name} of the rotary embeddings is both {short(one)} and {short(other)}")
        rope = ropes[0] if ropes else {"rope_theta": raw.get("rope_theta", 10000.0), "rope_type": "default"}
        known["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] not in tuple(ROPE_TYPES):  # a tuple, because a list has no hash
            raise ValueError(f"{source}: rope type is {short(rope['rope_type'])}, supported are {', '.join(ROPE_TYPES)}")
        known["rope_scaling"] = rope
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Reads `folder/config.json`."""
        path = member(folder, "config.json")
        if not path.is_file():
            raise ValueError(f"{path}: not found; a model folder holds a Hugging Face config.json")
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict:
        """The fields of a `config.json` that transformers 4 and 5 both read."""
        architecture = {"llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model"}[self.model_type]
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__}
        scaled = self.rope_scaling["rope_type"] != "default"
        raw |= {
            "architectures": [architecture],
            "hidden_act": "silu",
            "rope_scaling": self.rope_scaling if scaled else None,
            "rope_parameters": self.rope_scaling | {"rope_theta": self.rope_theta},
        }
        if self.model_type == "qwen2":
            raw |= {"use_sliding_window": self.sliding_window is not None, "max_window_layers": 0}
        return raw


@dataclass(frozen=True)
class Preset:
    """A model by a short name: where it is, and how the paper trains it (fields of `training.Settings` per stage)."""

    model: str  # hub id, or a folder of this package
    mntp: dict = field(default_factory=dict)
    simcse: dict = field(default_factory=dict)
    supervised: dict = field(default_factory=dict)
    template: tuple[str, str] = ("", "")  # around instruction and text, in encoding and stage 3; MNTP and SimCSE use none
    adapters: tuple[str, ...] = ()  # hub ids or folders to merge on top of `model`, in order


# LLM2Vec sections 2.2 and D.1 (pretrain is not the paper's: it made `tiny`); the same for every model except where a preset
# says otherwise.
PAPER = {
    "mntp": dict(steps=1000, batch_size=32, max_length=512, lr=5e-5, mask_probability=0.2, mask_style="bert"),
    "simcse": dict(steps=1000, batch_size=128, max_length=128, lr=3e-5, attention_dropout=0.3, temperature=0.05),
    "supervised": dict(steps=1000, batch_size=512, max_length=512, lr=2e-4, warmup_steps=300, temperature=0.02),
    "pretrain": dict(
        steps=9000, batch_size=32, max_length=128, lr=3e-3, warmup_steps=200, schedule="cosine",
        weight_decay=0.1, adam_beta2=0.95, eval_every=1000,
    ),
}  # fmt: skip
# So that each fits into 24 GB (`--dry-run`). What is trained is the same.
_EIGHT, _CHECKPOINTS = dict(micro_batch_size=8), dict(gradient_checkpointing=True)
SMALL = dict(mntp=_EIGHT, simcse=_CHECKPOINTS, supervised=_EIGHT)  # 1-2B
BIG = dict(
    mntp=_CHECKPOINTS | _EIGHT, simcse=_CHECKPOINTS | dict(micro_batch_size=32), supervised=_CHECKPOINTS | _EIGHT
)  # 3-8B
MISTRAL = BIG | dict(mntp=BIG["mntp"] | dict(mask_probability=0.8, mask_style="all"))
CHAT = ("[INST] ", " [/INST]")
LLAMA_3_CHAT = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
PRESETS = {
    "tiny": Preset(
        str(Path(__file__).parent / "assets" / "tiny"),
        mntp=dict(steps=250, batch_size=16, max_length=128, lr=1e-3),
        simcse=dict(steps=150, batch_size=64, max_length=64, lr=1e-3),
        supervised=dict(steps=80, batch_size=64, max_length=64, lr=5e-4, warmup_steps=8, temperature=0.05),
    ),
    "smollm2-135m": Preset(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        mntp=dict(steps=350, batch_size=8, max_length=128, lr=1e-3, warmup_steps=20),
        simcse=dict(steps=200, batch_size=32, max_length=32, lr=3e-4, warmup_steps=10),
        supervised=dict(steps=200, batch_size=32, max_length=64, lr=2e-4, warmup_steps=20, micro_batch_size=32),
    ),
    "sheared-llama-1.3b": Preset("princeton-nlp/Sheared-LLaMA-1.3B", **SMALL),
    "llama-2-7b": Preset("meta-llama/Llama-2-7b-chat-hf", **BIG, template=CHAT),
    "mistral-7b": Preset("mistralai/Mistral-7B-Instruct-v0.2", **MISTRAL, template=CHAT),
    "llama-3-8b": Preset("meta-llama/Meta-Llama-3-8B-Instruct", **BIG, template=LLAMA_3_CHAT),
    "llama-3.1-8b": Preset("meta-llama/Llama-3.1-8B-Instruct", **BIG, template=LLAMA_3_CHAT),
    "llama-3.2-1b": Preset("meta-llama/Llama-3.2-1B", **SMALL),
    "llama-3.2-3b": Preset("meta-llama/Llama-3.2-3B", **BIG),
    "qwen2-1.5b": Preset("Qwen/Qwen2-1.5B", **SMALL),
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B", **SMALL),
    "qwen2.5-7b": Preset("Qwen/Qwen2.5-7B", **BIG),
}

# What `train.py` makes of `tiny` at its defaults, seed 0: an adapter of each stage, and of the two shortcuts.
_ADAPTERS = Path(__file__).parent / "assets" / "tiny" / "adapters"
for _name, _stages in {
    "mntp": ("mntp",), "llm2vec": ("mntp", "simcse"), "supervised": ("mntp", "simcse", "supervised"),
    "causal-simcse": ("causal-simcse",), "bidirectional-simcse": ("bidirectional-simcse",),
}.items():  # fmt: skip
    _folders = tuple(str(_ADAPTERS / stage) for stage in _stages)
    PRESETS[f"tiny-{_name}"] = replace(PRESETS["tiny"], model="tiny", adapters=_folders)

# What the authors published: an MNTP adapter over each base, and two that go on top of it.
for _short, _repo, _base in (
    ("sheared-llama", "LLM2Vec-Sheared-LLaMA", "sheared-llama-1.3b"),
    ("llama-2", "LLM2Vec-Llama-2-7b-chat-hf", "llama-2-7b"),
    ("mistral", "LLM2Vec-Mistral-7B-Instruct-v2", "mistral-7b"),
    ("llama-3", "LLM2Vec-Meta-Llama-3-8B-Instruct", "llama-3-8b"),
):
    _mntp = f"McGill-NLP/{_repo}-mntp"
    PRESETS[f"llm2vec-{_short}-mntp"] = replace(PRESETS[_base], model=_mntp)
    for _last in ("unsup-simcse", "supervised"):
        PRESETS[f"llm2vec-{_short}-{_last}"] = replace(PRESETS[_base], model=_mntp, adapters=(f"{_mntp}-{_last}",))
