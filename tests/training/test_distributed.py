"""Several processes train as one does; micro-batches (GradCache) as one forward pass does."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import embed
import train
from conftest import TEXTS
from llm2vec_min import LLM2Vec, device
from llm2vec_min.data import pack_blocks
from llm2vec_min.lora import add_lora
from llm2vec_min.model import set_attention_dropout
from llm2vec_min.training.loop import seed_torch, trainable_parameters
from llm2vec_min.training.mntp import mask_tokens, mntp_loss
from llm2vec_min.training.simcse import backward, embed_twins, info_nce

ROOT = Path(__file__).parent.parent.parent
STEPS = 4


def run(script: str, *flags, processes: int = 1) -> subprocess.CompletedProcess:
    """`python script flags`, or the same through torchrun, on the CPU."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = (launch if processes > 1 else [sys.executable]) + [str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def train_flags(model_folder, tmp_path, stage) -> list:
    text = tmp_path / ("text.jsonl" if stage == "supervised" else "text.txt")
    lines = [f"{a[:12]} {i} {b[:30]}" for i in range(4) for a in TEXTS[:6] for b in TEXTS[:6]]
    if stage == "supervised":  # processes have different numbers of texts, and queries an instruction
        lines = [
            json.dumps(
                {
                    "query": f"{i} {line}",
                    "positive": line[::-1],
                    "negative": [line[n:] for n in range(i % 3)],
                    "instruction": "A:",
                }
            )
            for i, line in enumerate(lines)
        ]
    text.write_text("\n".join(lines))
    return [
        "--stage", stage, "--model", model_folder, "--data", text, "--eval", "", "--device", "cpu", "--steps", STEPS,
        "--batch-size", 8, "--max-length", 24, "--lr", 1e-3, "--lora-dropout", 0, "--save-every", 2, "--warmup-steps", 0,
        *(["--temperature", 0.05] if stage != "mntp" else []), *(["--attention-dropout", 0] if stage == "simcse" else []),
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["mntp", "simcse", "supervised"])
def alone(request, model_folder, tmp_path_factory):
    """One process: (stage, its flags, adapter, losses)."""
    tmp_path = tmp_path_factory.mktemp(request.param)
    flags = train_flags(model_folder, tmp_path, request.param)
    done = run("train.py", *flags, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    return flags, *read_run(tmp_path / "run")


def read_run(folder):
    records = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return load_file(folder / "adapter_model.safetensors"), [r["loss"] for r in records if "loss" in r]


@pytest.mark.parametrize("extra", [[], ["--shard"], ["--micro-batch-size", "3", "--gradient-checkpointing"]], ids=" ".join)
def test_two_processes_train_as_one(alone, extra, tmp_path):
    flags, adapter, losses = alone
    done = run("train.py", *flags, *extra, "--output", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr
    other, other_losses = read_run(tmp_path / "run")
    assert len(losses) == STEPS
    torch.testing.assert_close(torch.tensor(other_losses), torch.tensor(losses), atol=1e-5, rtol=1e-5)
    assert any(b.abs().max() > 1e-3 for name, b in adapter.items() if "lora_B" in name)
    for name in adapter:
        torch.testing.assert_close(other[name], adapter[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert done.stdout.count("saved to") == 1, "one process reports"


def embed_flags(model_folder, folder) -> list:
    text = folder / "texts.txt"
    text.write_text("\n".join(f"{text[:20]} {i}" if i % 9 else "" for i in range(30) for text in TEXTS))
    return ["--model", model_folder, "--input", text, "--batch-size", 1, "--device", "cpu"]


def test_two_processes_embed_as_one(model_folder, tmp_path):
    flags = embed_flags(model_folder, tmp_path)
    for processes, name in ((1, "one.npy"), (2, "two.npy")):
        done = run("embed.py", *flags, "--output", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / name) for name in ("one.npy", "two.npy"))
    assert one.shape == (240, 64)
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=1e-5)  # processes have fewer threads, sums another order
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npy", "texts.txt", "two.npy"]


def test_killed_embedding_continues(model_folder, tmp_path, monkeypatch, capsys):
    flags = [*map(str, embed_flags(model_folder, tmp_path)), "--output", str(tmp_path / "x.npy")]
    embed.main([*flags[:-1], str(tmp_path / "whole.npy")])
    encode, calls = LLM2Vec.encode, []

    def die_in_the_third_chunk(self, texts, *arguments, **options):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LLM2Vec, "encode", die_in_the_third_chunk)
        with pytest.raises(KeyboardInterrupt):
            embed.main(flags)
        assert not (tmp_path / "x.npy").exists()
        with pytest.raises(ValueError, match="normalize was False, is True"):
            embed.main([*flags, "--normalize"])
        embed.main(flags)
    assert calls == [64, 64, 64, 64, 48], "two chunks were done, the third is made again"
    assert "continuing: 2 of 4 chunks" in capsys.readouterr().out
    assert np.array_equal(np.load(tmp_path / "x.npy"), np.load(tmp_path / "whole.npy"))


def test_bad_input(model_folder, tmp_path, monkeypatch):
    flags = list(map(str, train_flags(model_folder, tmp_path, "mntp")))
    with pytest.raises(ValueError, match="--shard spreads the base over several processes, found one"):
        train.main([*flags, "--shard", "--output", str(tmp_path / "run")])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch-size is 8, which 3 processes cannot share evenly"):
        train.main([*flags, "--dry-run"])


def fresh(model_folder, dropout: float) -> LLM2Vec:
    l2v = LLM2Vec.from_pretrained(model_folder, device="cpu", lm_head=True)
    torch.manual_seed(0)
    add_lora(l2v.decoder, r=4, dropout=dropout)
    for name, parameter in trainable_parameters(l2v.decoder).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    set_attention_dropout(l2v.decoder, dropout)
    return l2v.train()


def gradients(l2v) -> dict:
    return {name: parameter.grad for name, parameter in trainable_parameters(l2v.decoder).items()}


@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1)])
def test_gradcache_equals_the_direct_computation(model_folder, sizes):
    """With dropout on: each part's noise must be the same in both of its passes."""
    texts = [text + " and more" for text in TEXTS[:7]]
    results = []
    for direct in (False, True):
        l2v = fresh(model_folder, dropout=0.3)
        parts = [list(part) for part in _split(l2v.tokenize(texts), sizes)]
        if direct:
            twins = []
            for number, part in enumerate(parts):
                seed_torch(5, number)
                twins.append(torch.stack(embed_twins(l2v, part), dim=1))
            twins = torch.cat(twins)
            loss = info_nce(twins[:, 0], twins[:, 1], 0.05)
            loss.backward()
        else:

            def embed(number, l2v=l2v, parts=parts):
                seed_torch(5, number)
                return torch.stack(embed_twins(l2v, parts[number]), dim=1)

            loss = backward(embed, len(parts), lambda twins: info_nce(twins[:, 0], twins[:, 1], 0.05))
        results.append((loss.item(), gradients(l2v)))
    (loss, ours), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert min(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-5, rtol=1e-5)


