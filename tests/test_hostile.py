"""Files of strangers: each is refused in one line that names the file and the field, within 2 s and 200 MB, and runs nothing.

The cases run one after another in one other process, whose memory is bounded: `python tests/test_hostile.py MODEL OUT.json`.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

MB = 2**20
CASES: dict[str, tuple] = {}  # name -> (what is done to the folder, the file that the error names, words of the error)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, SETTINGS = "tokenizer.json", "tokenizer_config.json", "llm2vec_config.json"
ADAPTER, ADAPTER_CONFIG, BIN = "adapter_model.safetensors", "adapter_config.json", "pytorch_model.bin"


def case(name: str, file: str, words: str = ""):
    """A decorator: the function spoils a copy of a good folder, and loading it must then blame that file."""

    def add(spoil):
        assert name not in CASES, name
        CASES[name] = (spoil, file, words)
        return spoil

    return add


def change(folder: Path, file: str, **fields) -> None:
    """Other fields in a JSON file; the value itself may be a piece of text to insert as it stands."""
    raw = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    texts = {name: value if isinstance(value, Raw) else json.dumps(value) for name, value in (raw | fields).items()}
    (folder / file).write_text("{" + ", ".join(f'"{name}": {text}' for name, text in texts.items()) + "}")


class Raw(str):
    """Text that stands in a JSON file as it is."""


# ---- config.json ----

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
for name, fields, words in [
    ("a billion layers", dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    ("no layer", dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    ("negative layers", dict(num_hidden_layers=-3), "num_hidden_layers is -3"),
    ("layers as text", dict(num_hidden_layers="three"), "num_hidden_layers"),
    ("layers true", dict(num_hidden_layers=True), "num_hidden_layers is True"),
    ("layers as a fraction", dict(num_hidden_layers=2.5), "num_hidden_layers"),
    ("huge vocabulary", dict(vocab_size=10**12), "vocab_size is 1000000000000"),
    ("negative hidden size", dict(hidden_size=-64), "hidden_size is -64"),
    ("huge hidden size", dict(hidden_size=10**9), "hidden_size is 1000000000"),
    ("huge intermediate size", dict(intermediate_size=10**15), "intermediate_size"),
    ("no heads", dict(num_attention_heads=0), "num_attention_heads is 0"),
    ("huge heads", dict(num_attention_heads=10**8), "num_attention_heads"),
    ("no key heads", dict(num_key_value_heads=0), "num_key_value_heads is 0"),
    ("head_dim of 0", dict(head_dim=0), "head_dim is 0"),
    ("odd head_dim", dict(head_dim=15), "head_dim is 15"),
    ("huge head_dim", dict(head_dim=10**9), "head_dim"),
    ("norm eps as text", dict(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
    ("norm eps NaN", dict(rms_norm_eps=Raw("NaN")), "NaN"),
    ("norm eps below 0", dict(rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06"),
    ("theta infinite", dict(rope_parameters=None, rope_theta=Raw("1e999")), "rope_theta is inf"),
    ("theta of 10^30", dict(rope_parameters=dict(rope_type="default", rope_theta=10**30)), "rope_theta is 1000000"),
    ("theta of 0", dict(rope_parameters=dict(rope_type="default", rope_theta=0)), "rope_theta is 0"),
    ("theta a list", dict(rope_parameters=dict(rope_type="default", rope_theta=[1])), "rope_theta is [1]"),
    ("theta of 5000 digits", dict(rope_theta=Raw("1" * 5000)), "integer"),
    ("rope a list", dict(rope_parameters=[1, 2]), "rope_scaling is [1, 2]"),
    ("rope type a list", dict(rope_parameters=dict(rope_type=["linear"])), "rope type is ['linear']"),
    ("linear without factor", dict(rope_parameters=dict(rope_type="linear")), "factor is None"),
    ("linear by 0", dict(rope_parameters=dict(rope_type="linear", factor=0)), "factor is 0"),
    ("llama3 without a bound", dict(rope_parameters=LLAMA3 | dict(low_freq_factor=None)), "low_freq_factor is None"),
    ("llama3 with equal bounds", dict(rope_parameters=LLAMA3 | dict(low_freq_factor=4.0)), "is not below high_freq_factor"),
    ("window below 0", dict(model_type="mistral", sliding_window=-1), "sliding_window is -1"),
    ("window as text", dict(model_type="mistral", sliding_window="wide"), "sliding_window is 'wide'"),
    ("positions as text", dict(max_position_embeddings="many"), "max_position_embeddings is 'many'"),
    ("bias as text", dict(attention_bias="no"), "attention_bias is 'no'"),
    ("tied as a number", dict(tie_word_embeddings=7), "tie_word_embeddings is 7"),
    ("model type a list", dict(model_type=["llama"]), "model_type is ['llama']"),
    ("model type of a megabyte", dict(model_type="x" * MB), "model_type is 'xxx"),
    ("model type unknown", dict(model_type="gpt\nneo"), "model_type is 'gpt\\nneo'"),
    ("activation an object", dict(hidden_act={"a": 1}), "hidden_act is {'a': 1}"),
    ("window from a layer on", dict(model_type="qwen2", use_sliding_window=True, max_window_layers="x", sliding_window=4),
     "max_window_layers is 'x', but a window on some of the layers"),
    ("a window on some layers", dict(model_type="mistral", sliding_window=4,
     layer_types=["full_attention", "sliding_attention", "full_attention"]), "a window on some of the layers only"),
    ("layer types a word", dict(model_type="mistral", layer_types="x"), "layer_types is 'x'"),
    ("two ropes", dict(rope_parameters=dict(rope_type="default"), rope_scaling=dict(type="linear", factor=8)), "rope_type of the rotary embeddings is both 'default' and 'linear'"),
    ("two types of a rope", dict(rope_parameters=dict(rope_type="default", type="linear", factor=2)), "is both 'default' and 'linear'"),
    ("larger than its weights", dict(hidden_size=128), "do not fit"),
]:  # fmt: skip
    where = "" if words == "do not fit" else CONFIG
    case(f"config: {name}", where, words)(lambda folder, fields=fields: change(folder, CONFIG, **fields))

for name, data, words in [
    ("empty", b"", "not a readable JSON"),
    ("a list", b"[]", "holds a list"),
    ("cut short", b'{"model_type": "lla', "not a readable JSON"),
    ("UTF-16", '{"a": 1}'.encode("utf-16"), "not a readable JSON"),
    ("not text", bytes(range(256)), "not a readable JSON"),
    ("deep", b"[" * 10**6, "not a readable JSON"),
    ("deep object", b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "not a readable JSON"),
    ("a million keys", b"{" + b",".join(b'"key%d": 0' % i for i in range(10**6)) + b"}", "larger than 8 MB"),
    ("a key twice", b'{"model_type": "llama", "model_type": "mistral"}', "'model_type' stands twice"),
    ("half a character", b'{"model_type": "\\ud800"}', "surrogates not allowed"),
    ("a long key twice", b'{"%s": 1, "%s": 2}' % (b"k" * MB, b"k" * MB), "stands twice"),
    ("an infinity", b'{"a": -Infinity}', "-Infinity is no number"),
]:
    case(f"config.json: {name}", CONFIG, words)(lambda folder, data=data: (folder / CONFIG).write_bytes(data))

for file in (CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG):

    @case(f"a link out: {file}", file, "leads out of its folder")
    def link_out(folder, file=file):
        shutil.move(folder / file, folder.parent / "outside")
        (folder / file).symlink_to(folder.parent / "outside")

    @case(f"a link to itself: {file}", file if file != TOKENIZER_CONFIG else "", "")
    def link_round(folder, file=file):
        (folder / file).unlink()
        (folder / file).symlink_to(folder / file)

    @case(f"a link to nothing: {file}", file, "" if file == WEIGHTS else "is a link to what is not there")
    def link_nowhere(folder, file=file):
        (folder / file).unlink()
        (folder / file).symlink_to(folder / "gone")

    @case(f"an endless device: {file}", file, "" if file == WEIGHTS else "leads out of its folder")
    def link_device(folder, file=file):
        (folder / file).unlink()
        (folder / file).symlink_to("/dev/zero")

    if file in (CONFIG, WEIGHTS):

        @case(f"a folder: {file}", file, "")
        def is_folder(folder, file=file):
            (folder / file).unlink()
            (folder / file).mkdir()


# ---- safetensors ----


def safetensors_file(header, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read_header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


for name, data, words in [
    ("empty", b"", ""),
    ("seven bytes", b"1234567", ""),
    ("a header of 2^63 bytes", safetensors_file(b"{}", size=2**63), "a header of 9223372036854775808"),
    ("a header of 99 MB", safetensors_file(b"{}", size=99 * 10**6), "a header of 99000000"),
    ("a header longer than the file", safetensors_file(b"{}", size=1000), ""),
    ("a header that is no JSON", safetensors_file(b"\x00\xff" * 50), ""),
    ("a deep header", safetensors_file(b'{"a":' + b"[" * 10**5), ""),
    ("a list", safetensors_file([1, 2]), ""),
    ("a negative shape", safetensors_file({"a": tensor(shape=(-2,))}, b"\0" * 8), ""),
    ("a shape of fractions", safetensors_file({"a": tensor(shape=(0.5,))}, b"\0" * 8), ""),
    ("a shape that overflows", safetensors_file({"a": tensor(shape=(2**40, 2**40))}, b"\0" * 8), ""),
    ("offsets beyond the end", safetensors_file({"a": tensor(offsets=(0, 800), shape=(200,))}, b"\0" * 8), ""),
    ("negative offsets", safetensors_file({"a": tensor(offsets=(-8, 0))}, b"\0" * 8), ""),
    ("offsets backwards", safetensors_file({"a": tensor(offsets=(8, 0))}, b"\0" * 8), ""),
    ("overlapping offsets", safetensors_file({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"\0" * 12), ""),
    ("a hole", safetensors_file({"a": tensor(), "b": tensor(offsets=(16, 24))}, b"\0" * 24), ""),
    ("bytes that are no one's", safetensors_file({"a": tensor()}, b"\0" * 800), ""),
    ("10 GB declared in 1 KB", safetensors_file({"a": tensor(shape=(25 * 10**8,), offsets=(0, 10**10))}, b"\0" * 900), ""),
    ("an unknown dtype", safetensors_file({"a": tensor(dtype="F99")}, b"\0" * 8), ""),
    ("an infinite offset", safetensors_file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}}', b"\0" * 8), ""),
    ("a pickle", pickle.dumps({"a": 1}), ""),
]:  # fmt: skip
    case(f"weights: {name}", WEIGHTS, words or "not a readable safetensors file")(
        lambda folder, data=data: (folder / WEIGHTS).write_bytes(data)
    )


@case("weights: 140,000 empty tensors", "", "unexpected")
def many_tensors(folder):
    entry = json.dumps(tensor(shape=(0,), offsets=(0, 0)), separators=(",", ":"))
    text = "{" + ",".join(f'"{i}":{entry}' for i in range(140_000)) + "}"
    (folder / WEIGHTS).write_bytes(safetensors_file(text.encode()))


@case("weights: a name of many lines", "", "unexpected: a\\nb")
def line_breaks(folder):
    (folder / WEIGHTS).write_bytes(safetensors_file({"a\nb": tensor(), "__metadata__": {"format": "pt"}}, b"\0" * 8))


for dtype in ("I32", "F8_E4M3"):

    @case(f"weights: a norm in {dtype}", "", f"model.norm.weight holds {dtype}")
    def other_dtype(folder, dtype=dtype):
        size = 4 if dtype == "I32" else 1
        header, data = read_header(folder / WEIGHTS)
        header["model.norm.weight"] |= {"dtype": dtype, "data_offsets": [len(data), len(data) + 64 * size]}
        hole = json.loads((folder / CONFIG).read_text())  # the old one's place belongs to a tensor that nobody wants
        assert hole["hidden_size"] == 64
        header["spare"] = tensor(shape=(64,), offsets=read_header(folder / WEIGHTS)[0]["model.norm.weight"]["data_offsets"])
        (folder / WEIGHTS).write_bytes(safetensors_file(header, data + b"\1" * 64 * size))


@case("weights: another shape of as many numbers", "", "model.layers.0.mlp.up_proj.weight is (64, 112)")
def transposed(folder):
    header, data = read_header(folder / WEIGHTS)
    header["model.layers.0.mlp.up_proj.weight"]["shape"].reverse()
    (folder / WEIGHTS).write_bytes(safetensors_file(header, data))


@case("weights: a sparse file of 10 GB", WEIGHTS, "not a readable safetensors")
def sparse(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.truncate(10 * 2**30)


@case("weights: none", "", "no weights found")
def no_weights(folder):
    (folder / WEIGHTS).unlink()


# ---- index ----


def put_index(folder: Path, text) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    (folder / INDEX).write_text(text if isinstance(text, str) else json.dumps(text))


for name, value, words in [
    ("no weight_map", {"metadata": {}}, "weight_map must name files"),
    ("an empty one", {"weight_map": {}}, "weight_map must name files"),
    ("a list", {"weight_map": ["a.safetensors"]}, "weight_map must name files"),
    ("numbers", {"weight_map": {"a": 1}}, "weight_map must name files"),
    ("lists of files", {"weight_map": {"a": ["a.safetensors"]}}, "weight_map must name files"),
    ("out of the folder", {"weight_map": {"a": "../../x"}}, "weight_map must name files of its own folder, found {'a': '../../x'}"),
    ("an absolute path", {"weight_map": {"a": "/etc/passwd"}}, "weight_map must name files"),
    ("the folder above", {"weight_map": {"a": ".."}}, "weight_map must name files"),
    ("a zero byte", {"weight_map": {"a": "a\0b.safetensors"}}, "weight_map must name files"),
    ("another kind of file", {"weight_map": {"a": "config.json"}}, "weight_map must name files"),
    ("a folder below", {"weight_map": {"a": "b/c.safetensors"}}, "weight_map must name files"),
    ("nothing", {"weight_map": {"a": ""}}, "weight_map must name files"),
    ("a name of a megabyte", {"weight_map": {"a": "../" + "x" * MB}}, "weight_map must name files"),
    ("a million entries", '{"weight_map": {' + ",".join(f'"{i}":"a"' for i in range(10**6)) + "}}", "larger than 8 MB"),
    ("deep", '{"weight_map": ' + '{"a":' * 10**5, "not a readable JSON"),
]:  # fmt: skip
    case(f"index: {name}", INDEX, words)(lambda folder, value=value: put_index(folder, value))

case("index: a shard that is not there", "b.safetensors", "not found")(
    lambda folder: put_index(folder, {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
)


@case("index: a shard that is a link out", "b.safetensors", "leads out of its folder")
def shard_link(folder):
    put_index(folder, {"weight_map": {"a": "b.safetensors"}})
    (folder / "b.safetensors").symlink_to("/etc/passwd")


@case("index: a tensor in two shards", "", "is there twice")
def twice(folder):
    put_index(folder, {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


# ---- pickles ----


class Touch:
    """Unpickled, it leaves a file behind: the proof that code ran."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def save_bin(folder: Path, value) -> None:
    import torch

    (folder / WEIGHTS).unlink(missing_ok=True)
    torch.save(value, folder / BIN)


