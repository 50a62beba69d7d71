"""encode and embed against transformers; independence of the batch; runs that move; odd input."""

import copy
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from test_weights import randomize
from tokenizers import normalizers

from conftest import TEXTS, make_reference, run_reference, write_tokenizer
from llm2vec_min import LLM2Vec
from llm2vec_min.interop.export import export_model
from llm2vec_min.lora import add_lora, merge_lora
from llm2vec_min.model import Decoder
from llm2vec_min.pooling import POOLING_MODES
from llm2vec_min.tokenizer import Tokenizer
from llm2vec_min.training import Loop, Settings, finish_output, info_nce
from llm2vec_min.training.output import CHECKPOINT, plan_output
from llm2vec_min.training.pretrain import pretrain
from llm2vec_min.training.simcse import embed_twins
from llm2vec_min.weights import adapter_of, load_decoder, load_language_model, save_adapter


@pytest.fixture(scope="module")
def l2v(model_folder):
    return LLM2Vec.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def run_folders(model_folder, tmp_path):
    """An MNTP and a SimCSE run with random adapters, and the encoder that the second should give."""
    first = LLM2Vec.from_pretrained(model_folder, device="cpu", pooling="max", max_length=77)
    add_lora(first.decoder, r=4)
    randomize(first.decoder, seed=1)
    first.save_run(tmp_path / "mntp", "mntp")
    second = LLM2Vec.from_pretrained(tmp_path / "mntp", device="cpu")
    add_lora(second.decoder, r=2)
    randomize(second.decoder, seed=2)
    second.save_run(tmp_path / "simcse", "simcse")
    return tmp_path / "mntp", tmp_path / "simcse", second