def _split(items, sizes):
    for size in sizes:
        yield items[:size]
        items = items[size:]


@pytest.mark.parametrize("logits_at_once", [600 * 5, 2**26])
def test_chunked_logits_and_parts_of_a_batch_change_nothing(model_folder, monkeypatch, logits_at_once):
    l2v = fresh(model_folder, dropout=0.0)
    blocks = torch.from_numpy(pack_blocks(l2v.tokenizer, TEXTS * 3, 16)[:8]).long()
    generator = torch.Generator().manual_seed(0)
    masked_ids, labels = mask_tokens(
        blocks, mask_id=5, special_ids={0, 1, 2}, vocab_size=600, probability=0.5, generator=generator
    )
    logits = l2v.lm_head(l2v.decoder(masked_ids, causal=False))[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(l2v).items()}
    l2v.decoder.zero_grad()

    monkeypatch.setattr("llm2vec_min.training.mntp.LOGITS_AT_ONCE", logits_at_once)
    count, total = int((labels != -100).sum()), 0.0
    for rows in (slice(0, 3), slice(3, 8)):
        part = mntp_loss(l2v.decoder, l2v.lm_head, masked_ids[rows], labels[rows], count)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(l2v).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_each_process_has_its_own_gpu_and_waits_as_long_as_asked(monkeypatch):
    for name, value in (("WORLD_SIZE", "16"), ("RANK", "9"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    joined, chosen = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(device, "pick_device", torch.device)
    monkeypatch.setattr(device.dist, "init_process_group", lambda backend, timeout: joined.append((backend, timeout)))
    assert device.start_process(None, patience=24) == torch.device("cuda:1") == chosen[0]
    device.start_process("cpu")
    assert joined == [("nccl", timedelta(hours=24)), ("gloo", None)]