def with_pickle(folder: Path, data: bytes, compression=zipfile.ZIP_STORED) -> None:
    """A .bin whose pickle is replaced by another."""
    save_bin(folder, {})
    with zipfile.ZipFile(folder / BIN) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / BIN, "w", compression) as archive:
        for name, part in parts.items():
            archive.writestr(name, data if name.endswith("data.pkl") else part)


case("bin: code", BIN, "not a readable weight file")(lambda folder: save_bin(folder, {"a": Touch(folder / "ran")}))
case("bin: code in a bare pickle", BIN, "not a readable weight file")(
    lambda folder: (save_bin(folder, {}), (folder / BIN).write_bytes(pickle.dumps(Touch(folder / "ran"))))
)
case("bin: eval by name", BIN, "not a readable weight file")(
    lambda folder: with_pickle(folder, b"cbuiltins\neval\n(V__import__('os').system('touch ran')\ntR.")
)
case("bin: a compressed bomb", BIN, "its parts are larger than the file")(
    lambda folder: with_pickle(folder, b"\0" * 300 * MB, zipfile.ZIP_DEFLATED)
)
case("bin: empty", BIN, "not a readable weight file")(lambda folder: (save_bin(folder, {}), (folder / BIN).write_bytes(b"")))
case("bin: text", BIN, "not a readable weight file")(lambda folder: (save_bin(folder, {}), (folder / BIN).write_text("x" * 99)))
case("bin: a list", BIN, "holds a list")(lambda folder: save_bin(folder, [1, 2]))
case("bin: numbers for names", BIN, "expected named tensors")(lambda folder: save_bin(folder, {1: 2}))
case("bin: objects", BIN, "'a' is no plain tensor")(lambda folder: save_bin(folder, {"a": {"b": 1}}))
case("bin: nothing", BIN, "expected named tensors")(lambda folder: save_bin(folder, {}))


