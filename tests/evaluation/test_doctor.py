"""The doctor passes sound encoders, and fails each of these that are broken on purpose at the check that is meant for it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from conftest import make_reference, write_tokenizer
from llm2vec_min import LLM2Vec
from llm2vec_min.config import PRESETS
from llm2vec_min.evaluation import doctor
from llm2vec_min.files import read_json, write_json
from llm2vec_min.interop.export import export_model
from llm2vec_min.pooling import POOLING_MODES, pool


@pytest.fixture(scope="module")
def l2v():
    return LLM2Vec.from_pretrained("tiny", device="cpu")


def as_encode(l2v, **changes):
    """An encoder as the doctor sees it; with `changes`, its settings are others for the time of each call."""

    def encode(texts, instruction=None):
        before = {name: getattr(l2v, name) for name in changes}
        vars(l2v).update(changes)
        try:
            return l2v.encode(texts, instruction, batch_size=len(texts))
        finally:
            vars(l2v).update(before)

    return encode


def failed(checks):
    return {check.name for check in checks if check.passed is False}


# ---- Broken on purpose ----


def padded(l2v):
    """The padding mask is lost on its way to attention: pooling still knows it."""

    def encode(texts, instruction=None):
        batch = l2v.tokenizer.collate(l2v.tokenize(texts, instruction))
        return pool(l2v.decoder(batch.input_ids, causal=False), batch.pool_mask).detach().numpy()

    return encode


def everything_pooled(l2v):
    def encode(texts, instruction=None):
        batch = l2v.tokenizer.collate(l2v.tokenize(texts, instruction))
        real = torch.ones_like(batch.pool_mask) if batch.padding_mask is None else batch.padding_mask
        return pool(l2v.decoder(batch.input_ids, batch.padding_mask, causal=False), real).detach().numpy()

    return encode


def instruction_pooled(l2v):
    def encode(texts, instruction=None):
        return l2v.encode([f"{instruction} {text}" if instruction else text for text in texts], batch_size=len(texts))

    return encode


def sorted_and_left_so(l2v):
    return lambda texts, instruction=None: as_encode(l2v)(sorted(texts, key=len), instruction)


def centred_on_the_batch(l2v):
    def encode(texts, instruction=None):
        vectors = as_encode(l2v)(texts, instruction)
        return vectors - (vectors.mean(0) if len(vectors) > 3 else 0)

    return encode


def noisy(l2v):
    rng = np.random.default_rng(0)
    return lambda texts, instruction=None: as_encode(l2v)(texts, instruction) * rng.choice([0.9, 1.1], size=192)[: l2v.decoder.config.hidden_size]  # fmt: skip # noqa: E501


def not_a_number(l2v):
    return lambda texts, instruction=None: (
        as_encode(l2v)(texts, instruction) * np.where(np.array(texts) == "Rain", np.nan, 1)[:, None]
    )


def other_weights(l2v):
    def encode(texts, instruction=None):
        return as_encode(l2v)(texts, instruction) + 0.01 * np.arange(l2v.decoder.config.hidden_size, dtype=np.float32)

    return encode


def words_cut(l2v):
    return lambda texts, instruction=None: as_encode(l2v)([" ".join(text.split()[:200]) for text in texts], instruction)


def cut_and_noisy(l2v):
    """A server's rounding differs from call to call: that is not the last word."""
    rng = np.random.default_rng(0)

    def encode(texts, instruction=None):
        vectors = words_cut(l2v)(texts, instruction)
        return vectors * (1 + 1e-6 * rng.standard_normal(vectors.shape)).astype(np.float32)

    return encode


def ascii_only(l2v):
    return lambda texts, instruction=None: as_encode(l2v)([t.encode("ascii", "ignore").decode() for t in texts], instruction)


