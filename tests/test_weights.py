"""Checkpoints and adapters, read and written, against transformers and peft; broken ones are refused in one error."""

import copy
import fcntl
import json
import os
import shutil
import stat
import threading
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers

from conftest import CLASSES, VARIANTS, make_reference, random_batch, run_reference
from llm2vec_min.config import ModelConfig
from llm2vec_min.files import locked, new_folder
from llm2vec_min.lora import LoRALinear, add_lora, merge_lora
from llm2vec_min.weights import adapter_of, load_adapter, load_decoder, load_language_model, save_adapter, save_checkpoint

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_round_trip(reference, variant, tmp_path):
    """transformers reads what we write and means the same; so do we, from the layouts of transformers 4 and 5."""
    model, folder = reference(variant)
    config = ModelConfig.from_folder(folder)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_folder(tmp_path) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for name in ("hidden_size", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(theirs, name) == getattr(model.config, name), name
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert ModelConfig.from_dict(raw) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', supported are llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type is 'yarn'"),
        ({"hidden_size": None}, "no whole number for hidden_size"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
    ],
)
def test_unsupported_config(reference, change, message):
    _, folder = reference("llama")
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(json.loads((folder / "config.json").read_text()) | change)


def test_sharded_headless_and_tied(reference, tmp_path):
    model, folder = reference("llama")
    ids, _ = random_batch()
    expected = run_reference(model.model, ids, causal=False).last_hidden_state
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    model.model.save_pretrained(tmp_path / "headless")
    for name in ("sharded", "headless"):
        torch.testing.assert_close(load_decoder(tmp_path / name)(ids, causal=False), expected, **TOLERANCE)
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        load_language_model(tmp_path / "headless")
    _, tied = reference("llama-tied")
    mine = load_language_model(tied)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
@pytest.mark.parametrize("shard", [10**9, 60_000])
def test_saved_checkpoint_loads_in_transformers(reference, variant, shard, tmp_path):
    model, folder = reference(variant)
    mine = load_language_model(folder)
    save_checkpoint(mine, tmp_path, torch.float32, max_shard_bytes=shard)
    config = mine.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids, _ = random_batch()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not list(tmp_path.glob("*.part"))


def test_dtype_and_freezing(reference):
    _, folder = reference("llama")
    decoder = load_decoder(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in decoder.parameters()) and not decoder.training


def test_all_misfits_in_one_error(reference, tmp_path):
    _, folder = reference("llama")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.9.surprise"] = torch.zeros(2)
    state["model.norm.weight"] = torch.zeros(3)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError) as error:
        load_decoder(tmp_path)
    for part in ("missing: layers.1.mlp.up_proj.weight", "unexpected: model.layers.9.surprise", "(3,), expected (64,)"):
        assert part in str(error.value)
    assert "missing: norm" not in str(error.value)