@case("bin: one number shown as 40 GB", BIN, "its tensors say 40000000000 bytes")
def expanded(folder):
    import torch

    save_bin(folder, {"a": torch.zeros(1).expand(10**10)})


@case("bin: a sparse tensor of any size", BIN, "is no plain tensor")
def sparse_tensor(folder):
    import torch

    save_bin(folder, {"a": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,))})


@case("bin: a link out", BIN, "leads out of its folder")
def bin_link(folder):
    save_bin(folder, {})
    shutil.move(folder / BIN, folder.parent / "outside")
    (folder / BIN).symlink_to(folder.parent / "outside")


# ---- adapters ----


def make_adapter(folder: Path, **fields) -> None:
    """The folder becomes a PEFT folder on top of a model beside it."""
    base = folder.parent / "base"
    shutil.copytree(folder, base)
    for file in folder.iterdir():
        file.unlink()
    config = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"], base_model_name_or_path=str(base))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    header, data = {}, b""
    for layer in range(3):
        for name, shape in (("A", (2, 64)), ("B", (64, 2))):
            key = f"base_model.model.layers.{layer}.self_attn.q_proj.lora_{name}.weight"
            header[key] = tensor(shape=shape, offsets=(len(data), len(data) + 512))
            data += b"\0" * 512
    (folder / ADAPTER).write_bytes(safetensors_file(header, data))
    change(folder, ADAPTER_CONFIG, **fields)


