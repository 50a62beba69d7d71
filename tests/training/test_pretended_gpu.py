"""Training and encoding on a GPU that is only pretended: no tensor on the wrong device, and where its host waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from conftest import TEXTS, make_reference, write_tokenizer

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_DummyBackendModule"), reason="torch 2.9 has no backend to pretend with"
)

ROOT = Path(__file__).parent.parent.parent
TRAIN = ["--eval", "", "--steps", "2", "--batch-size", "4", "--max-length", "16"]
WHOLE = ["--gradient-checkpointing", "--micro-batch-size", "2"]  # GradCache in SimCSE
# Not while a step is computed: what the model is, the report of an evaluation, the result, the two numbers of a step's report.
MAY_WAIT = {
    "LLM2Vec.fingerprint",
    "held_out_score",
    "adapter_of",
    "Loop._save_checkpoint",
    "Loop.update",
    "not_finite",
    "LLM2Vec.encode",
    "explain",
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A model with grouped heads and a sliding window that some texts are longer than, and texts of several lengths."""
    folder = tmp_path_factory.mktemp("mistral")
    make_reference("mistral-window", vocab_size=600).save_pretrained(folder)
    write_tokenizer(folder, "mistral")
    text = folder / "text.txt"
    text.write_text("\n".join(f"{a[:9]} {b[: 3 * i]}" for i in range(4) for a in TEXTS[:6] for b in TEXTS[:6]))
    return ["--model", str(folder)], str(text)


def run(script: str, *flags, preamble: str = "") -> subprocess.CompletedProcess:
    program = f"import json, sys, pretended_gpu\n{preamble}\nprint(json.dumps(pretended_gpu.main({script!r}, sys.argv[1:])))"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": paths})  # fmt: skip


@pytest.mark.parametrize("extra", [[], WHOLE], ids=["plain", "checkpointing and parts"])
@pytest.mark.parametrize("stage", ["mntp", "simcse", "supervised"])
def test_no_forward_pass_waits(flags, tmp_path, stage, extra):
    model, text = flags
    if stage == "supervised":
        lines = [line for line in Path(text).read_text().splitlines() if line.strip()]
        triplets = [
            {"query": a, "positive": b, "negative": [a[3:] + "?"] * (len(a) % 2)}
            for a, b in zip(lines, lines[1:], strict=False)
        ]
        (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, triplets)))
        text, extra = str(tmp_path / "text.jsonl"), [*extra, "--matryoshka", "8"]
    done = run("train.py", "--stage", stage, *model, "--data", text, *TRAIN, *extra, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    waits = json.loads(done.stdout.splitlines()[-1])
    assert waits["Loop.update"] == 2 * 3, "for two steps three numbers, which a real device sends at once"
    assert waits.pop("synchronize", 0) == ("LLM2Vec.encode" in waits), "the explanation before the first step encodes once"
    assert set(waits) <= MAY_WAIT, waits


def test_encoding_waits_once_a_batch(flags, tmp_path):
    model, text = flags
    flags = [*model, "--input", text, "--batch-size", "8", "--output", str(tmp_path / "x.npy"), "--normalize"]
    done = run("embed.py", *flags, preamble="import embed; embed.check_vectors = lambda *_: 0")  # here all numbers are 0
    assert done.returncode == 0, done.stderr
    lines = len(Path(text).read_text().splitlines())
    waits = json.loads(done.stdout.splitlines()[-1])
    # a copy of each batch, on its way while the next one is computed; read after one wait for all of them
    assert waits.pop("LLM2Vec.fingerprint") and waits == {"LLM2Vec.encode": -(-lines // 8), "synchronize": 1}


@pytest.mark.parametrize(
    ("where", "wrong", "message"),
    [
        (
            "simcse.info_nce",
            "lambda a, b, t: F.cross_entropy(F.normalize(a) @ F.normalize(b).T, torch.arange(len(a)))",
            "device",
        ),
        (
            "simcse.pool",
            "lambda hidden, mask, mode: hidden[mask].float().mean(0)[None].repeat(len(hidden), 1)",
            "how many are True",
        ),
    ],
    ids=["targets on the CPU", "waits for a mask"],
)
def test_a_mistake_is_found(flags, tmp_path, where, wrong, message):
    model, text = flags
    mistake = f"import torch, torch.nn.functional as F, llm2vec_min.training.simcse as simcse\n{where} = {wrong}"
    flags = ["--stage", "simcse", *model, "--data", text, *TRAIN, "--output", str(tmp_path / "run")]
    done = run("train.py", *flags, preamble=mistake)
    assert done.returncode != 0 and message in done.stderr
