"""Names to folders; what the hub refuses becomes one line that says what to do."""

import fnmatch
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from llm2vec_min import LLM2Vec, hub
from llm2vec_min.config import PAPER, PRESETS, Preset
from llm2vec_min.encoder import find_chain
from llm2vec_min.hub import find_preset, resolve
from llm2vec_min.lora import add_lora
from llm2vec_min.training.settings import Settings
from llm2vec_min.weights import adapter_of, load_decoder, save_adapter


def test_folder_and_preset(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setitem(PRESETS, "mine", Preset(str(tmp_path), template=("<", ">")))
    assert resolve("mine") == tmp_path
    assert find_chain("mine") == ("mine", [], {"template": ["<", ">"]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sheared-lama", "'sheared-lama' is neither a folder nor a hub id .owner/name.; presets are tiny, smollm2-135m"),
        ("/no/such/folder", "is neither a folder nor a hub id"),
        (__file__, "is a file, expected a folder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mntp").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda repo, revision, *more: asked.append((repo, revision)) or tmp_path)
    with pytest.raises(ValueError, match="'runs/simcse': no such folder; runs holds mntp .*is runs/simcse@main"):
        resolve("runs/simcse")
    resolve("runs/simcse@main")
    resolve("owner/name")
    (tmp_path / "meta-llama").mkdir()
    resolve("meta-llama/Llama-3.2-1B")  # a preset's is known to be on the hub
    assert asked == [("runs/simcse", "main"), ("owner/name", None), ("meta-llama/Llama-3.2-1B", None)]


FILES = [
    "config.json", "tokenizer.json", "README.md", "model-00001-of-00002.safetensors", "pytorch_model.bin",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "consolidated.safetensors", "onnx/model.onnx",
]  # fmt: skip


@pytest.mark.parametrize("only_bin", [False, True])
def test_only_needed_files_are_downloaded(monkeypatch, tmp_path, only_bin):
    files = [f for f in FILES if not (only_bin and "safetensors" in f)]
    asked = {}

    def snapshot(repo_id, repo_type, revision, allow_patterns):
        chosen = {f for f in files for pattern in allow_patterns if fnmatch.fnmatch(f, pattern)}
        asked.update(repo=repo_id, revision=revision, files=chosen)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, **where: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("some/model@v2") == tmp_path
    weights = {"pytorch_model.bin"} if only_bin else {f for f in files if f.startswith("model")}
    assert asked == dict(repo="some/model", revision="v2", files={"config.json", "tokenizer.json"} | weights)


def refused(error):
    return error("no", response=SimpleNamespace(headers={}, request=None, status_code=403))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "'some/model' is gated: accept its licence at https://huggingface.co/some/model"),
        (errors.RepositoryNotFoundError, "neither a local folder nor a hub repository"),
        (errors.RevisionNotFoundError, "no revision 'v2'"),
    ],
)
def test_refusals(monkeypatch, error, message):
    def refuse(self, **where):
        raise refused(error)

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(ValueError, match=message):
        resolve("some/model@v2")


def test_offline_and_not_cached():
    with pytest.raises(
        ValueError, match="is no folder in .* and could not be downloaded .*run `hf download some/model` where there is one"
    ):
        resolve("some/model")
    with pytest.raises(ValueError, match="run `hf download Salesforce/wikitext --repo-type dataset` where"):
        hub.resolve_data("wikitext-103")


def test_a_data_set_that_is_in_the_cache_in_part(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "fetch", lambda *_: tmp_path)
    with pytest.raises(ValueError, match="data set 'wiki1m': the cache holds no wiki1m_for_simcse.txt"):
        hub.resolve_data("wiki1m")


def test_data_by_name_folder_and_file(monkeypatch, tmp_path):
    def fetch(repo, revision, kind, patterns):
        assert (repo, kind) == ("Salesforce/wikitext", "dataset")
        folder = tmp_path / "wikitext-103-raw-v1"
        folder.mkdir(exist_ok=True)
        for i in (1, 0):
            (folder / f"train-0000{i}-of-00002.parquet").touch()
        (folder / "test-00000-of-00001.parquet").touch()
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetch)
    assert [p.name for p in hub.resolve_data("wikitext-103")] == [f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match="a folder without text files"):
        hub.resolve_data(tmp_path / "texts")
    for name in ("b.txt", "a.jsonl.gz", "picture.png"):
        (tmp_path / "texts" / name).touch()
    assert [p.name for p in hub.resolve_data(tmp_path / "texts")] == ["a.jsonl.gz", "b.txt"]
    (tmp_path / "texts" / "more" / "still").mkdir(parents=True)
    (tmp_path / "texts" / "more" / "still" / "c.txt").touch()
    (tmp_path / "texts" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "texts" / ".ipynb_checkpoints" / "b-checkpoint.txt").touch()
    assert [p.name for p in hub.resolve_data(tmp_path / "texts")] == ["a.jsonl.gz", "b.txt", "c.txt"]
    assert hub.resolve_data("some.txt")[0].name == "some.txt"