for name, fields, words in [
    ("rank 10^9", dict(r=10**9), "r is 1000000000"),
    ("rank 0", dict(r=0), "r is 0"),
    ("rank -1", dict(r=-1), "r is -1"),
    ("rank true", dict(r=True), "r is True"),
    ("rank as text", dict(r="two"), "r is 'two'"),
    ("no rank", dict(r=None), "r is None"),
    ("alpha NaN", dict(lora_alpha=Raw("NaN")), "NaN is no number"),
    ("alpha infinite", dict(lora_alpha=Raw("1e999")), "lora_alpha is inf"),
    ("alpha a list", dict(lora_alpha=[4]), "lora_alpha is [4]"),
    ("dropout 1", dict(lora_dropout=1), "lora_dropout is 1"),
    ("dropout as text", dict(lora_dropout="low"), "lora_dropout is 'low'"),
    ("another type", dict(peft_type=["LORA"]), "peft_type is ['LORA']"),
    ("another bias", dict(bias={"all": 1}), "bias is {'all': 1}"),
    ("a pattern of ranks", dict(rank_pattern={"x" * 999: 1}), "rank_pattern is {'xxx"),
    ("no base", dict(base_model_name_or_path=None), "base_model_name_or_path is None"),
    ("a number as base", dict(base_model_name_or_path=5), "base_model_name_or_path is 5"),
    ("layers twice", dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication is [[0, 2], [1, 3]], which is not supported"),
    ("rslora as text", dict(use_rslora="no"), "use_rslora is 'no'"),
]:
    file = ADAPTER_CONFIG
    case(f"adapter: {name}", file, words)(lambda folder, fields=fields: make_adapter(folder, **fields))

case("adapter: of another rank than it says", "", "is (2, 64), expected (65536, 64)")(
    lambda folder: make_adapter(folder, r=65536)
)
case("adapter: a base that is not there", ADAPTER_CONFIG, "'/not/there' is neither a folder")(
    lambda folder: make_adapter(folder, base_model_name_or_path="/not/there")
)


@case("adapter: without weights", ADAPTER, "not found")
def no_adapter(folder):
    make_adapter(folder)
    (folder / ADAPTER).unlink()


@case("adapter: its own base by way of another", "", "names itself as its base model")
def circle(folder):
    make_adapter(folder, base_model_name_or_path=str(folder.parent / "second"))
    shutil.copytree(folder, folder.parent / "second")
    change(folder.parent / "second", ADAPTER_CONFIG, base_model_name_or_path=str(folder))


for name, header, words in [
    ("empty", {}, "missing: layers.0.self_attn.q_proj, layers.1.self_attn.q_proj"),
    ("of whole numbers", {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": tensor("I32", (2, 64), (0, 512))}, "holds I32"),
    ("for no layer", {"base_model.model.layers.0.self_attn.x_proj.lora_A.weight": tensor()}, "unexpected: layers.0.self_attn.x_proj"),
    ("with a name of any kind", {"../../x\n": tensor()}, "unexpected: ../../x\\n"),
    ("for one layer of three", {
        f"base_model.model.layers.0.self_attn.q_proj.lora_{n}.weight": tensor(shape=shape, offsets=(at, at + 512))
        for n, shape, at in (("A", (2, 64), 0), ("B", (64, 2), 512))}, "missing: layers.1.self_attn.q_proj"),
    ("with a layer twice", {
        f"base_model.model.{m}layers.0.self_attn.q_proj.lora_A.weight": tensor(shape=(2, 64), offsets=(at, at + 512))
        for m, at in (("", 0), ("model.", 512))}, "unexpected: layers.0.self_attn.q_proj.lora_A"),
]:  # fmt: skip

    @case(f"adapter: {name}", "", words)
    def adapter_file(folder, header=header):
        make_adapter(folder)
        size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        (folder / ADAPTER).write_bytes(safetensors_file(header, b"\0" * size))


@case("adapter: a link out", ADAPTER, "leads out of its folder")
def adapter_link(folder):
    make_adapter(folder)
    shutil.move(folder / ADAPTER, folder.parent / "outside")
    (folder / ADAPTER).symlink_to(folder.parent / "outside")


# ---- llm2vec_config.json ----

for name, fields, words in [
    ("pooling unknown", dict(pooling_mode="cls"), "pooling_mode is 'cls'"),
    ("pooling a list", dict(pooling_mode=["mean"]), "pooling_mode is ['mean']"),
    ("length 0", dict(max_length=0), "max_length is 0"),
    ("length 10^12", dict(max_length=10**12), "max_length is 1000000000000"),
    ("length as text", dict(max_length="512"), "max_length is '512'"),
    ("causal as text", dict(causal="no"), "causal is 'no'"),
    ("template a word", dict(template="ab"), "template is 'ab'"),
    ("template of three", dict(template=["a", "b", "c"]), "template is ['a', 'b', 'c']"),
    ("template of numbers", dict(template=[1, 2]), "template is [1, 2]"),
    ("preset unknown", dict(preset=["tiny"]), "preset is ['tiny']"),
    ("adapters a word", dict(adapters="x", base_model_name_or_path="tiny"), "adapters is 'x'"),
    ("adapters of numbers", dict(adapters=[1], base_model_name_or_path="tiny"), "adapters is [1]"),
    ("adapters without base", dict(adapters=["."]), "no base_model_name_or_path"),
    ("base a number", dict(adapters=["."], base_model_name_or_path=4), "base_model_name_or_path is 4"),
]:
    case(f"settings: {name}", SETTINGS, words)(lambda folder, fields=fields: change(folder, SETTINGS, **fields))

for name, target in (("above", "../../x"), ("absolute", "/etc")):
    case(f"settings: adapters {name}", "", "leads out of its folder")(
        lambda folder, target=target: change(folder, SETTINGS, adapters=[target], base_model_name_or_path="tiny")
    )


# ---- tokenizer.json and tokenizer_config.json ----


def edit_tokenizer(folder: Path, edit) -> None:
    raw = json.loads((folder / TOKENIZER).read_text())
    edit(raw)
    (folder / TOKENIZER).write_text(json.dumps(raw))


for name, data in [
    ("empty", b""),
    ("an empty object", b"{}"),
    ("a list", b"[]"),
    ("UTF-16", "{}".encode("utf-16")),
    ("deep", b'{"version": ' + b"[" * 10**6),
    ("a million keys", b"{" + b",".join(b'"key%d": 0' % i for i in range(10**6)) + b"}"),
    ("a million numbers", b'{"version": "1.0", "model": [' + b"0," * 10**6 + b"0]}"),
    ("a model of another kind", b'{"version": "1.0", "model": {"type": "Tree", "vocab": {}}}'),
    ("a word model without words", b'{"version": "1.0", "model": {"type": "WordPiece"}}'),
    ("a negative id", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
    ("a merge of unknown parts", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}'),
    ("a model of sentencepiece", b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"),
]:
    case(f"tokenizer: {name}", TOKENIZER, "the tokenizer fails")(
        lambda folder, data=data: (folder / TOKENIZER).write_bytes(data)
    )
case("tokenizer: none", TOKENIZER, "not found")(lambda folder: (folder / TOKENIZER).unlink())
case("tokenizer: 65 MB", TOKENIZER, "is larger than 64 MB")(lambda folder: os.truncate(folder / TOKENIZER, 65 * MB))
case("tokenizer: a pattern that is none", TOKENIZER, "the tokenizer fails")(
    lambda folder: edit_tokenizer(
        folder,
        lambda raw: raw.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
        ),
    )
)
case("tokenizer: an id of 4 billion", TOKENIZER, "has the token id 4000000000")(
    lambda folder: edit_tokenizer(folder, lambda raw: raw["model"]["vocab"].update(zzz=4 * 10**9))
)
case("tokenizer: more tokens than embeddings", TOKENIZER, "but config.json's vocab_size is 600")(
    lambda folder: edit_tokenizer(folder, lambda raw: raw["model"]["vocab"].update({f"zz{i}": 600 + i for i in range(9)}))
)
case("tokenizer: a beginning without an embedding", TOKENIZER, "has the token id 99999")(
    lambda folder: edit_tokenizer(folder, lambda raw: raw["post_processor"]["special_tokens"]["<s>"].update(ids=[99999]))
)
for name, fields, words in [
    ("a number as token", dict(bos_token=5), "bos_token is 5"),
    ("a list as token", dict(pad_token=["<s>"]), "pad_token is ['<s>']"),
    ("an object of numbers", dict(eos_token={"content": 1}), "eos_token is {'content': 1}"),
    ("NaN", dict(model_max_length=Raw("NaN")), "NaN is no number"),
    ("a key twice", dict(x=Raw('1, "x": 2')), "'x' stands twice"),
]:
    case(f"tokenizer_config: {name}", TOKENIZER_CONFIG, words)(
        lambda folder, fields=fields: change(folder, TOKENIZER_CONFIG, **fields)
    )


# ---- the process that meets them ----


def peak_memory(reset: bool = False) -> float:
    """MB: the most this process has held since the last reset (Linux; elsewhere 0)."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except OSError:
        return 0.0
    return int(line.split()[1]) / 1024


def meet_all(model: str, output: str) -> None:
    import resource

    from llm2vec_min import LLM2Vec

    LLM2Vec.from_pretrained(model, device="cpu").encode("what is imported at first use is not the case's")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages:  # so that a case that gets through breaks here, and not the machine
        limit = pages * resource.getpagesize() + 1000 * MB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    results = {}
    for name, (spoil, _, _) in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            shutil.copytree(model, folder)
            os.environ["XDG_CACHE_HOME"] = place
            spoil(folder)
            before, started = peak_memory(reset=True), time.process_time()
            try:
                LLM2Vec.from_pretrained(folder, device="cpu")
                error, kind = "", "nothing"
            except BaseException as found:
                error, kind = str(found), type(found).__name__
            results[name] = dict(
                kind=kind, error=error, seconds=time.process_time() - started, mb=peak_memory() - before,
                ran=any(Path(p).exists() for p in (folder / "ran", "ran")), folder=str(folder),
            )  # fmt: skip
    Path(output).write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("hostile") / "results.json"
    command = [sys.executable, __file__, str(model_folder), str(output)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(results, name):
    _, file, words = CASES[name]
    found = results[name]
    assert found["kind"] == "ValueError", found
    error = found["error"]
    assert f"{file}" in error and words in error and str(Path(found["folder"]).parent) in error, error
    assert "\n" not in error and len(error) < 1800, error
    assert found["seconds"] < 2 and found["mb"] < 200, found
    assert not found["ran"], "code ran"


if __name__ == "__main__":
    meet_all(*sys.argv[1:])
