"""The two commands, on a tiny model: the chain, its files, and one clear line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import embed
import numpy as np
import pytest
import torch
import train
from conftest import TEXTS

from llm2vec_min import LLM2Vec
from llm2vec_min.interop import export

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "3", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("\n".join(TEXTS[:6] * 30))
    pairs = [f"{score}\t{a}\t{b}" for score, (a, b) in enumerate(zip(TEXTS[:4], TEXTS[1:5], strict=True))]
    (folder / "pairs.tsv").write_text("\n".join(pairs))
    return folder


@pytest.fixture(scope="module")
def runs(files, model_folder):
    """Both stages through the command line's main()."""
    common = ["--data", str(files / "text.txt"), "--eval", str(files / "pairs.tsv"), *QUICK]
    train.main(["--stage", "mntp", "--model", str(model_folder), "--output", str(files / "mntp"), "--max-length", "16", *common])
    train.main(["--stage", "simcse", "--model", str(files / "mntp"), "--output", str(files / "simcse"), *common])
    return files / "mntp", files / "simcse"


def test_chain(runs, model_folder):
    mntp, simcse = runs
    config = json.loads((simcse / "llm2vec_config.json").read_text())
    assert config["adapters"] == ["adapters/0", "."] and config["causal"] is False and config["stage"] == "simcse"
    assert config["base_model_name_or_path"] == str(model_folder)
    assert (simcse / "adapters" / "0" / "adapter_model.safetensors").read_bytes() == (
        mntp / "adapter_model.safetensors"
    ).read_bytes()
    arguments = json.loads((mntp / "train_args.json").read_text())
    assert arguments["steps"] == 3 and arguments["mask_style"] == "bert" and arguments["lr"] == 5e-5
    records = [json.loads(line) for line in (mntp / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_loss", "held_out_accuracy", "spearman"} <= records[0].keys()
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    assert np.isfinite(LLM2Vec.from_pretrained(simcse).encode(TEXTS)).all()


def test_causal_baseline_remembers_its_direction(files, model_folder):
    output = files / "causal"
    train.main(["--stage", "simcse", "--causal", "--model", str(model_folder), "--data", str(files / "text.txt"),
                "--output", str(output), *QUICK])  # fmt: skip
    assert LLM2Vec.from_pretrained(output).causal is True
    train.main(["--stage", "simcse", "--model", str(output), "--data", str(files / "text.txt"), "--pooling", "max",
                "--output", str(files / "causal-2"), *QUICK])  # fmt: skip
    again = LLM2Vec.from_pretrained(files / "causal-2")
    assert again.causal is True and again.pooling == "max", "a stage on top keeps the direction"


def test_examples_are_printed(files, model_folder, capsys):
    common = ["--data", str(files / "text.txt"), "--model", str(model_folder), "--overwrite", *QUICK]
    train.main(["--stage", "mntp", "--output", str(files / "x"), "--max-length", "16", *common])
    assert "predicts position" in capsys.readouterr().out
    train.main(["--stage", "simcse", "--output", str(files / "x"), *common])
    assert "cosine of A and B" in capsys.readouterr().out


def test_embed_table_and_file(runs, files, capsys):
    embed.main(["--model", str(runs[1]), "a cat", "a dog"])
    out = capsys.readouterr().out
    assert "  1  a cat" in out and "1.000" in out
    lines = [*TEXTS[:4], "", *TEXTS[4:6]] * 5
    (files / "lines.txt").write_text("\n".join(lines))
    (files / "lines.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    expected = LLM2Vec.from_pretrained(runs[1]).encode([line.strip() for line in lines], "Find:", normalize=True)
    for name in ("lines.txt", "lines.jsonl"):
        embed.main(["--model", str(runs[1]), "--input", str(files / name), "--output", str(files / "x.npy"),
                    "--instruction", "Find:", "--normalize", "--batch-size", "4"])  # fmt: skip
        np.testing.assert_allclose(np.load(files / "x.npy"), expected, rtol=1e-4, atol=1e-4)
    assert not list(files.glob("*.part"))


def test_exported_card_tells_the_stages_and_score(runs, tmp_path):
    export.main(["--model", str(runs[1]), "--output", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Adapter 1: stage mntp, steps 3" in card and "Adapter 2: stage simcse, steps 3" in card
    assert "Spearman x 100 on the run's --eval pairs: " in card


def test_adapter_flag(runs, model_folder, capsys):
    """base + adapters by hand is what the run's folder stands for."""
    tables = []
    for argv in (["--model", str(runs[1])], ["--model", str(model_folder), "--adapter", str(runs[0]), "--adapter", str(runs[1])]):
        embed.main([*argv, "a cat", "a dog"])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


def test_chunks_do_not_change_the_rows(runs, files, monkeypatch):
    (files / "many.txt").write_text("\n".join(TEXTS[:6] * 4))
    command = ["--model", str(runs[1]), "--input", str(files / "many.txt"), "--output"]
    embed.main([*command, str(files / "whole.npy")])
    monkeypatch.setattr(embed, "CHUNK", 1)
    embed.main([*command, str(files / "parts.npy"), "--batch-size", "5"])
    np.testing.assert_allclose(np.load(files / "whole.npy"), np.load(files / "parts.npy"), rtol=1e-4, atol=1e-4)


def test_help_shows_the_presets_defaults(capsys):
    for argv, expected in (
        (["--model", "mistral-7b"], "--mask-probability MASK_PROBABILITY mntp: share of tokens to predict [0.8]"),
        (["--model", "sheared-llama-1.3b"], "mntp: share of tokens to predict [0.2]"),
        (["--stage", "simcse", "--model", "llama-2-7b"], "--batch-size BATCH_SIZE sequences per optimizer step, over all processes [128]"),
        (["--stage", "simcse", "--model", "llama-2-7b"], "peak learning rate [3e-05]"),
    ):
        with pytest.raises(SystemExit):
            train.main([*argv, "--help"])
        assert expected in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "mtnp"], "--stage is 'mtnp', expected one of pretrain, mntp, simcse"),
        (["--model", "nowhere"], "'nowhere' is neither a folder nor a hub id"),
        (["--stpes", "3"], "unrecognized arguments: --stpes 3"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "--steps is 0, expected a number above 0"),
        (["--lora-dropout", "1.5"], r"--lora-dropout is 1.5, expected a number in \[0, 1\)"),
        (["--pooling", "cls"], "invalid choice: 'cls'"),
        (["--mask-style", "span"], "invalid choice: 'span'"),
        (["--causal"], "--causal: MNTP trains a bidirectional encoder"),
        (["--data", "nowhere.txt"], "nowhere.txt: not a readable text file"),
        (["--eval", "nowhere.tsv"], "nowhere.tsv: not a readable text file"),
        (["--device", "cuda:9"], "device 'cuda:9' is not available"),
        (["--max-length", "1500"], "every 20th line of --data, held out, has .* tokens, at least one block of 1500"),
        (["--stage", "simcse", "--batch-size", "5000"], "the data has 180 examples, fewer than one batch of 5000"),
        (["--preset", "gpt"], "--preset is 'gpt', expected one of"),
        (["--resume"], "holds no checkpoint of an unfinished run"),
        (["--output", "{runs}"], "already holds files; --overwrite starts anew"),
    ],
)
def test_mistakes(argv, message, files, model_folder, runs):
    argv = [a.replace("{runs}", str(runs[0])) for a in argv]
    defaults = ["--stage", "mntp", "--model", str(model_folder), "--data", str(files / "text.txt"),
                "--output", str(files / "new"), "--max-length", "16", *QUICK]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        train.main([*defaults, *argv])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give texts to compare, or --input"),
        (["--input", "x.txt"], "go together"),
        (["--input", "nowhere.txt", "--output", "x.npy"], "nowhere.txt: not a readable"),
        (["--input", "{text}", "--output", "x.txt"], "ends in .npy"),
        (["--input", "{text}", "--output", "/nowhere/x.npy"], "/nowhere/x.npy: cannot be written"),
        (["a", "--model", "/nowhere"], "neither a folder nor a hub id"),
    ],
)
def test_embed_mistakes(argv, message, files, model_folder):
    argv = [a.replace("{text}", str(files / "text.txt")) for a in argv]
    if "--model" not in argv:
        argv += ["--model", str(model_folder)]
    with pytest.raises(ValueError, match=message):
        embed.main(argv)