def test_presets_are_the_papers():
    fields = set(Settings.__dataclass_fields__)
    for preset in PRESETS.values():
        assert set(preset.mntp) | set(preset.simcse) <= fields
    mask = {"mask_probability": 0.2, "mask_style": "bert"}
    assert PAPER["mntp"] == {"steps": 1000, "batch_size": 32, "max_length": 512, "lr": 5e-5} | mask
    noise = {"attention_dropout": 0.3, "temperature": 0.05}
    assert PAPER["simcse"] == {"steps": 1000, "batch_size": 128, "max_length": 128, "lr": 3e-5} | noise
    recipe = {"steps": 1000, "batch_size": 512, "max_length": 512, "lr": 2e-4, "warmup_steps": 300, "temperature": 0.02}
    assert PAPER["supervised"] == recipe
    mistral = PRESETS["mistral-7b"].mntp
    assert (mistral["mask_probability"], mistral["mask_style"]) == (0.8, "all")
    assert find_preset("mistralai/Mistral-7B-Instruct-v0.2") is PRESETS["mistral-7b"]
    assert find_preset("someone/else") is None


def test_chat_templates_are_the_models():
    user = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
    templates = dict.fromkeys(("llama-2-7b", "mistral-7b"), ("[INST] ", " [/INST]"))
    templates |= dict.fromkeys(("llama-3-8b", "llama-3.1-8b"), user)
    names = {"llama-2": "llama-2-7b", "mistral": "mistral-7b", "llama-3": "llama-3-8b"}
    for name, preset in PRESETS.items():
        base = names.get(name.removeprefix("llm2vec-").rsplit("-mntp")[0].rsplit("-unsup")[0].rsplit("-supervised")[0], name)
        assert preset.template == templates.get(base, ("", "")), name


def test_a_revision_keeps_its_preset():
    assert find_preset("mistralai/Mistral-7B-Instruct-v0.2@main") is PRESETS["mistral-7b"]
    assert find_preset("princeton-nlp/Sheared-LLaMA-1.3B@refs/pr/1") is PRESETS["sheared-llama-1.3b"]
    assert find_preset("nobody/knows@main") is None


def test_a_revision_of_the_authors_second_adapter_is_the_one_that_is_fetched(monkeypatch, tmp_path):
    """Their second adapters stand on the first, which only the preset knows; the revision is the second's."""
    fetched = []
    monkeypatch.setattr("llm2vec_min.hub.fetch", lambda repo, revision, *more: fetched.append((repo, revision)) or tmp_path)
    preset = PRESETS["llm2vec-mistral-unsup-simcse"]
    find_chain(preset.adapters[-1] + "@abc123")
    assert fetched == [(preset.model, None), *((name, None) for name in preset.adapters[:-1]), (preset.adapters[-1], "abc123")]
    fetched.clear()
    find_chain("llm2vec-mistral-unsup-simcse")
    assert fetched == [(name, None) for name in (preset.model, *preset.adapters)]


def test_the_revision_of_an_adapters_base(reference, monkeypatch, tmp_path):
    """PEFT keeps it in a field of its own."""
    monkeypatch.setattr("llm2vec_min.hub.fetch", lambda repo, revision, *more: tmp_path / "base")
    decoder = load_decoder(reference("llama")[1])
    add_lora(decoder, r=2)
    save_adapter(tmp_path, *adapter_of(decoder, "some/base@v2"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "v2")
    (tmp_path / "base").mkdir()
    assert find_chain(tmp_path)[0] == "some/base@v2"
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "some/base"}))  # as the authors have one beside it
    assert find_chain(tmp_path)[0] == "some/base@v2"
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "other/base"}))
    assert find_chain(tmp_path)[0] == "other/base"
    here = tmp_path / "base@home"
    here.mkdir()
    save_adapter(tmp_path, *adapter_of(decoder, str(here)))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(here)


def test_a_home_folder_keeps_its_preset(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "llm2vec_config.json").write_text('{"preset": "mistral-7b"}')
    assert find_preset("~/run") is PRESETS["mistral-7b"]


def test_a_merged_folder_keeps_its_preset(model_folder, tmp_path):
    LLM2Vec.from_pretrained("tiny-llm2vec", device="cpu").save(tmp_path / "of-tiny")
    assert find_preset(tmp_path / "of-tiny") is PRESETS["tiny"]
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    l2v.preset = "mistral-7b"
    l2v.save(tmp_path / "said")
    assert find_preset(tmp_path / "said") is PRESETS["mistral-7b"]
    assert LLM2Vec.from_pretrained(tmp_path / "said", device="cpu").preset == "mistral-7b"


def test_a_run_on_a_merged_folder_keeps_its_preset(tmp_path):
    for name, said in {
        "run": {"base_model_name_or_path": str(tmp_path / "merged"), "adapters": ["."]},
        "merged": {"exported_from": str(tmp_path / "before")},
        "before": {"base_model_name_or_path": "tiny"},
        "one": {"exported_from": str(tmp_path / "other")},
        "other": {"exported_from": str(tmp_path / "one")},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "llm2vec_config.json").write_text(json.dumps(said))
    assert find_preset(tmp_path / "run") is PRESETS["tiny"]
    assert find_preset(tmp_path / "one") is None, "they name each other"


@pytest.mark.parametrize("field", ["exported_from", "base_model_name_or_path"])
def test_what_no_file_can_be_called(tmp_path, field):
    (tmp_path / "llm2vec_config.json").write_text(json.dumps({field: "x" * 10_000, "adapters": []}))
    assert find_preset(tmp_path) is find_preset("x" * 10_000) is None
    with pytest.raises(ValueError):
        find_chain("x" * 10_000)


def test_offline_the_revision_counts_too(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: asked.append(options) or str(tmp_path))
    resolve("some/model@v2")
    assert [(o["repo_id"], o["revision"], o["local_files_only"]) for o in asked] == [("some/model", "v2", True)]