def test_broken_files(reference, tmp_path):
    _, folder = reference("llama")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="no weights found, expected model.safetensors"):
        load_decoder(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file, perhaps cut short"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        load_decoder(tmp_path)


def test_a_bin_of_transposed_tensors(reference, tmp_path, monkeypatch):
    model, folder = reference("llama")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = "layers.0.mlp.up_proj.weight"
    assert not state[f"model.{name}"].is_contiguous()
    assert torch.equal(load_decoder(tmp_path).state_dict()[name], state[f"model.{name}"])


def test_bin_is_converted_once(reference, tmp_path, monkeypatch):
    """Into a cache of our own: what lies beside the .bin, in a hub cache for one, is read by other libraries too."""
    model, folder = reference("llama-tied")
    source = tmp_path / "old"
    source.mkdir()
    (source / "config.json").write_text((folder / "config.json").read_text())
    state = model.state_dict()  # tied: two keys, one storage
    torch.save(state, source / "pytorch_model.bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ids, _ = random_batch()
    expected = run_reference(model, ids, causal=True).logits
    torch.testing.assert_close(load_language_model(source)(ids, causal=True), expected, **TOLERANCE)
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "pytorch_model.bin"]
    (converted,) = (tmp_path / "cache" / "llm2vec_min" / "converted").iterdir()
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    load_decoder(source)
    assert not loaded, "the second time reads safetensors"
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    torch.save(state, source / "pytorch_model.bin")
    assert torch.equal(load_decoder(source).norm.weight, state["model.norm.weight"]), "another file, another conversion"
    assert len(loaded) == 1
    assert len(list(converted.parent.iterdir())) == 2, "nothing unfinished stays"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(reference, tmp_path, value):
    """One in one matrix: attention may hide it, and give finite numbers that mean nothing."""
    model, folder = reference("llama")
    shutil.copytree(folder, tmp_path / "model")
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    state["model.layers.1.self_attn.q_proj.weight"][3, 5] = value
    safetensors.torch.save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for load in (load_decoder, load_language_model):
        with pytest.raises(ValueError, match=r"NaN, infinity, or a number too large .* in .*layers.1.self_attn.q_proj.weight$"):
            load(tmp_path / "model")


def test_an_adapter_that_is_not_finite_or_lacks_what_it_says_it_has(reference, tmp_path):
    def load() -> None:
        load_adapter(load_decoder(reference("llama")[1]), tmp_path)

    decoder = load_decoder(reference("llama")[1])
    add_lora(decoder, r=2)
    save_adapter(tmp_path, *adapter_of(decoder, "some/base"))
    load()
    file = tmp_path / "adapter_model.safetensors"
    whole = safetensors.torch.load(file.read_bytes())  # not mapped, since the file is written over
    safetensors.torch.save_file({name: t for name, t in whole.items() if "q_proj" not in name}, file)
    with pytest.raises(
        ValueError, match="missing: layers.0.self_attn.q_proj, layers.1.self_attn.q_proj, layers.2.self_attn.q_proj$"
    ):
        load()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"exclude_modules": ["q_proj"]}))
    load()
    whole["base_model.model.layers.2.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    safetensors.torch.save_file({name: t for name, t in whole.items() if "q_proj" not in name}, file)
    with pytest.raises(
        ValueError, match="NaN or infinity in layers.2.mlp.up_proj.lora_B.weight; its training may have diverged"
    ):
        load()


FULL, SLIDING = ["full_attention"] * 3, ["sliding_attention"] * 3
ON = dict(use_sliding_window=True, sliding_window=4)


@pytest.mark.parametrize(
    "variant, changes, window",
    [
        ("llama", dict(sliding_window=4), None),
        ("llama", dict(sliding_window=4, layer_types=SLIDING), None),
        ("mistral", dict(sliding_window=4), 4),
        ("mistral", dict(sliding_window=4, layer_types=SLIDING), 4),
        ("mistral", dict(sliding_window=None), None),
        ("qwen2", dict(sliding_window=4, use_sliding_window=False, layer_types=None), None),
        ("qwen2", ON | dict(max_window_layers=0, layer_types=None), 4),
        ("qwen2", ON | dict(max_window_layers=3, layer_types=None), None),
        ("qwen2", ON | dict(max_window_layers=28, layer_types=None), None),
        ("qwen2", ON | dict(layer_types=FULL), None),
        ("qwen2", ON | dict(layer_types=SLIDING), 4),
        ("qwen2", ON | dict(num_key_value_heads=None, max_window_layers=0, layer_types=None), 4),
    ],
)
def test_windows_are_those_of_transformers(tmp_path, variant, changes, window):
    heads = {} if "num_key_value_heads" not in changes else {"num_key_value_heads": None}
    make_reference(variant, **heads).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs, ours = transformers.AutoModel.from_pretrained(tmp_path), load_decoder(tmp_path)
    assert ours.config.sliding_window == window
    ids, _ = random_batch(T=12)
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours(ids, causal=True), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("mistral", dict(layer_types=FULL)),  # transformers' Mistral has its window on them all the same
        ("qwen2", dict(use_sliding_window=True, max_window_layers=1)),
        ("qwen2", dict(use_sliding_window=True, layer_types=FULL[:1] + SLIDING[1:])),
    ],
)
def test_a_window_on_some_layers_is_refused(reference, model_type, changes):
    raw = json.loads((reference("mistral-window")[1] / "config.json").read_text())
    with pytest.raises(ValueError, match="a window on some of the layers only is not supported"):
        ModelConfig.from_dict(raw | {"model_type": model_type} | changes)