@pytest.mark.parametrize("command", [["train.py", "--stage", "nope"], ["embed.py", "--model", "nowhere", "x"]])
def test_exit_code_and_one_line(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{command[0]}: error: ") and done.stderr.count("\n") == 1


def test_dry_run_loads_nothing(model_folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())  # no weights beside it
    train.main(["--model", str(tmp_path), "--data", "x", "--dry-run", "--output", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "parameters" in out and "peak memory" in out and "logits" in out
    assert not (tmp_path / "run").exists()


def test_out_of_memory_names_the_largest_item(model_folder, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_mntp", fail)
    (tmp_path / "text.txt").write_text("some words to train on\n" * 900)
    flags = ["--model", str(model_folder), "--data", str(tmp_path / "text.txt"), "--eval", "", "--device", "cpu"]
    with pytest.raises(ValueError, match="GB are activations: try --gradient-checkpointing or a smaller --micro-batch-size"):
        train.main([*flags, "--batch-size", "64", "--max-length", "64", "--output", str(tmp_path / "run")])


@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_compiled_steps_are_the_same(model_folder, tmp_path, stage):
    (tmp_path / "text.txt").write_text("".join(f"{i} words to train on, and {i * i} more\n" for i in range(200)))
    losses = []
    for extra in ([], ["--compile"]):
        output = tmp_path / f"run{len(extra)}"
        train.main([
            "--stage", stage, "--model", str(model_folder), "--data", str(tmp_path / "text.txt"), "--eval", "", "--device", "cpu",
            "--steps", "3", "--batch-size", "8", "--max-length", "32", "--lr", "1e-3", "--lora-dropout", "0",
            "--attention-dropout", "0", "--output", str(output), *extra,
        ])  # fmt: skip
        losses.append([r["loss"] for r in map(json.loads, open(output / "metrics.jsonl")) if "loss" in r])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-5)
