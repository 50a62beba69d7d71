"""The benchmarks still run against the package: the smallest shape, once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm2vec_min import LLM2Vec
from llm2vec_min.lora import LoRALinear, add_lora

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))


def test_gpu_on_the_smallest_shape(tmp_path):
    command = [
        sys.executable,
        "tests/benchmarks/gpu.py",
        "--device",
        "cpu",
        "--models",
        "test",
        "--batch",
        "4",
        "--length",
        "16",
    ]
    done = subprocess.run(
        [*command, "--repeats", "1", "--output", str(tmp_path / "x.json")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads((tmp_path / "x.json").read_text())) and "GradCache" in done.stdout


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_the_grouped_function_is_its_plain_layers(probability):
    from grouped import GroupedLoRA, noise

    torch.manual_seed(0)
    N, C, R, widths = 5, 8, 2, (6, 3, 4)
    x, A, *rest = (torch.randn(n, m, dtype=torch.float64, requires_grad=True) for n, m in (
        (N, C), (len(widths) * R, C), *((out, R) for out in widths)))  # fmt: skip
    weights = [torch.randn(out, C, dtype=torch.float64) for out in widths]

    def plain(x, A, *B):
        dropped = x * noise(x, probability, 7) if probability else x
        parts = A.chunk(len(B))
        return [x @ W.T + 1.5 * dropped @ a.T @ b.T for W, a, b in zip(weights, parts, B, strict=True)]

    ours, theirs = GroupedLoRA.apply(x, A, 1.5, probability, 7, weights, *rest), plain(x, A, *rest)
    directions = [torch.randn_like(y) for y in ours]
    for y, z in zip(ours, theirs, strict=True):
        torch.testing.assert_close(y, z)
    gradients = [torch.autograd.grad(ys, (x, A, *rest), directions) for ys in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_grouped_model_is_the_plain_one_without_dropout():
    from grouped import group

    torch.manual_seed(0)
    l2v = LLM2Vec.from_pretrained("tiny", device="cpu")
    add_lora(l2v.decoder, dropout=0.0)
    for layer in l2v.decoder.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    l2v.decoder.train()
    parameters = [p for p in l2v.decoder.parameters() if p.requires_grad]
    ids = torch.randint(5, 4096, (2, 9))
    results = []
    for _ in range(2):
        loss = l2v.decoder(ids, causal=False).square().mean()
        results.append((loss, torch.autograd.grad(loss, parameters)))
        group(l2v.decoder)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_an_encoder_whose_package_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests/benchmarks"))
    import encoders

    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as if it was not installed
    sides = {"llama.cpp": encoders.llama_cpp, "two numbers": lambda models: lambda texts: [[1.0, 2.0] for _ in texts]}
    loaded, vectors, skipped = encoders.load_sides(None, ["a", "b"], sides)
    assert list(loaded) == list(vectors) == ["two numbers"] and "xllamacpp" in skipped["llama.cpp"]
    assert capsys.readouterr().out.splitlines()[0].startswith("skipped llama.cpp: ")
    assert len(encoders.in_turns(loaded, ["a"], 2)["two numbers"]) == 2


def test_intervals_of_simulated_sets(tmp_path, capsys):
    import intervals

    intervals.plain(2)
    path = tmp_path / "labelled.tsv"
    path.write_text("".join(f"{i % 2}\ttext {i} about {'cats' if i % 2 else 'oil prices'}\n" for i in range(40)))
    intervals.clustering(str(path), 1, 40)
    out = capsys.readouterr().out
    assert "mean of 30 rows: wrong " in out and "1 sets: rows and seeds resampled: wrong " in out