def test_two_ways_to_say_the_same_of_rotary_embeddings(reference):
    """transformers 4 writes two fields, 5 one; files that hold both, and nulls, are the same model."""
    raw = json.loads((reference("llama-llama3-rope")[1] / "config.json").read_text())
    new = raw.get("rope_parameters") or raw["rope_scaling"] | {"rope_theta": raw["rope_theta"]}
    old = {name: value for name, value in new.items() if name != "rope_theta"} | {"type": new["rope_type"], "unused": None}
    bare = {name: value for name, value in raw.items() if name not in ("rope_parameters", "rope_scaling", "rope_theta")}
    one, two, both = (
        ModelConfig.from_dict(bare | more)
        for more in (
            {"rope_parameters": new},
            {"rope_scaling": old, "rope_theta": new["rope_theta"]},
            {"rope_parameters": new, "rope_scaling": old, "rope_theta": new["rope_theta"]},
        )
    )
    assert one == two == both
    with pytest.raises(ValueError, match="factor of the rotary embeddings is both .* and 3"):
        ModelConfig.from_dict(
            bare | {"rope_parameters": new, "rope_scaling": old | {"factor": 3}, "rope_theta": new["rope_theta"]}
        )


def test_of_several_processes_one_converts_and_the_others_wait(reference, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes((reference("llama")[1] / "config.json").read_bytes())
    torch.save(reference("llama")[0].state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded, found, load, flock, asks = [], [], torch.load, fcntl.flock, threading.Event()
    other = threading.Thread(target=lambda: found.append(load_decoder(tmp_path)))

    def lock(file, operation):
        if threading.current_thread() is other:
            asks.set()
        flock(file, operation)

    def meanwhile(*arguments, **options):
        loaded.append(arguments)
        (path,) = (tmp_path / "cache" / "llm2vec_min" / "converted").glob("*.lock")
        with pytest.raises(ValueError, match="is writing it now"), locked(path.with_suffix("")):
            pass
        other.start()
        assert asks.wait(60)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", meanwhile)
    monkeypatch.setattr(fcntl, "flock", lock)
    load_decoder(tmp_path)
    other.join()
    assert len(loaded) == len(found) == 1, "the second finds what the first has made"


def test_others_may_read_what_is_saved(reference, tmp_path):
    """safetensors makes files, and tempfile folders, that only their owner can open."""
    decoder = load_decoder(reference("llama")[1])
    add_lora(decoder, r=2)
    with new_folder(tmp_path / "new") as folder:
        save_checkpoint(decoder, folder, torch.float32)
        save_adapter(folder, *adapter_of(decoder, "some/base"))
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder.parent / "new").iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "adapter_model.safetensors", "adapter_config.json"), 0o666 & ~mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o777 & ~mask


