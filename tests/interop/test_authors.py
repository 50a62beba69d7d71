"""The authors' published checkpoints load as they are: folders of exactly their layout, made with transformers and peft."""

import json
import shutil

import numpy as np
import peft
import pytest
import transformers
from test_weights import LORA, randomize

from conftest import TEXTS, make_reference, run_reference, write_tokenizer
from llm2vec_min import LLM2Vec, hub
from llm2vec_min.config import PRESETS, Preset
from llm2vec_min.encoder import find_chain


@pytest.fixture(params=["decoder", "causal-lm"])
def published(request, tmp_path):
    """Base; `mntp` = config, tokenizer and adapter without base weights; `simcse` = adapter alone; and what the
    libraries make of the chain, as token states of a text."""
    base = make_reference("llama", vocab_size=600)
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    nested = request.param == "causal-lm"
    model = base if nested else base.model
    for seed, name in enumerate(("mntp", "simcse")):
        adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        randomize(adapted, seed)
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / name)
        model = adapted.merge_and_unload()
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"_name_or_path": str(tmp_path / "base")}
    (tmp_path / "mntp" / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "base" / name, tmp_path / "mntp")
    decoder = model.model if nested else model
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")(TEXTS[0], return_tensors="pt").input_ids
    states = run_reference(decoder, ids, causal=False).last_hidden_state[0, 1:].detach().numpy()
    return tmp_path, states


def check(l2v, states):
    np.testing.assert_allclose(l2v.encode([TEXTS[0]], pooling=None)[0], states, rtol=1e-4, atol=1e-4)


def test_chain_by_hand_and_by_preset(published, monkeypatch):
    folder, states = published
    check(LLM2Vec.from_pretrained(folder / "mntp", adapters=[folder / "simcse"], device="cpu"), states)
    monkeypatch.setattr(hub, "fetch", lambda repo, *_: folder / repo.partition("/")[2])
    monkeypatch.setitem(PRESETS, "llm2vec-mine", Preset("authors/mntp", adapters=("authors/simcse",)))
    check(LLM2Vec.from_pretrained("llm2vec-mine", device="cpu"), states)
    # the second adapter's own name also means the chain: alone it would stand on the wrong base
    check(LLM2Vec.from_pretrained("authors/simcse", device="cpu"), states)


def test_a_folder_that_says_what_it_stands_on_is_not_the_presets_adapter(published, monkeypatch, tmp_path):
    folder, _ = published
    monkeypatch.setitem(PRESETS, "llm2vec-mine", Preset(str(folder / "mntp"), adapters=(str(folder / "simcse"),)))
    mine = shutil.copytree(folder / "simcse", tmp_path / "mine")
    config = json.loads((mine / "adapter_config.json").read_text()) | {"base_model_name_or_path": "llm2vec-mine"}
    (mine / "adapter_config.json").write_text(json.dumps(config))
    (mine / "config.json").unlink(missing_ok=True)
    (mine / "llm2vec_config.json").write_text(json.dumps({"base_model_name_or_path": "llm2vec-mine"}))
    assert find_chain(mine)[1][-2:] == [folder / "simcse", mine]


def test_first_adapter_alone(published):
    folder, states = published
    alone = LLM2Vec.from_pretrained(folder / "mntp", device="cpu").encode([TEXTS[0]], pooling=None)[0]
    assert np.abs(alone - states).max() > 1e-2


def test_their_settings_are_read(published):
    folder, _ = published
    their = {"pooling_mode": "last_token", "max_length": 99, "doc_max_length": 50, "skip_instruction": True}
    (folder / "mntp" / "llm2vec_config.json").write_text(json.dumps(their))
    l2v = LLM2Vec.from_pretrained(folder / "mntp", device="cpu")
    assert (l2v.pooling, l2v.max_length, l2v.causal) == ("last", 99, False)
    (folder / "mntp" / "llm2vec_config.json").write_text(json.dumps(their | {"skip_instruction": False}))
    with pytest.raises(ValueError, match="skip_instruction is false, but an instruction is never pooled here"):
        LLM2Vec.from_pretrained(folder / "mntp", device="cpu")
    for other in ("eos_token", "bos_token"):  # of tokens that no pooling here reads
        (folder / "mntp" / "llm2vec_config.json").write_text(json.dumps(their | {"pooling_mode": other}))
        with pytest.raises(ValueError, match=f"says pooling_mode '{other}', a special token's state"):
            LLM2Vec.from_pretrained(folder / "mntp", device="cpu")
        assert LLM2Vec.from_pretrained(folder / "mntp", device="cpu", pooling="max").pooling == "max"


def test_all_published_ones_have_presets():
    for base in ("sheared-llama", "llama-2", "mistral", "llama-3"):
        mntp, simcse, supervised = (PRESETS[f"llm2vec-{base}-{stage}"] for stage in ("mntp", "unsup-simcse", "supervised"))
        assert mntp.model == simcse.model == supervised.model and mntp.model.endswith("-mntp")
        assert simcse.adapters == (f"{mntp.model}-unsup-simcse",)
        assert supervised.adapters == (f"{mntp.model}-supervised",)
    assert PRESETS["llm2vec-mistral-mntp"].template == PRESETS["mistral-7b"].template


def test_adapter_with_another_base_names_both(published, tmp_path):
    folder, _ = published
    make_reference("llama", hidden_size=32, vocab_size=600).save_pretrained(folder / "other")
    write_tokenizer(folder / "other")
    with pytest.raises(ValueError, match=r"mntp: the adapter .made for .*base.. does not fit .*other"):
        LLM2Vec.from_pretrained(folder / "other", adapters=[folder / "mntp"], device="cpu")


def test_not_a_decoder(tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ValueError, match="model_type is 'bert', supported are llama, mistral, qwen2"):
        LLM2Vec.from_pretrained(tmp_path)