BROKEN = {
    "causal": (
        lambda l2v: as_encode(l2v, causal=True),
        "direction",
        "these are vectors of causal attention, meant is bidirectional",
    ),
    "max pooling": (lambda l2v: as_encode(l2v, pooling="max"), "pooling", "of max pooling, meant is mean"),
    "last pooling": (lambda l2v: as_encode(l2v, pooling="last"), "pooling", "of last pooling, meant is mean"),
    "BOS pooled": (everything_pooled, "special tokens", "BOS or template, pooled like text"),
    "instruction pooled": (instruction_pooled, "instruction", "it is pooled like text"),
    "instruction lost": (
        lambda l2v: lambda texts, instruction=None: as_encode(l2v)(texts),
        "instruction",
        "it changes nothing",
    ),
    "padding": (padded, "padding", "each beside a long text"),
    "order": (sorted_and_left_so, "order", "in the reverse order"),
    "batch": (centred_on_the_batch, "batch size", "each text alone"),
    "dropout": (noisy, "repeatable", "the same texts once more"),
    "not a number": (not_a_number, "numbers", "lengths from nan"),
    "other size": (
        lambda l2v: lambda texts, instruction=None: as_encode(l2v)(texts)[:, :9],
        "numbers",
        "vectors of shape (7, 9)",
    ),
    "other weights": (other_weights, "agreement", "with the plain computation"),
    "cut": (words_cut, "length", "texts are cut after about 2"),
    "cut, with noise": (cut_and_noisy, "length", "texts are cut after about 2"),
    "characters lost": (ascii_only, "agreement", "with the plain computation"),
}
ALONE = ("causal", "max pooling", "instruction pooled", "instruction lost", "cut")  # nothing else is wrong with them


@pytest.mark.parametrize("name", BROKEN)
def test_broken(l2v, name):
    breaks, check, detail = BROKEN[name]
    checks = doctor.examine(breaks(l2v), l2v)
    assert check in failed(checks), checks
    assert detail in next(c.detail for c in checks if c.name == check)
    if name in ALONE:
        assert failed(checks) <= {check, "agreement"} | ({"instruction"} if check in ("direction", "pooling") else set()), (
            checks
        )


@pytest.mark.parametrize("kind", ["llama-2", "mistral", "llama-3", "smollm2"])
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_sound(tmp_path, kind, pooling):
    make_reference("llama", vocab_size=600).save_pretrained(tmp_path)
    l2v = LLM2Vec.from_pretrained(
        write_tokenizer(tmp_path, kind), device="cpu", pooling=pooling, max_length=180, causal=kind == "mistral"
    )
    if kind == "llama-3":
        l2v.template = PRESETS["llama-3-8b"].template
    checks = doctor.examine(as_encode(l2v), l2v)
    assert not failed(checks), checks
    unseen = {check.name for check in checks if check.passed is None}
    assert unseen == ({"length"} if (kind, pooling) == ("mistral", "first") else set())


@pytest.mark.parametrize("max_length", [8, 16, 24, 32, 41])
def test_sound_where_texts_are_cut(max_length):
    l2v = LLM2Vec.from_pretrained("tiny", device="cpu", max_length=max_length)
    checks = doctor.examine(as_encode(l2v), l2v)
    assert not failed(checks), checks
    unseen = {check.name for check in checks if check.passed is None}
    assert unseen == ({"instruction"} if max_length == 8 else set())


def test_a_word_of_several_tokens_does_not_hide_a_cut(monkeypatch, l2v):
    """Where " the" is three tokens, the length check still tries a text of nearly max_length."""
    encode = l2v.tokenizer.encode
    monkeypatch.setattr(l2v.tokenizer, "encode", lambda texts, **more: encode([t.replace("the", "qxj") for t in texts], **more))
    checks = doctor.examine(as_encode(l2v), l2v)
    assert int(next(c.detail for c in checks if c.name == "length").split()[3].strip(";")) > 500