def test_old_torch_opens_no_pickle(reference, tmp_path, monkeypatch):
    """Before 2.6 a file can run code in spite of weights_only=True (CVE-2025-32434)."""
    (tmp_path / "config.json").write_bytes((reference("llama")[1] / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cpu"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match="pytorch_model.bin: torch 2.5.1.* update to 2.6"):
        load_decoder(tmp_path)


def test_pickled_code_is_refused(reference, tmp_path):
    _, folder = reference("llama")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({"model.norm.weight": torch.zeros(1), "bad": os.system}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: not a readable weight file"):
        load_decoder(tmp_path)
    assert stat.S_ISREG((tmp_path / "pytorch_model.bin").stat().st_mode)


# ---- adapters ----

LORA = dict(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"])


def randomize(model, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=["decoder", "causal-lm"])
def peft_model(request, reference):
    base = copy.deepcopy(reference("llama")[0])
    model = peft.get_peft_model(base.model if request.param == "decoder" else base, peft.LoraConfig(**LORA))
    randomize(model)
    return model


def test_their_adapter_here(peft_model, reference, tmp_path):
    peft_model.save_pretrained(tmp_path)
    mine = load_decoder(reference("llama")[1])
    load_adapter(mine, tmp_path)
    ids, mask = random_batch(padding="left")
    inner = peft_model.base_model.model
    expected = run_reference(getattr(inner, "model", inner), ids, mask, causal=False).last_hidden_state
    torch.testing.assert_close(mine(ids, mask, causal=False)[mask], expected[mask], **TOLERANCE)
    merge_lora(mine)
    assert not any("lora" in name for name, _ in mine.named_parameters())
    torch.testing.assert_close(mine(ids, mask, causal=False)[mask], expected[mask], **TOLERANCE)


def test_our_adapter_there_with_gradients(reference, tmp_path):
    model, folder = reference("llama")
    mine = load_decoder(folder)
    add_lora(mine, r=4, alpha=12, dropout=0.0, targets=LORA["target_modules"])
    randomize(mine)
    save_adapter(tmp_path, *adapter_of(mine, "some/base"))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path, is_trainable=True)
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"
    ids, mask = random_batch(padding="left")
    weights = torch.randn(3, 11, 64) * mask[:, :, None]
    expected = run_reference(theirs.base_model.model, ids, mask, causal=False).last_hidden_state
    states = mine(ids, mask, causal=False)
    torch.testing.assert_close(states[mask], expected[mask], **TOLERANCE)
    (states * weights).sum().backward(), (expected * weights).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    compared = 0
    for name, parameter in mine.named_parameters():
        if "lora_" in name:
            other = gradients[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
            compared += 1
        else:
            assert parameter.grad is None, "the base is frozen"
    assert compared == len(gradients) == 2 * 5 * 3


WHOLE_NAMES = ["layers.0.mlp.down_proj", "layers.2.mlp.down_proj", "layers.1.self_attn.q_proj"]


def test_an_adapter_on_some_layers(reference, tmp_path):
    """It lists whole names, so that neither PEFT nor this project misses those it has not; and PEFT's of that kind load."""
    model, folder = reference("llama")
    ours, again = load_decoder(folder), load_decoder(folder)
    (tmp_path / "ours").mkdir()
    add_lora(ours, r=2, targets=WHOLE_NAMES)
    randomize(ours)
    save_adapter(tmp_path / "ours", *adapter_of(ours, "some/base"))
    load_adapter(again, tmp_path / "ours")
    ids, _ = random_batch()
    torch.testing.assert_close(again(ids, causal=False), ours(ids, causal=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "ours")
    expected = run_reference(theirs.base_model.model, ids, causal=False).last_hidden_state
    torch.testing.assert_close(ours(ids, causal=False), expected, **TOLERANCE)

    for base in (model, model.model):
        names = ["model." * (base is model) + name for name in WHOLE_NAMES]
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=names))
        randomize(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        assert set(json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["target_modules"]) == set(names)
        mine = load_decoder(folder)
        load_adapter(mine, tmp_path / "theirs")
        inner = theirs.base_model.model
        expected = run_reference(getattr(inner, "model", inner), ids, causal=False).last_hidden_state
        torch.testing.assert_close(mine(ids, causal=False), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(target_modules=[*WHOLE_NAMES, "layers.1.mlp.down_proj"]), "missing: layers.1.mlp.down_proj$"),
        (dict(target_modules=WHOLE_NAMES[1:]), "unexpected: layers.0.mlp.down_proj"),
        (dict(target_modules=["down_proj", "q_proj"]), "missing: layers.0.self_attn.q_proj, layers.1.mlp.down_proj, layers.2"),
        (dict(target_modules=".*proj"), "missing: layers.0.self_attn.q_proj, layers.1.mlp.*a pattern, which is not read"),
        (dict(target_modules=[*WHOLE_NAMES, "layers.30.mlp.up_proj"]), "missing: layers.30.mlp.up_proj$"),
        (
            dict(target_modules=["down_proj", "q_proj"], layers_to_transform=2),
            "missing: layers.2.self_attn.q_proj; unexpected: ",
        ),
        (dict(target_modules=["down_proj"], layers_to_transform=[0, 2, 7]), "missing: layers.7"),
    ],
)
def test_an_adapter_on_other_layers_than_it_lists(reference, tmp_path, change, message):
    mine = load_decoder(reference("llama")[1])
    add_lora(mine, r=2, targets=WHOLE_NAMES)
    save_adapter(tmp_path, *adapter_of(mine, "x"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(load_decoder(reference("llama")[1]), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["self_attn.q_proj", "0.mlp.up_proj"]),
        dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
        dict(target_modules=["q_proj", "model.layers.2.mlp.up_proj"], layers_to_transform=[0]),  # a whole name is in any layer
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=["1.self_attn.v_proj", "layers.0.self_attn.q_proj"]),
        dict(target_modules="all-linear"),
        dict(target_modules=r".*\.(q|v)_proj"),
    ],
)
def test_layers_are_chosen_as_peft_chooses_them(reference, tmp_path, options):
    model, folder = reference("llama")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **options))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    mine = load_decoder(folder)
    load_adapter(mine, tmp_path)
    ids, _ = random_batch()
    expected = run_reference(theirs.base_model.model.model, ids, causal=False).last_hidden_state
    torch.testing.assert_close(mine(ids, causal=False), expected, **TOLERANCE)


