"""Downloads from a small server on 127.0.0.1 that speaks the hub's file protocol, each in a process of its own."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_weights import randomize

from conftest import make_reference, write_tokenizer
from llm2vec_min import LLM2Vec
from llm2vec_min.lora import add_lora

ROOT = Path(__file__).parent.parent
COMMITS = {"main": "1" * 40, "v2": "2" * 40}
SCRIPT = """
import sys
from llm2vec_min import LLM2Vec
try:
    print("vector", LLM2Vec.from_pretrained(sys.argv[1], device="cpu").encode("the cat").sum())
except ValueError as error:
    print("error", error)
"""


class Hub(BaseHTTPRequestHandler):
    """`repos`: name -> {file: bytes}; `log`: what was sent; `drop`: how many more downloads to cut in the middle."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        server, path = self.server, unquote(urlparse(self.path).path).removeprefix("/datasets")
        api = path.startswith("/api/")
        parts = path.strip("/").split("/")
        repo = "/".join(parts[2:4]) if api else "/".join(parts[:2])
        if repo == "some/gated":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repo == "some/private":
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo not in server.repos:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = server.repos[repo]
        revision = parts[5] if api and len(parts) > 5 else "main" if api else parts[3]
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if commit is None:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if api and "tree" in parts:
            rows = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
            return self.send(200, json.dumps(rows).encode())
        if api:
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files], "private": False,
                    "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
            return self.send(200, json.dumps(info).encode())
        name = "/".join(parts[4:])
        if name not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if body:
            server.log.append((name, start))
        drop = body and server.drop > 0 and name == "model.safetensors"
        server.drop -= drop
        if body and server.stalled is not None and name == "model.safetensors":
            self.send(200, data, headers, half=True)
            server.stalled.wait(60)  # until the process at the other end has been killed
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start else 200, data[start:], headers, half=drop)

    def send(self, status, content, headers=None, half=False):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo")
    model = make_reference("llama", vocab_size=600)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    plain = {p.name: p.read_bytes() for p in folder.iterdir()} | {"consolidated.safetensors": b"x" * 10**6, "README.md": b"hi"}
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    pickled = {name: data for name, data in plain.items() if "safetensors" not in name}
    sentences = {
        "wiki1m_for_simcse.txt": "".join(f"sentence {i} of them\n" for i in range(400)).encode(),
        "nli_for_simcse.csv": b"a,b\n",
    }
    pyarrow.parquet.write_table(pyarrow.table({"text": [f" = Title {i} = \n" for i in range(400)]}), folder / "x.parquet")
    wikitext = {"wikitext-103-raw-v1/train-00000-of-00001.parquet": (folder / "x.parquet").read_bytes(), "README.md": b"hi"}
    return {
        "Salesforce/wikitext": wikitext,
        "princeton-nlp/Sheared-LLaMA-1.3B": plain,
        "princeton-nlp/datasets-for-simcse": sentences,
        "some/model": plain,
        "some/old": pickled | {"pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()},
    }


@pytest.fixture
def hub(files, tmp_path):
    """A running server, and `ask(name, **environment)` -> what a fresh process prints."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.log, server.drop, server.stalled = files, [], 0, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fixed = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_PROGRESS_BARS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "no_proxy": "*",
             "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}  # fmt: skip

    def ask(name, script=SCRIPT, **environment):
        done = subprocess.run(
            [sys.executable, "-c", script, name], cwd=ROOT, env=os.environ | fixed | environment, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout.strip()

    server.ask, server.environment = ask, os.environ | fixed
    yield server
    server.shutdown()
    server.server_close()


def test_fresh_cached_offline_and_gone(hub):
    first = hub.ask("some/model")
    assert first.startswith("vector")
    sent = {name for name, _ in hub.log}
    assert sent == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}, "needed files only"
    hub.log.clear()
    assert hub.ask("some/model") == first and not hub.log, "the second run downloads nothing"
    assert hub.ask("some/model", HF_HUB_OFFLINE="1") == first
    assert "could not be downloaded" in hub.ask("some/old", HF_HUB_OFFLINE="1")


def test_what_a_model_stands_on_is_found_without_the_bases_weights(hub):
    """So a mistyped --data is told before gigabytes are fetched."""
    script = "import sys\nfrom llm2vec_min.encoder import find_chain\nprint(find_chain(sys.argv[1])[0])"
    assert hub.ask("some/model", script=script) == "some/model"
    assert {name for name, _ in hub.log} == {"config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.slow
def test_no_network_but_cached(hub):
    """huggingface_hub first tries for almost a minute."""
    assert hub.ask("some/model") == hub.ask("some/model", HF_ENDPOINT="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some/gated", "error model 'some/gated' is gated: accept its licence"),
        ("some/private", "error model 'some/private' is neither a local folder nor a hub repository .a private one needs HF_"),
        ("some/nothing", "error model 'some/nothing' is neither a local folder nor a hub repository"),
        ("some/model@v9", "error model 'some/model' has no revision 'v9'"),
    ],
)
def test_refusals(hub, name, message):
    assert re.match(message, hub.ask(name))


def test_revision_and_pickles(hub):
    assert hub.ask("some/model@v2").startswith("vector")
    assert hub.ask("some/old") == hub.ask("some/model"), "pytorch_model.bin is converted"


def test_data_set_by_name(hub):
    script = "from llm2vec_min.hub import resolve_data\nfrom llm2vec_min.data import read_lines\n" \
        "print(read_lines(resolve_data('wiki1m'))[:2])"  # fmt: skip
    assert hub.ask("", script=script) == "['sentence 0 of them', 'sentence 1 of them']"
    assert [name for name, _ in hub.log] == ["wiki1m_for_simcse.txt"]


def test_dropped_connection(hub):
    """Cut once, it resumes; cut always, it fails with one line and no truncated file is ever used."""
    hub.drop = 1000
    answer = hub.ask("some/model")
    assert answer.startswith("error model 'some/model' is no folder in ") and " and could not be downloaded" in answer, answer
    hub.drop = 1
    assert hub.ask("some/model").startswith("vector")


# The README's commands, word for word; only the recipe's sizes are made small enough for a test.
COMMAND = """
import sys, shlex
if "--without-pyarrow" in sys.argv[1]:
    sys.modules["pyarrow"] = None
from llm2vec_min.config import PAPER, PRESETS
for stage in PAPER.values():
    stage.update(steps=2, batch_size=4, max_length=16, warmup_steps=0)
import train
from llm2vec_min.cli import run
sys.argv = ["train.py", *shlex.split(sys.argv[1].replace("--without-pyarrow", ""))]
run(train.main)
"""


@pytest.mark.parametrize("pyarrow", [True, False], ids=["pyarrow", "no-pyarrow"])
def test_the_missions_own_commands(hub, tmp_path, pyarrow):
    """From an empty cache, all the way to the vectors' adapter."""
    script = f"import os; os.chdir({str(tmp_path)!r}); import sys; sys.path.insert(0, {str(ROOT)!r})\n{COMMAND}"
    without = "" if pyarrow else " --without-pyarrow"
    out = hub.ask("--stage mntp --model sheared-llama-1.3b" + without, script)
    data = "wikitext-103" if pyarrow else "wiki1m"
    assert f"mntp of sheared-llama-1.3b on {data}, in float32: the recipe" in out and "saved to runs/mntp" in out
    assert ("wikitext-103 needs pyarrow (pip install pyarrow); wiki1m has text enough" in out) is not pyarrow
    sent = {name for name, _ in hub.log}
    assert sent == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                    "wikitext-103-raw-v1/train-00000-of-00001.parquet" if pyarrow else "wiki1m_for_simcse.txt"}  # fmt: skip
    out = hub.ask("--stage simcse --model runs/mntp" + without, script)
    assert "simcse of runs/mntp on wiki1m" in out and "saved to runs/simcse" in out
    assert (tmp_path / "runs" / "simcse" / "adapters" / "0" / "adapter_model.safetensors").is_file()
    config = json.loads((tmp_path / "runs" / "simcse" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "princeton-nlp/Sheared-LLaMA-1.3B", (
        "which PEFT knows too, not the preset's name"
    )


def test_a_run_with_an_earlier_stage(hub, tmp_path):
    first = LLM2Vec.from_pretrained("tiny", device="cpu")
    for r, stage in enumerate(("mntp", "simcse"), 2):
        add_lora(first.decoder, r)
        randomize(first.decoder, seed=r)
        (tmp_path / stage).mkdir()
        first.save_run(tmp_path / stage, stage)
        (tmp_path / stage / "train_args.json").write_text(json.dumps({"stage": stage}))
        first = LLM2Vec.from_pretrained(tmp_path / stage, device="cpu")
    run = tmp_path / "simcse"
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    hub.repos = {"some/run": files | {"checkpoint.safetensors": b"x"}}
    assert hub.ask("some/run") == "vector " + str(first.encode("the cat").sum())
    assert {name for name, _ in hub.log} == set(files), "the earlier stage too, and nothing else"


def test_dry_run_asks_for_no_data(hub):
    assert "peak memory" in hub.ask("--stage mntp --model sheared-llama-1.3b --dry-run", COMMAND)
    assert {name for name, _ in hub.log} == {"config.json"}


def test_killed_in_the_middle_of_a_download(hub, tmp_path):
    hub.stalled = threading.Event()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "some/model"], cwd=ROOT, env=hub.environment)
    while ("model.safetensors", 0) not in hub.log:
        assert process.poll() is None
    process.kill()
    process.wait()
    hub.stalled.set()
    hub.stalled = None
    assert hub.ask("some/model").startswith("vector")