@pytest.mark.parametrize("model", ["tiny", "tiny-llm2vec", "tiny-causal-simcse"])
def test_command(model, capsys):
    doctor.main(["--model", model, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["passed"] * 11


# ---- Exports and servers ----


@pytest.fixture(scope="module")
def exported(l2v, tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "export"
    export_model(l2v, folder, prompts={"query": doctor.INSTRUCTION})
    return folder


def test_an_export_in_bfloat16_is_sound(l2v, tmp_path, capsys):
    """Opened in the dtype that is looked at: float32 on a CPU, whatever the file holds."""
    export_model(l2v, tmp_path / "x", dtype="bfloat16")
    for flags in ([], ["--dtype", "bfloat16"]):
        doctor.main(["--model", str(tmp_path / "x"), "--with", "sentence-transformers", "--device", "cpu", *flags])
        assert "FAILED" not in capsys.readouterr().out


def test_through_sentence_transformers(exported, tmp_path, capsys):
    doctor.main(["--model", str(exported), "--with", "sentence-transformers", "--device", "cpu"])
    assert (
        "FAILED" not in (out := capsys.readouterr().out)
        and "not seen" not in out
        and "is_causal in config.json is False" in out
    )
    config = read_json(exported / "config.json")
    pooling = read_json(exported / "1_Pooling" / "config.json")
    try:  # as transformers < 5.2 reads it, which knows no is_causal
        write_json(exported / "config.json", config | {"is_causal": True})
        with pytest.raises(SystemExit, match="1"):
            doctor.main(["--model", str(exported), "--with", "sentence-transformers", "--device", "cpu"])
        out = capsys.readouterr().out
        assert "FAILED    files" in out and "FAILED    direction       these are vectors of causal attention" in out
        write_json(exported / "config.json", config)
        write_json(
            exported / "1_Pooling" / "config.json",
            pooling | {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True},
        )
        with pytest.raises(SystemExit, match="1"):
            doctor.main(["--model", str(exported), "--with", "sentence-transformers", "--device", "cpu"])
        assert "these are vectors of max pooling" in capsys.readouterr().out
    finally:
        write_json(exported / "config.json", config), write_json(exported / "1_Pooling" / "config.json", pooling)


@pytest.fixture
def serve():
    """encode -> the address of a small server of OpenAI's protocol on the loopback address; its answers come unordered."""
    servers = []

    def start(encode, models=({"id": "served"},)):
        class Handler(BaseHTTPRequestHandler):
            def answer(self, body):
                content = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                self.answer({"data": list(models)})

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/embeddings"
                known = [model["id"] for model in models] or ["tiny"]
                assert asked["model"] == ("tiny" if "tiny" in known else known[0])
                rows = [{"index": i, "embedding": v.tolist()} for i, v in enumerate(encode(asked["input"]))] if encode else []
                self.answer({"data": rows[::-1]} if encode else {"error": "none"})

            def log_message(self, *ignored):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1/embeddings"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_behind_a_server(l2v, serve, capsys):
    doctor.main(["--model", "tiny", "--device", "cpu", "--url", serve(as_encode(l2v))])
    out = capsys.readouterr().out
    assert "FAILED" not in out and "not seen  instruction" in out and "passed    agreement" in out
    doctor.main(["--model", "tiny", "--device", "cpu", "--url", serve(as_encode(l2v), models=())])
    doctor.main(
        ["--model", "tiny", "--device", "cpu", "--url", serve(as_encode(l2v), models=({"id": "other"}, {"id": "tiny"}))]
    )
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        doctor.main(["--model", "tiny", "--device", "cpu", "--url", serve(as_encode(l2v, causal=True))])
    assert "FAILED    direction       these are vectors of causal attention" in capsys.readouterr().out


def test_a_pooling_without_a_plain_formula(l2v, monkeypatch):
    monkeypatch.setattr(l2v, "pooling", "middle")
    with pytest.raises(ValueError, match="no plain middle pooling"):
        doctor.plain_vectors(l2v)


def test_mistakes(model_folder, serve):
    sizes = iter([64, 64, 7])
    for flags, message in (
        (["--with", "sentence-transformers"], "is no export, make one"),
        (["--url", "ftp://x/embeddings"], "expected http://HOST:PORT"),
        (["--url", "http://127.0.0.1:9/v1/embeddings"], "no usable answer"),
        (["--url", "http://127.0.0.1:PORT/v1/embeddings"], "no usable answer"),  # as --help writes it
        (["--url", serve(None)], r"expected data: \[{index, embedding}"),
        (["--url", serve(lambda texts: np.ones((1, 8)))], "found 1 vectors for 7 texts"),
        (["--url", "http://[::1/embeddings"], "no usable answer"),
        (["--url", serve(lambda texts: np.ones((len(texts), next(sizes))))], r"vectors of another size than before: .*7,"),
        (["--tolerance", "nan"], r"--tolerance is nan, expected a distance in \[0, 2\)"),
        (["--url", "http://x/embeddings", "--with", "sentence-transformers"], "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            doctor.main(["--model", str(model_folder), "--device", "cpu", *flags])


def test_an_export_that_does_not_say_its_direction_is_causal_to_transformers(tmp_path):
    LLM2Vec.from_pretrained("tiny", device="cpu").save(tmp_path / "x")
    assert [check.passed for check in doctor.check_files(tmp_path / "x")] == [True]
    config = read_json(tmp_path / "x" / "config.json")
    del config["is_causal"]
    write_json(tmp_path / "x" / "config.json", config)
    assert [check.passed for check in doctor.check_files(tmp_path / "x")] == [False]