@pytest.mark.parametrize("change", [dict(r=3), dict(alpha=5.0), dict(dropout=0.5)])
def test_an_adapter_with_two_recipes_is_not_saved(reference, tmp_path, change):
    """Its file has one rank, one alpha and one dropout for all layers."""
    mine = load_decoder(reference("llama")[1])
    add_lora(mine, r=2)
    mine.layers[1].mlp.up_proj = LoRALinear(mine.layers[1].mlp.up_proj, **(dict(r=2, alpha=32.0, dropout=0.05) | change))
    with pytest.raises(ValueError, match="differ in"):
        save_adapter(tmp_path, *adapter_of(mine, "x"))


def test_merge_is_done_in_float32(reference):
    _, folder = reference("llama")
    mine = load_decoder(folder, dtype=torch.bfloat16)
    add_lora(mine, r=4, alpha=12)
    randomize(mine)
    layer = mine.layers[0].mlp.up_proj
    expected = layer.weight.double() + 3.0 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    merge_lora(mine)
    merged = mine.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - expected).abs().max() <= (expected.abs().max() * 2**-8)
    assert torch.equal(merged, expected.bfloat16()) or (merged != expected.bfloat16()).float().mean() < 0.001


def test_adapter_round_trip_and_rslora(reference, tmp_path):
    model, folder = reference("llama")
    theirs = peft.get_peft_model(copy.deepcopy(model.model), peft.LoraConfig(**LORA, use_rslora=True))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    mine = load_decoder(folder)
    load_adapter(mine, tmp_path)
    ids, _ = random_batch()
    expected = run_reference(theirs.base_model.model, ids, causal=True).last_hidden_state
    torch.testing.assert_close(mine(ids, causal=True), expected, **TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_takes_the_models_mode(reference, tmp_path, training):
    model, folder = reference("llama")
    peft.get_peft_model(copy.deepcopy(model.model), peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    mine = load_decoder(folder).train(training)
    load_adapter(mine, tmp_path)
    assert {module.training for module in mine.modules()} == {training}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_size=32), "of another shape"),
        (dict(num_hidden_layers=2), "missing: layers.2"),
        (dict(num_hidden_layers=4), "unexpected: layers.3"),
    ],
)
def test_adapter_for_another_model(reference, tmp_path, change, message):
    """One made for a larger, a smaller or a shallower model is refused, not half applied as in PEFT."""
    wanted = {"num_hidden_layers": {2: 2, 4: 4}.get(change.get("num_hidden_layers"), 3)}
    other = peft.get_peft_model(make_reference("llama", **(change | wanted)).model, peft.LoraConfig(**LORA))
    other.save_pretrained(tmp_path)
    mine = load_decoder(reference("llama")[1])
    with pytest.raises(ValueError, match=message):
        load_adapter(mine, tmp_path)
    assert not any("lora" in name for name, _ in mine.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": "four"}, "r is 'four'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base too"),
    ],
)
def test_unsupported_adapter(reference, tmp_path, change, message):
    mine = load_decoder(reference("llama")[1])
    add_lora(mine, r=4)
    save_adapter(tmp_path, *adapter_of(mine, "x"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(load_decoder(reference("llama")[1]), tmp_path)


def test_an_old_adapter_says_how_to_convert_it(reference, tmp_path):
    folder = reference("llama")[1]
    decoder = load_decoder(folder)
    add_lora(decoder, r=2)
    save_adapter(tmp_path, *adapter_of(decoder, "some/base"))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds an adapter_model.bin, expected adapter_model.safetensors; load it with peft"):
        load_adapter(load_decoder(folder), tmp_path)


def test_an_old_checkpoints_rotary_buffers_are_passed_over(reference, tmp_path):
    _, folder = reference("llama")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = safetensors.torch.load_file(folder / "model.safetensors")  # not tmp_path's, which is written over
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(load_decoder(tmp_path).norm.weight, state["model.norm.weight"])


@pytest.mark.parametrize(
    "option", [
        "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora",
        "alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters",
    ],
)  # fmt: skip
def test_what_changes_an_adapter_is_refused(reference, tmp_path, option):
    """Read as plain LoRA each of these would give other numbers, without a word."""
    decoder = load_decoder(reference("llama")[1])
    add_lora(decoder, r=2)
    save_adapter(tmp_path, *adapter_of(decoder, "base"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {option: {"q_proj": 4}}))
    with pytest.raises(ValueError, match=f"{option} is .*not supported"):
        load_adapter(load_decoder(reference("llama")[1]), tmp_path)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_what_a_file_leaves_out_is_what_transformers_assumes(family):
    theirs = CLASSES[family][0](hidden_size=4096, num_attention_heads=64)
    sizes = {name: getattr(theirs, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                                      "num_attention_heads")}  # fmt: skip
    mine = ModelConfig.from_dict({"model_type": family} | sizes)
    for name in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "sliding_window"):
        assert getattr(mine, name) == getattr(theirs, name, None), name
    assert mine.rope_theta == theirs.rope_parameters["rope_theta"]


def test_an_adapter_stored_in_bfloat16_is_merged_in_float32(reference, tmp_path):
    decoder = load_decoder(reference("llama")[1])
    before = decoder.layers[0].mlp.up_proj.weight.clone()
    add_lora(decoder, r=4, alpha=8)
    randomize(decoder)
    config, tensors = adapter_of(decoder, "x")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_adapter(tmp_path, config, tensors)
    loaded = load_decoder(reference("llama")[1])
    load_adapter(loaded, tmp_path)
    merge_lora(loaded)
    A, B = (tensors[f"base_model.model.layers.0.mlp.up_proj.lora_{c}.weight"].float() for c in "AB")
    torch.testing.assert_close(loaded.layers[0].mlp.up_proj.weight, before + 2 * B @ A, rtol=1e-6, atol=1e-6)