def test_mean_pooling_of_transformers(l2v, model_folder):
    model = transformers.AutoModel.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    for text in TEXTS[:2]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = run_reference(model, ids, causal=False).last_hidden_state[0, 1:]  # BOS is not pooled
        np.testing.assert_allclose(l2v.encode(text), states.mean(0).detach().numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(l2v.encode([text], pooling=None)[0], states.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_causal_toggle(l2v, model_folder):
    causal = LLM2Vec.from_pretrained(model_folder, causal=True, device="cpu", pooling="first")
    a, b = causal.encode(["the cat sat", "the dog sat on"])
    both_ways = l2v.encode(["the cat sat", "the dog sat on"], pooling="first")
    np.testing.assert_allclose(a, b, atol=1e-5)  # the same first token, which sees nothing else
    assert np.abs(both_ways[0] - both_ways[1]).max() > 1e-2


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_batch_order_and_padding_change_nothing(l2v, mode):
    alone = np.stack([l2v.encode(text, pooling=mode) for text in TEXTS])
    for batch_size in (1, 3, 32):
        np.testing.assert_allclose(l2v.encode(TEXTS, pooling=mode, batch_size=batch_size), alone, rtol=1e-5, atol=1e-5)
    backwards = l2v.encode(TEXTS[::-1], pooling=mode, batch_size=2)[::-1]
    np.testing.assert_allclose(backwards, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_eight_threads_on_one_model(model_folder, training):
    """Also on a model that is being trained: none gets dropout because another one is through."""
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    add_lora(l2v.decoder, r=4, dropout=0.9)
    randomize(l2v.decoder)
    expected = l2v.encode(TEXTS)
    l2v.decoder.train(training)
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        order = np.random.default_rng(seed).permutation(len(TEXTS))
        for size in (1, 2, 3, 8):
            vectors = l2v.encode([TEXTS[i] for i in order], batch_size=size)
            np.testing.assert_allclose(vectors, expected[order], rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert l2v.decoder.training is training and all(m.training is training for m in l2v.decoder.modules())
    with pytest.raises(ValueError):
        l2v.encode([["a", "b", "c"]])
    assert l2v.decoder.training is training, "after a mistake, too"
    copy.deepcopy(l2v)


def test_threads_of_torch_change_nothing(l2v):
    before, expected = torch.get_num_threads(), l2v.encode(TEXTS)
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            np.testing.assert_allclose(l2v.encode(TEXTS), expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_a_token_without_embedding_is_read_as_text(model_folder, tmp_path):
    """Someone added a padding token, and no row to the embeddings: a text in which it stands must not break the run."""
    path = write_tokenizer(tmp_path, "llama-2") / "tokenizer.json"
    size = Tokenizer(tmp_path).backend.get_vocab_size()
    make_reference("llama", vocab_size=size).save_pretrained(tmp_path)
    here = LLM2Vec.from_pretrained(tmp_path, device="cpu")
    raw = json.loads(path.read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": size, "content": "<pad>"})
    path.write_text(json.dumps(raw))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "<pad>"}))
    texts = ["a <pad> b", *TEXTS]
    there = LLM2Vec.from_pretrained(tmp_path, device="cpu")
    assert Tokenizer(tmp_path).backend.encode("<pad>").ids[-1] == size
    np.testing.assert_allclose(there.encode(texts), here.encode(texts), rtol=1e-5, atol=1e-5)


def test_shapes_and_normalize(l2v):
    assert l2v.encode("one").shape == (64,) and l2v.encode([]).shape == (0, 64)
    vectors = l2v.encode(TEXTS[:3], normalize=True)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    tokens = l2v.encode(TEXTS, pooling=None)
    assert [len(t) for t in tokens] == [int(row.pooled.sum()) for row in l2v.tokenize(TEXTS)]


def test_instructions(l2v):
    text, instruction = "the cat sat on the mat", "Find similar texts:"
    plain, told = l2v.encode(text), l2v.encode(text, instruction)
    assert np.abs(plain - told).max() > 1e-3, "the text's tokens see the instruction"
    pairs = l2v.encode([[instruction, text], ["", text]])
    np.testing.assert_allclose(pairs, [told, plain], rtol=1e-5, atol=1e-5)
    assert len(l2v.encode([[instruction, text]], pooling=None)[0]) == len(l2v.encode([text], pooling=None)[0])
    with pytest.raises(ValueError, match="expected a text or an"):
        l2v.encode([["a", "b", "c"]])


def test_odd_texts(l2v):
    odd = ["", "   ", "\n\t", "🙂" * 5, "<s></s><unk>", "[INST] [/INST]", "long " * 20_000, "\x00\x01", "_"]
    vectors = l2v.encode(odd, normalize=True)
    assert np.isfinite(vectors).all()
    assert not vectors[0].any(), "an empty text gives zeros"
    assert np.isfinite(l2v.encode(odd, pooling="max")).all()


def test_embed_is_differentiable(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    add_lora(l2v.decoder, r=2)
    vectors = l2v.embed(TEXTS[:3], "Find:")
    np.testing.assert_allclose(vectors.detach().numpy(), l2v.encode(TEXTS[:3], "Find:"), rtol=1e-5, atol=1e-5)
    vectors.square().sum().backward()
    assert all(p.grad is not None for p in l2v.decoder.parameters() if p.requires_grad)
    assert any(p.grad.abs().max() > 0 for p in l2v.decoder.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="no text to embed"):
        l2v.embed([])
    for wrong in ("\ud800", ["Find:", "\ud800"], ["\ud800", "a"]):
        with pytest.raises(ValueError, match="no valid Unicode"):
            l2v.encode([wrong])
    with pytest.raises(ValueError, match="no valid Unicode"):
        l2v.encode(["a"], "\udcff find")


def test_bfloat16_pools_in_float32(model_folder, l2v):
    half = LLM2Vec.from_pretrained(model_folder, dtype="bfloat16", device="cpu")
    a, b = half.encode(TEXTS[:4], normalize=True), l2v.encode(TEXTS[:4], normalize=True)
    assert a.dtype == np.float32 and (a * b).sum(1).min() > 0.99


def test_run_chain(run_folders):
    mntp, simcse, expected = run_folders
    assert json.loads((simcse / "config.json").read_text())["is_causal"] is False, "as the folder is loaded here"
    again = LLM2Vec.from_pretrained(simcse, device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), expected.encode(TEXTS), rtol=1e-4, atol=1e-4)
    assert (again.pooling, again.max_length, again.causal) == ("max", 77, False)
    before = LLM2Vec.from_pretrained(mntp, device="cpu").encode(TEXTS[:1])
    assert np.abs(before - expected.encode(TEXTS[:1])).max() > 1e-2


def test_an_earlier_stage_of_a_run_by_its_folder(run_folders, tmp_path, monkeypatch):
    """Alone on the base it would be another model, without a word."""
    _, second, _ = run_folders
    l2v = LLM2Vec.from_pretrained(second, device="cpu")
    add_lora(l2v.decoder, r=2)
    randomize(l2v.decoder, 7)
    l2v.save_run(tmp_path / "third", stage="supervised")
    expected = LLM2Vec.from_pretrained(second, device="cpu").encode(TEXTS)
    for name in (tmp_path / "third" / "adapters" / "1", "1"):
        monkeypatch.chdir(tmp_path / "third" / "adapters")
        np.testing.assert_array_equal(LLM2Vec.from_pretrained(name, device="cpu").encode(TEXTS), expected)
    assert np.abs(LLM2Vec.from_pretrained(tmp_path / "third", device="cpu").encode(TEXTS) - expected).max() > 1e-3


def test_run_can_be_moved(run_folders, tmp_path):
    mntp, simcse, expected = run_folders
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(simcse, moved)
    shutil.rmtree(mntp), shutil.rmtree(simcse)
    np.testing.assert_allclose(
        LLM2Vec.from_pretrained(moved, device="cpu").encode(TEXTS), expected.encode(TEXTS), rtol=1e-4, atol=1e-4
    )


def test_last_adapter_loads_in_peft(run_folders, model_folder):
    peft = pytest.importorskip("peft")
    mntp, simcse, expected = run_folders
    model = transformers.AutoModel.from_pretrained(model_folder)
    model = peft.PeftModel.from_pretrained(model, mntp).merge_and_unload()
    model = peft.PeftModel.from_pretrained(model, simcse)
    row = expected.tokenize(TEXTS[:1])[0]
    states = run_reference(model.base_model.model, torch.tensor(row.ids)[None], causal=False).last_hidden_state
    np.testing.assert_allclose(
        expected.encode(TEXTS[:1], pooling=None)[0], states[0, row.pooled].detach().numpy(), rtol=1e-4, atol=1e-4
    )


def test_extra_adapters(run_folders, model_folder):
    mntp, simcse, expected = run_folders
    stacked = LLM2Vec.from_pretrained(model_folder, adapters=[mntp, simcse], pooling="max", device="cpu")
    np.testing.assert_allclose(stacked.encode(TEXTS), expected.encode(TEXTS), rtol=1e-4, atol=1e-4)


def test_merged_equals_unmerged(run_folders):
    _, _, l2v = run_folders
    before = l2v.encode(TEXTS)
    merge_lora(l2v.decoder)
    np.testing.assert_allclose(l2v.encode(TEXTS), before, rtol=1e-4, atol=1e-4)


def test_a_run_keeps_all_that_was_trained_or_is_refused(run_folders, tmp_path):
    mntp, _, l2v = run_folders
    l2v.decoder.norm.requires_grad_()
    with pytest.raises(ValueError, match=r"decoder.norm.weight is trainable \(1 such weights\).*save\(ANOTHER_FOLDER\)"):
        l2v.save_run(tmp_path / "new", "simcse")
    l2v.decoder.norm.requires_grad_(False)
    l2v.head = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"head.weight is trainable \(2 such"):
        l2v.save_run(tmp_path / "new", "simcse")
    del l2v.head
    merge_lora(l2v)
    add_lora(l2v.decoder, r=2)
    with pytest.raises(ValueError, match=r"weights were changed 2 times.*was loaded with 1 adapters.*save\(\) writes"):
        l2v.save_run(tmp_path / "new", "simcse")
    assert not (tmp_path / "new").exists()
    built = LLM2Vec(l2v.decoder, l2v.tokenizer, base_model="tiny")
    with pytest.raises(ValueError, match="weights were changed 1 times.*was loaded with 0 adapters"):
        built.save_run(tmp_path / "new", "simcse")
    expected = l2v.encode(TEXTS)
    l2v.save(tmp_path / "new")
    np.testing.assert_allclose(LLM2Vec.from_pretrained(tmp_path / "new", device="cpu").encode(TEXTS), expected, atol=1e-5)


def test_a_base_that_was_trained_itself_is_not_lost(model_folder, tmp_path):
    """All of it first, an adapter after that: the run would name the checkpoint as it was before."""
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    for adapter in (False, True):
        add_lora(l2v.decoder, r=2) if adapter else l2v.decoder.requires_grad_()
        for _ in (loop := Loop(l2v.decoder, Settings(steps=1), quiet=True)):
            l2v.embed(TEXTS[:2]).sum().backward()
            loop.update(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match="weights were changed 1 times.*was loaded with 0 adapters"):
        l2v.save_run(tmp_path / "run", "own")


def test_what_is_saved_can_be_loaded(model_folder, tmp_path, monkeypatch):
    """Numbers from numpy, a decoder that was loaded by hand, one that was compiled, and the home folder's short name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(model_folder.parent)
    decoder = load_decoder(model_folder.name, "cpu", torch.float32)
    monkeypatch.chdir(tmp_path)
    l2v = LLM2Vec(decoder, Tokenizer(model_folder), max_length=np.int64(64))
    expected = l2v.encode(TEXTS)
    l2v.decoder = torch.compile(decoder, backend="eager")
    l2v.save("~/merged")
    l2v.decoder = decoder
    add_lora(l2v.decoder, r=np.int64(2), dropout=np.float32(0.5))
    l2v.decoder = torch.compile(decoder, backend="eager")
    l2v.save_run("~/run", "own")
    for name in ("merged", "run"):
        loaded = LLM2Vec.from_pretrained(tmp_path / name, device="cpu")
        assert loaded.max_length == 64
        np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=1e-5)
    export_model(loaded, "~/exported", sentence_transformers=False)
    loop = Loop(decoder, Settings(steps=1), "~/own", arguments={"stage": "own"}, quiet=True)
    loop.open()
    (tmp_path / "own" / CHECKPOINT).write_bytes(b"")
    finish_output("~/own")
    assert plan_output("~/new", {}) == tmp_path / "new"
    model, blocks = load_language_model(model_folder), np.ones((2, 4), dtype=np.int32)
    pretrain(
        model.requires_grad_(),
        blocks,
        blocks,
        Settings(steps=1, batch_size=2),
        "~/pretrained",
        tokenizer=l2v.tokenizer,
        quiet=True,
    )
    assert (tmp_path / "pretrained" / "tokenizer.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "run", "exported", "own", "pretrained"}
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["train_args.json"]
    nameless = LLM2Vec(Decoder(decoder.config), l2v.tokenizer)
    add_lora(nameless.decoder, r=2)
    with pytest.raises(ValueError, match="no base model to name"):
        nameless.save_run(tmp_path / "other", "own")


def test_autocast_changes_the_products_only(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    expected = l2v.encode(TEXTS)
    add_lora(l2v.decoder, r=2)
    with torch.autocast("cpu", torch.bfloat16):
        found, trained = l2v.encode(TEXTS), l2v.embed(TEXTS)
        losses = [info_nce(torch.from_numpy(expected), torch.from_numpy(expected))]
    assert found.dtype == np.float32 and trained.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert losses[0] == info_nce(torch.from_numpy(expected), torch.from_numpy(expected))
    trained.sum().backward()
    assert l2v.decoder.layers[0].mlp.up_proj.lora_B.weight.grad.abs().sum() > 0


def test_two_encoders_on_one_decoder_and_modes_of_single_layers(model_folder):
    """Whoever is through first leaves the decoder without dropout for the other."""
    one = LLM2Vec.from_pretrained(model_folder, device="cpu")
    two = LLM2Vec(one.decoder, one.tokenizer, pooling="max")
    one.train()
    one.decoder.layers[0].eval()
    before = [module.training for module in one.decoder.modules()]
    with two._without_dropout():
        one.encode("a")
        assert not any(module.training for module in one.decoder.modules())
    assert [module.training for module in one.decoder.modules()] == before and len(set(before)) == 2


def test_a_run_that_was_refused_can_be_saved_again(run_folders, tmp_path):
    """The adapters that it stands on are still where they were."""
    mntp, _, _ = run_folders
    l2v = LLM2Vec.from_pretrained(mntp, device="cpu")
    add_lora(l2v.decoder, r=2)
    l2v.decoder.layers[0].mlp.up_proj.alpha = 1.0
    with pytest.raises(ValueError, match="differ in"):
        l2v.save_run(tmp_path / "new", "simcse")
    assert not (tmp_path / "new").exists()
    l2v.decoder.layers[0].mlp.up_proj.alpha = 32.0
    l2v.save_run(tmp_path / "new", "simcse")
    assert l2v.adapters == [tmp_path / "new" / "adapters" / "0"]


def test_a_run_is_not_saved_over_one_that_it_stands_on(run_folders, tmp_path):
    """Into the folder it came from, and, with an earlier adapter put below, into one whose copies would trade places."""
    mntp, simcse, _ = run_folders
    shutil.copytree(mntp, tmp_path / "own")
    base = LLM2Vec.from_pretrained(mntp, device="cpu").base_model
    below = LLM2Vec.from_pretrained(base, device="cpu")
    add_lora(below.decoder, r=4)
    below.save_run(tmp_path / "below", "mntp")
    for folder, model, adapters in (
        (tmp_path / "own", tmp_path / "own", []),
        (simcse, base, [tmp_path / "below", simcse / "adapters" / "0", simcse]),
    ):
        l2v = LLM2Vec.from_pretrained(model, adapters=adapters, device="cpu")
        add_lora(l2v.decoder, r=3)
        randomize(l2v.decoder, seed=5)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="holds an adapter that this run stands on.*folder of its own"):
            l2v.save_run(folder, "simcse")
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_saved_again_into_its_folder(run_folders):
    """As training goes on: the earlier adapter stays where it is, its own is replaced."""
    _, folder, l2v = run_folders
    assert l2v.adapters == [folder / "adapters" / "0"]
    randomize(l2v.decoder, seed=5)
    l2v.save_run(folder, "simcse")
    loaded = LLM2Vec.from_pretrained(folder, device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS), l2v.encode(TEXTS), rtol=1e-4, atol=1e-4)


def test_a_run_whose_earlier_adapter_has_gone(run_folders, tmp_path):
    l2v = LLM2Vec.from_pretrained(run_folders[0], device="cpu")
    add_lora(l2v.decoder, r=2)
    (run_folders[0] / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors: has gone since it was loaded"):
        l2v.save_run(tmp_path / "new", "simcse")
    assert not (tmp_path / "new").exists()


def test_a_run_with_an_adapter_merged_in_part(run_folders, tmp_path):
    l2v = LLM2Vec.from_pretrained(run_folders[0], device="cpu")
    add_lora(l2v.decoder, r=2)
    merge_lora(l2v.decoder.layers[0])
    with pytest.raises(ValueError, match="weights were changed 2 times"):
        l2v.save_run(tmp_path / "new", "simcse")


def test_a_runs_tokenizer_that_leads_nowhere(run_folders):
    (run_folders[1] / "tokenizer.json").unlink()
    (run_folders[1] / "tokenizer.json").symlink_to(run_folders[1] / "gone")
    with pytest.raises(ValueError, match="a link to what is not there"):
        LLM2Vec.from_pretrained(run_folders[1], device="cpu")


@pytest.mark.parametrize("which", ["run", "merged folder"])
def test_a_setting_of_another_version_is_not_ignored(run_folders, tmp_path, which):
    folder = run_folders[1]
    if which == "merged folder":
        folder = tmp_path / "merged"
        run_folders[2].save(folder)
    path = folder / "llm2vec_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"causal_layers": 2}))
    with pytest.raises(ValueError, match="'causal_layers' is no setting that this version knows"):
        LLM2Vec.from_pretrained(folder, device="cpu")


def test_missing_base(run_folders):
    mntp, _, _ = run_folders
    path = mntp / "llm2vec_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/not/there"}))
    with pytest.raises(ValueError, match="its base model was not found.*'/not/there' is neither a folder"):
        LLM2Vec.from_pretrained(mntp)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pooling="cls"), "pooling is 'cls'"),
        (dict(dtype="int4"), "dtype is 'int4'"),
        (dict(device="cuda:99"), "device 'cuda:99' is not available"),
    ],
)
def test_bad_options(model_folder, options, message):
    with pytest.raises(ValueError, match=message):
        LLM2Vec.from_pretrained(model_folder, **options)


@pytest.mark.parametrize(
    "capability, has, warns", [("AVX2", False, 1), ("AVX512", False, 1), ("AVX512", True, 0), ("NEON", False, 0)]
)
def test_bfloat16_without_instructions_warns(model_folder, monkeypatch, recwarn, capability, has, warns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    for dtype in ("bfloat16", "float32"):
        LLM2Vec.from_pretrained(model_folder, device="cpu", dtype=dtype)
    assert sum("float32 is several times faster" in str(w.message) for w in recwarn) == warns


def test_an_encoder_of_another_library_is_not_taken_for_a_plain_model(model_folder, tmp_path, recwarn):
    """Its pooling and direction lie in files that are not read: `e5-mistral-7b-instruct` pools its last token, causally."""

    def warned(folder, **options) -> bool:
        recwarn.clear()
        LLM2Vec.from_pretrained(folder, device="cpu", **options)
        return any("made for sentence-transformers" in str(w.message) for w in recwarn)

    shutil.copytree(model_folder, other := tmp_path / "other")
    assert not warned(other)
    (other / "modules.json").write_text("[]")
    assert warned(other) and warned(other, causal=True) and warned(other, pooling="last")
    assert not warned(other, causal=False, pooling="last")
    LLM2Vec.from_pretrained(model_folder, device="cpu").save(own := tmp_path / "own")  # says what it was trained with
    (own / "modules.json").write_text("[]")
    assert not warned(own)


def test_no_room_is_not_the_models_own(l2v):
    with pytest.raises(ValueError, match="max_length is 0, expected at least 1"):
        l2v.tokenize(["a"], max_length=0)
    with pytest.raises(ValueError, match="batch_size is -1, expected at least 1"):
        l2v.encode(["a"], batch_size=-1)


def test_a_template_by_hand(model_folder):
    templated = LLM2Vec.from_pretrained(model_folder, device="cpu", template=("[INST] ", " [/INST]"))
    assert templated.settings()["template"] == ["[INST] ", " [/INST]"]
    assert len(templated.tokenize(["a cat"])[0].ids) > len(LLM2Vec.from_pretrained(model_folder).tokenize(["a cat"])[0].ids)
    for wrong in ("[INST] ", ("<",), ("<", None)):
        with pytest.raises(ValueError, match="expected what stands before and after a text"):
            LLM2Vec.from_pretrained(model_folder, device="cpu", template=wrong)


def test_a_window_that_no_text_reaches_is_kept_for_longer_ones(tmp_path):
    """transformers does not see it in the saved folder; this project does, and so does a run on it."""
    make_reference("mistral-window", vocab_size=600).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    window = json.loads((tmp_path / "model" / "config.json").read_text())["sliding_window"]
    l2v = LLM2Vec.from_pretrained(tmp_path / "model", device="cpu", max_length=window)
    l2v.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["sliding_window"] is None
    saved, before = (
        LLM2Vec.from_pretrained(tmp_path / name, device="cpu", max_length=100, causal=False) for name in ("saved", "model")
    )
    assert len(saved.tokenize(TEXTS[:1])[0].ids) > window
    np.testing.assert_allclose(saved.encode(TEXTS[:1]), before.encode(TEXTS[:1]), atol=1e-6)
    saved.decoder.config.sliding_window = None
    assert np.abs(saved.encode(TEXTS[:1]) - before.encode(TEXTS[:1])).max() > 1e-3


@pytest.mark.parametrize("wrong", [[None], [5], ["a", None], [("one", "two", "three")], [["Find:", 5]]])
def test_not_a_text(l2v, wrong):
    with pytest.raises(ValueError, match="expected a text or an .instruction, text. pair, found"):
        l2v.encode(wrong)


def test_an_empty_text_pools_nothing(l2v):
    for template in (("", ""), ("[INST] ", " [/INST]")):
        l2v.template = template
        assert not l2v.encode(["", ""], "Find this:").any()
    l2v.template = ("", "")
    with pytest.raises(ValueError, match="max_length is 0, expected at least 1 token"):
        LLM2Vec(l2v.decoder, l2v.tokenizer, max_length=0)


def test_fingerprint(run_folders, model_folder, tmp_path):
    """Where the files lie does not matter; whatever changes the vectors does."""
    first, second, _ = run_folders
    shutil.copytree(second, tmp_path / "elsewhere")
    same = {LLM2Vec.from_pretrained(folder, device="cpu").fingerprint() for folder in (second, tmp_path / "elsewhere")}
    assert len(same) == 1
    others = [
        LLM2Vec.from_pretrained(folder, device="cpu", **options).fingerprint()
        for folder, options in (
            (model_folder, {}), (first, {}), (second, dict(causal=True)), (second, dict(pooling="mean")),
            (second, dict(max_length=9)), (second, dict(dtype="bfloat16")),
        )
    ]  # fmt: skip
    templated = LLM2Vec.from_pretrained(second, device="cpu")
    templated.template = ("<", ">")
    retrained = LLM2Vec.from_pretrained(first, device="cpu")
    add_lora(retrained.decoder, r=2)
    randomize(retrained.decoder, seed=3)
    merge_lora(retrained.decoder)
    turned = LLM2Vec.from_pretrained(second, device="cpu")
    turned.decoder.config.rope_theta = 500.0
    assert len({*same, *others, templated.fingerprint(), retrained.fingerprint(), turned.fingerprint()}) == len(others) + 4


def test_fingerprint_sees_how_far_an_adapter_counts(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    add_lora(l2v.decoder, r=2)
    before = l2v.fingerprint()
    l2v.decoder.layers[0].self_attn.q_proj.alpha = 1.0
    assert l2v.fingerprint() != before


@pytest.mark.parametrize("columns", [slice(1, None), slice(0, 1)])
def test_fingerprint_reads_more_than_one_column(columns):
    """Of a matrix of 2^n columns, too."""
    l2v = LLM2Vec.from_pretrained("tiny", device="cpu")
    before = l2v.fingerprint()
    with torch.no_grad():
        l2v.decoder.embed_tokens.weight[:, columns] += 1
    assert l2v.fingerprint() != before


def test_tokenized_before(l2v):
    """`embed.py` tokenizes one chunk while another is computed."""
    encoded = l2v.tokenize(TEXTS, "Find:")
    np.testing.assert_array_equal(l2v.encode(encoded), l2v.encode(TEXTS, "Find:"))
    for wrong in ("a text", b"bytes", {"text": "x"}):
        with pytest.raises(ValueError, match="expected a list of texts, found a (str|bytes|dict): "):
            l2v.embed(wrong)
    with pytest.raises(ValueError, match="tokenized already: give it to `tokenize`"):
        l2v.encode(encoded, "Find:")


def test_batches_are_cut_by_tokens(l2v, monkeypatch):
    """Without `batch_size` as many texts as fill the device; with it never more than that."""
    passes = []
    monkeypatch.setattr("llm2vec_min.encoder.MAX_TOKENS_CPU", 60)
    l2v.decoder.register_forward_pre_hook(lambda module, inputs: passes.append(tuple(inputs[0].shape)))
    texts = ["a cat"] * 50 + ["a cat " * 40]
    l2v.encode(texts)
    (first, length), *rest = passes
    assert first == 1 and length > 60 and len(rest) < 10, "a text that is too long runs alone"
    assert sum(rows for rows, _ in rest) == 50 and all(rows * length <= 60 for rows, length in rest)
    passes.clear()
    l2v.encode(texts, batch_size=2)
    assert max(rows for rows, _ in passes) == 2
    l2v.decoder._forward_pre_hooks.clear()


def bare(folder, base, seed, **settings):
    """A PEFT folder as others publish it, over a base."""
    l2v = LLM2Vec.from_pretrained(base, device="cpu")
    add_lora(l2v.decoder, r=2)
    randomize(l2v.decoder, seed)
    folder.mkdir()
    save_adapter(folder, *adapter_of(l2v.decoder, str(base)))
    (folder / "llm2vec_config.json").write_text(json.dumps(settings))
    return folder


def test_a_bare_adapters_own_settings_and_tokenizer_win(model_folder, tmp_path):
    first = bare(tmp_path / "first", model_folder, 1, pooling_mode="max", max_length=33)
    second = bare(tmp_path / "second", first, 2, pooling_mode="last_token")
    l2v = LLM2Vec.from_pretrained(second, device="cpu")
    assert (l2v.pooling, l2v.max_length, l2v.adapters) == ("last", 33, [first, second])
    for folder, token in ((first, "<first>"), (second, "<second>")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
        tokenizer.add_tokens([token])
        tokenizer.save_pretrained(folder)
    files = LLM2Vec.from_pretrained(second, device="cpu").tokenizer.files
    assert b"<second>" in files["tokenizer.json"], "the newest adapter's, not an earlier one's"


def test_a_config_beside_an_adapter_says_the_base(model_folder, tmp_path):
    """The authors' first adapters lie beside a config.json, whose _name_or_path counts."""
    folder = bare(tmp_path / "mntp", model_folder, 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/not/there"}))
    base = json.loads((model_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(base | {"_name_or_path": str(model_folder)}))
    assert LLM2Vec.from_pretrained(folder, device="cpu").base_model == str(model_folder)


def test_an_adapter_is_not_merged_twice(model_folder, tmp_path):
    folder = bare(tmp_path / "one", model_folder, 1)
    shutil.copytree(folder, tmp_path / "copy")
    for again in (folder, f"{folder}/", tmp_path / "copy"):
        with pytest.raises(ValueError, match="an adapter is there twice"):
            LLM2Vec.from_pretrained(folder, adapters=[again], device="cpu")


def test_fingerprint_sees_dtype_and_tokenizer():
    exact, half = (LLM2Vec.from_pretrained("tiny", device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    before = exact.fingerprint()
    assert before != half.fingerprint(), "its weights hold the same numbers, but it computes others"
    exact.tokenizer.backend.normalizer = normalizers.Lowercase()
    assert exact.fingerprint() != before


def test_training_reads_as_use_does(model_folder):
    """The same direction and pooling; without dropout the same vectors."""
    for causal, pooling in ((True, "mean"), (False, "max"), (True, "weighted_mean")):
        l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", causal=causal, pooling=pooling)
        expected = l2v.encode(TEXTS[:4])
        l2v.train()
        with torch.no_grad():
            np.testing.assert_allclose(l2v.embed(TEXTS[:4]).numpy(), expected, atol=1e-5)
            for twin in embed_twins(l2v, l2v.tokenize(TEXTS[:4])):
                np.testing.assert_allclose(twin.numpy(), expected, atol=1e-5)


def test_one_text_has_as_many_numbers_as_asked(model_folder):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu")
    for normalize in (False, True):
        np.testing.assert_array_equal(
            l2v.encode("a cat", dim=8, normalize=normalize), l2v.encode(["a cat"], dim=8, normalize=normalize)[0]
        )


def test_a_folders_own_template_beats_its_presets(model_folder, tmp_path):
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", template=("<", ">"))
    l2v.preset = "mistral-7b"
    l2v.save(tmp_path / "merged")
    assert LLM2Vec.from_pretrained(tmp_path / "merged", device="cpu").template == ("<", ">")


def test_an_adapters_settings_beat_the_models(model_folder, tmp_path):
    first = bare(tmp_path / "first", model_folder, 1, pooling_mode="max", max_length=33)
    second = bare(tmp_path / "second", model_folder, 2, pooling_mode="last_token")
    l2v = LLM2Vec.from_pretrained(first, adapters=[second], device="cpu")
    assert (l2v.pooling, l2v.max_length) == ("last", 33)
