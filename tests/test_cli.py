"""The two commands, on a tiny model: the chain, its files, and one clear line for every mistake."""

import errno
import fcntl
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import embed
import train
from conftest import TEXTS
from llm2vec_min import LLM2Vec
from llm2vec_min.config import PRESETS
from llm2vec_min.data import read_lines
from llm2vec_min.files import locked, replace_folder, write_json
from llm2vec_min.hub import find_preset
from llm2vec_min.interop import export
from llm2vec_min.training.flags import build_parser
from llm2vec_min.training.loop import Loop

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "3", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("\n".join(TEXTS[:6] * 30))
    sentences = [text.replace("\t", " ") for text in TEXTS]
    pairs = [f"{score}\t{a}\t{b}" for score, (a, b) in enumerate(zip(sentences[:4], sentences[1:5], strict=True))]
    (folder / "pairs.tsv").write_text("\n".join(pairs))
    return folder


@pytest.fixture(scope="module")
def runs(files, model_folder):
    """Both stages through the command line's main()."""
    common = ["--data", str(files / "text.txt"), "--eval", str(files / "pairs.tsv"), *QUICK]
    train.main(
        ["--stage", "mntp", "--model", str(model_folder), "--output", str(files / "mntp"), "--max-length", "16", *common]
    )
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
    out, count = capsys.readouterr().out, len(read_lines([files / "text.txt"]))
    assert "cosine of A and B" in out and f"{count} sentences: 3 steps of 4 are {12 / count:.3g} epochs" in out


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


def test_embed_says_what_might_surprise(runs, files, tmp_path, capsys):
    embed.main(["--model", str(runs[1]), str(files / "text.txt"), "cats " * 99, "--max-length", "20"])
    out = capsys.readouterr().out
    assert "2 of the texts fill --max-length 20; longer ones are cut" in out or "1 of the texts fill --max-length 20" in out
    assert "text 1 is a file's name, read as a text; --input reads the file" in out
    lines = tmp_path / "long.txt"
    lines.write_text("cats " * 99 + "\na cat\n")
    command = ["--model", str(runs[1]), "--input", str(lines), "--output", str(tmp_path / "v.npy"), "--max-length", "20"]
    embed.main(command)
    out = capsys.readouterr().out
    assert "1 texts fill --max-length 20" in out and "replaced" not in out
    embed.main(command)
    assert "v.npy is there, and is replaced at the end" in capsys.readouterr().out
    lines = tmp_path / "empty.jsonl"
    lines.write_text('"a cat"\n{"text": " "}\n')
    embed.main(["--model", str(runs[1]), "--input", str(lines), "--output", str(tmp_path / "v2.npy")])
    assert "1 of the texts embedded now are empty; their vectors are zeros" in capsys.readouterr().out
    assert np.load(tmp_path / "v2.npy").any(axis=1).tolist() == [True, False]
    embed.main(["--model", str(runs[1]), "a", ""])
    assert "1 of the texts are empty; their vectors are zeros" in capsys.readouterr().out


def test_adapter_flag(runs, model_folder, capsys):
    """base + adapters by hand is what the run's folder stands for."""
    tables = []
    for argv in (
        ["--model", str(runs[1])],
        ["--model", str(model_folder), "--adapter", str(runs[0]), "--adapter", str(runs[1])],
    ):
        embed.main([*argv, "a cat", "a dog"])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


def test_shorter_vectors(runs, files, capsys):
    (files / "short.txt").write_text("\n".join(TEXTS[:4]))
    embed.main(
        ["--model", str(runs[1]), "--input", str(files / "short.txt"), "--output", str(files / "short.npy"), "--dim", "8"]
    )
    expected = LLM2Vec.from_pretrained(runs[1]).encode([text.strip() for text in TEXTS[:4]])
    np.testing.assert_allclose(np.load(files / "short.npy"), expected[:, :8], rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    embed.main(["--model", str(runs[1]), "--dim", "8", *TEXTS[:2]])
    a, b = expected[:2, :8]
    assert f"{a @ b / np.linalg.norm(a) / np.linalg.norm(b):>7.3f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="dim is 65, expected a number from 1 to 64"):
        embed.main(["--model", str(runs[1]), "--dim", "65", "a", "b"])


def test_chunks_do_not_change_the_rows(runs, files, monkeypatch):
    (files / "many.txt").write_text("\n".join(TEXTS[:6] * 4))
    command = ["--model", str(runs[1]), "--input", str(files / "many.txt"), "--output"]
    embed.main([*command, str(files / "whole.npy")])
    monkeypatch.setattr(embed, "CHUNK", 1)
    embed.main([*command, str(files / "parts.npy"), "--batch-size", "5"])
    np.testing.assert_allclose(np.load(files / "whole.npy"), np.load(files / "parts.npy"), rtol=1e-4, atol=1e-4)


def embed_interrupted(monkeypatch, argv):
    """Embeds as far as the second chunk."""
    encode, calls = LLM2Vec.encode, []

    def die_in_the_second_chunk(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, *arguments, **options)

    monkeypatch.setattr(embed, "CHUNK", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LLM2Vec, "encode", die_in_the_second_chunk)
        embed.main(argv)


def test_a_retrained_model_does_not_continue_the_vectors_of_the_old_one(files, runs, model_folder, tmp_path, monkeypatch):
    train.main(["--model", str(model_folder), "--data", str(files / "text.txt"), "--eval", "", "--output", str(tmp_path / "run"),
                "--max-length", "16", *QUICK])  # fmt: skip
    argv = ["--model", str(tmp_path / "run"), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")]
    embed_interrupted(monkeypatch, argv)
    train.main(["--model", str(model_folder), "--data", str(files / "text.txt"), "--eval", "", "--output", str(tmp_path / "run"),
                "--max-length", "16", *QUICK, "--lr", "1e-2", "--overwrite"])  # fmt: skip
    with pytest.raises(ValueError, match="with other arguments .encoder was '"):
        embed.main(argv)


def test_embedding_ends_whole_whenever_it_was_killed(files, runs, tmp_path, monkeypatch):
    argv = ["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")]
    embed.main(argv)
    expected = np.load(tmp_path / "x.npy")
    embed_interrupted(monkeypatch, argv)
    (tmp_path / "x.npy.part").rename(tmp_path / "x.npy")  # as a kill between the last two steps leaves it
    embed.main(argv)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_embedding_killed_twice(files, runs, tmp_path, monkeypatch):
    """First after the vectors were put in place, with all chunks marked as done, then as soon as the new file is there."""
    argv = ["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")]
    embed.main(argv)
    expected = np.load(tmp_path / "x.npy")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed, "put", lambda part, output: part.rename(output) and (_ for _ in ()).throw(KeyboardInterrupt))
        embed.main(argv)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "posix_fallocate", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        embed.main(argv)
    embed.main(argv)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=1e-4, atol=1e-5)


def test_two_commands_on_one_output(files, runs, model_folder, tmp_path, monkeypatch):
    with open(tmp_path / "run.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="run: another command is writing it now"):
            train.main(flags_of(files, model_folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with open(tmp_path / "x.npy.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="x.npy: another command is writing it now"):
            embed.main(["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")])
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no locks here")))
    embed.main(["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")])


def test_a_lock_on_a_removed_file_keeps_nobody_off(tmp_path, monkeypatch):
    """A command that ends between another's open and its lock takes the file away; a third would make a new one."""
    flock, removed = fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.append((tmp_path / "run.lock").unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="is writing it now"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run.lock").exists()


def test_a_file_named_like_a_lock_or_part_is_not_lost(files, runs, tmp_path):
    """Neither emptied nor removed, nor, where it is a link, what it leads to."""
    precious = tmp_path / "precious"
    for name in ("x.npy.lock", "run.lock", "precious"):
        (tmp_path / name).write_text("mine")
    argv = ["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output"]
    embed.main([*argv, str(tmp_path / "x.npy")])
    with pytest.raises(ValueError, match="nowhere.txt: not a readable"):
        train.main(["--data", "nowhere.txt", "--output", str(tmp_path / "run")])
    for name in ("y.npy.lock", "y.npy.part", "y.npy.part.done", "y.npy.part.json.part"):
        (tmp_path / name).symlink_to(precious)
    embed.main([*argv, str(tmp_path / "y.npy")])
    assert not (tmp_path / "y.npy").is_symlink()
    for name in ("x.npy.lock", "run.lock", "precious"):
        assert (tmp_path / name).read_text() == "mine"


def as_array(**options):
    return lambda path: np.save(open(path, "wb"), np.zeros(**({"shape": (180, 64), "dtype": np.float32} | options)))


@pytest.mark.parametrize(
    ("end", "spoil"),
    [
        (".part", lambda path: os.truncate(path, 1000)),
        (".part", lambda path: path.write_bytes(b"")),
        (".part", lambda path: path.write_bytes(b"no array")),
        (".part", as_array(shape=(300, 64))),
        (".part", as_array(shape=())),
        (".part", as_array(dtype=np.float64)),
        (".part", as_array(order="F")),
        (".part.done", lambda path: os.truncate(path, 1)),
        (".part.done", lambda path: path.unlink()),
    ],
)
def test_damaged_vectors_of_a_stopped_run_are_refused(files, runs, tmp_path, monkeypatch, end, spoil):
    argv = ["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")]
    embed_interrupted(monkeypatch, argv)
    spoil(tmp_path / f"x.npy{end}")
    with pytest.raises(ValueError, match=r"x.npy.part: what a stopped run left is damaged .*; delete it to start anew"):
        embed.main(argv)
    (tmp_path / "x.npy.part").unlink()
    embed.main(argv)
    assert (np.load(tmp_path / "x.npy") != 0).any(axis=1).all()


def test_no_run_ends_with_weights_that_are_not_finite(files, model_folder, tmp_path):
    argv = [*flags_of(files, model_folder, tmp_path / "run"), "--eval", "", "--max-grad-norm", "0"]
    for flags, message in ((["--lr", "1e38", "--steps", "1"], "the trained weights are not finite"),
                           (["--lr", "1e37", "--steps", "3"], "the trained weights are not finite|. of 3 steps, the last ones, were not finite")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train.main([*argv, *flags, "--overwrite"])
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_vectors_that_are_not_finite_are_an_error(files, model_folder, tmp_path, monkeypatch):
    broken = LLM2Vec.from_pretrained(model_folder, device="cpu")
    broken.decoder.norm.weight.data[3] = float("inf")
    monkeypatch.setattr(LLM2Vec, "from_pretrained", lambda *arguments, **options: broken)
    with pytest.raises(ValueError, match="the vector of text 1 is not finite .2 of 2 are not."):
        embed.main(["a", "b", "--model", str(model_folder)])
    with pytest.raises(ValueError, match="the vector of text 1 is not finite"):
        embed.main(["--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy"), "--normalize"])
    broken.decoder.norm.weight.data[:] = 0
    with pytest.raises(ValueError, match="the vector of text 2 is zero .1 of 2 are.: its training has collapsed"):
        embed.main(["", "b", "--model", str(model_folder)])
    with pytest.raises(ValueError, match="the vector of text 1 is zero"):
        embed.main(["--input", str(files / "text.txt"), "--output", str(tmp_path / "y.npy")])


def test_a_file_that_shrinks_is_an_error_not_zeros(files, runs, tmp_path, monkeypatch):
    lines = list(embed.iter_lines(files / "text.txt"))
    reads = iter([iter(lines), iter(lines[:100])])
    monkeypatch.setattr(embed, "iter_lines", lambda *arguments, **options: next(reads))
    monkeypatch.setattr(embed, "CHUNK", 2)
    with pytest.raises(ValueError, match="text.txt: 100 lines, but 180 were counted"):
        embed.main(["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")])
    assert not (tmp_path / "x.npy").exists()


def test_output_that_is_not_utf8(runs):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "embed.py", "--model", str(runs[1]), "ein Bär", "漢字"], cwd=ROOT, capture_output=True,
                          text=True, env=environment)  # fmt: skip
    assert done.returncode == 0 and "ein B\\xe4r" in done.stdout


def test_help_shows_the_presets_defaults(capsys):
    for argv, expected in (
        (["--model", "mistral-7b"], "--mask-probability MASK_PROBABILITY mntp: share of tokens to predict [0.8]"),
        (["--model", "sheared-llama-1.3b"], "mntp: share of tokens to predict [0.2]"),
        (
            ["--stage", "simcse", "--model", "llama-2-7b"],
            "--batch-size BATCH_SIZE sequences (supervised: triplets) per optimizer step, over all processes [128]",
        ),
        (["--stage", "simcse", "--model", "llama-2-7b"], "peak learning rate [3e-05]"),
        (
            ["--stage", "supervised", "--model", "llama-2-7b"],
            "(supervised: triplets) per optimizer step, over all processes [512]",
        ),
    ):
        with pytest.raises(SystemExit):
            train.main([*argv, "--help"])
        assert expected in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "mtnp"], "--stage is 'mtnp', expected one of pretrain, mntp, simcse, supervised"),
        (["--model", "nowhere"], "'nowhere' is neither a folder nor a hub id"),
        (["--stpes", "3"], "unrecognized arguments: --stpes 3"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "--steps is 0, expected a number above 0"),
        (["--max-grad-norm", "inf"], "--max-grad-norm is inf, expected a finite number"),
        (["--weight-decay", "nan"], "--weight-decay is nan, expected a finite number"),
        (["--stage", "pretrain", "--dry-run"], "--dry-run plans the stages that train an adapter"),
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
        (["--output", "{runs}"], "already holds a run; --overwrite starts anew"),
        (["--output", "{model}"], "is the --model too; a stage writes into a folder of its own"),
        (["--mask-probability", "1.5"], r"--mask-probability is 1.5, expected a number in \(0, 1\]"),
        (["--adam-beta2", "1.5"], r"--adam-beta2 is 1.5, expected a number in \[0, 1\)"),
        (["--lora-alpha", "0"], "--lora-alpha is 0.0, expected a number above 0"),
        (["--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["--stage", "simcse", "--batch-size", "1"], "the negatives are the other texts of the batch, it needs at least 2"),
        (["--model", "{causal}"], "this one is causal: causal=False, or --no-causal"),
        (["--stage", "pretrain", "--hidden-size", "100"], "--hidden-size is 100, expected an even number for each of 4"),
        (["--stage", "pretrain", "--num-key-value-heads", "3"], "--num-key-value-heads is 3, expected a divisor of 4"),
        (["--stage", "simcse", "--temperature", "20"], "--temperature is 20.0, .* a scale of 20 is 0.05"),
        (["--stage", "pretrain", "--num-hidden-layers", "0"], "--num-hidden-layers is 0, expected a number above 0"),
        (["--stage", "pretrain", "--data", "{long}", "--batch-size", "9000"], "examples, fewer than one batch of 9000"),
        (
            ["--stage", "pretrain", "--model", "{model}"],
            "--model: is for --stage mntp or simcse or supervised, pretrain does not",
        ),
        (["--stage", "pretrain", "--vocab-size", "100"], "--vocab-size is 100, expected from 259 .all bytes"),
        (["--stage", "mntp", "--vocab-size", "300"], "--vocab-size: is for --stage pretrain, mntp does not read it"),
        (["--model", "~nobodys/run"], "'~nobodys/run' is neither a folder nor a hub id"),
        (["--data", "/dev/null"], "/dev/null: is a pipe, a device or a folder, expected"),
        (["--output", "."], "--output .: expected a folder of its own, by name"),
        (["--data", ""], "--data: found an empty name"),
        (["--data", "{folder}"], "pipe.txt: is a pipe, a device or a folder, expected"),
        (["--eval", "{pipe}"], "pipe.txt: is a pipe, a device or a folder"),
        (["--lora-r", "9" * 30], "--lora-r is 999.*, expected a smaller number"),
        (["--max-length", "3000000000"], "--max-length is 3000000000, expected a smaller number"),
        (["--lora-alpha", "1e300"], "--lora-alpha is 1e.300, expected a number above 0 and below 1e30"),
        (["--stage", "pretrain", "--vocab-size", "1000000000"], "--vocab-size is 1000000000, expected from 259 .* to 4194304"),
        (["--stage", "supervised", "--model", "{mistyped}"], "mistyped' is neither a folder nor a hub id"),
        (["--output", "{foreign}", "--overwrite"], "foreign: holds files, but not a run"),
        (["--output", "{parts}"], "parts: holds files, but not a run"),
        (["--model"], "argument --model: expected one argument"),
    ],
)
def test_mistakes(argv, message, files, model_folder, runs, tmp_path):
    """Each is refused before anything is written: nothing stands in the way of its correction."""
    if "{causal}" in argv:
        train.main(["--stage", "simcse", "--causal", "--model", str(model_folder), "--data", str(files / "text.txt"),
                    "--output", str(tmp_path / "causal"), *QUICK])  # fmt: skip
    (tmp_path / "long.txt").write_text("\n".join(TEXTS[:6] * 400))
    for name, file in (("folder", "x.txt"), ("foreign", "train_args.json"), ("parts", "film.mp4.part")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    os.mkfifo(tmp_path / "folder" / "pipe.txt")
    names = {"{runs}": runs[0], "{model}": model_folder, "{causal}": tmp_path / "causal", "{long}": tmp_path / "long.txt",
             "{folder}": tmp_path / "folder", "{pipe}": tmp_path / "folder" / "pipe.txt", "{foreign}": tmp_path / "foreign",
             "{parts}": tmp_path / "parts", "{mistyped}": tmp_path / "folder" / "mistyped"}  # fmt: skip
    argv = [str(names.get(a, a)) for a in argv]
    model = [] if "pretrain" in argv else ["--model", str(model_folder)]
    defaults = ["--stage", "mntp", *model, "--data", str(files / "text.txt"),
                "--output", str(files / "new"), "--max-length", "16", *QUICK]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        train.main([*defaults, *argv])
    assert not (files / "new").exists()


def test_an_overwritten_run_stays_whole_until_the_new_one_has_ended(files, model_folder, tmp_path, monkeypatch):
    flags = ["--model", str(model_folder), "--data", str(files / "text.txt"), "--output", str(tmp_path / "run"), "--eval", "",
             "--max-length", "16", *QUICK]  # fmt: skip
    train.main([*flags, "--save-every", "1"])
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        update = Loop.update

        def die(self, *arguments):
            if self.step == 2:
                raise KeyboardInterrupt
            update(self, *arguments)

        patch.setattr(Loop, "update", die)
        train.main([*flags, "--lr", "1e-3", "--save-every", "1", "--overwrite"])
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    train.main([*flags, "--lr", "1e-3", "--save-every", "1", "--resume"])
    assert json.loads((tmp_path / "run" / "train_args.json").read_text())["lr"] == 1e-3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    (files / "long.txt").write_text("\n".join(TEXTS[:6] * 400))
    flags[flags.index("--data") + 1] = str(files / "long.txt")
    del flags[:2]  # the model: pretraining makes one
    pretrain = ["--stage", "pretrain", "--vocab-size", "300", "--hidden-size", "16", "--intermediate-size", "32",
                "--num-hidden-layers", "1"]  # fmt: skip
    train.main([*flags, "--overwrite", *pretrain])
    os.replace(tmp_path / "run", tmp_path / "run.part")  # as a kill just before the last rename leaves it
    (tmp_path / "run").mkdir()
    train.main([*flags, "--resume", *pretrain])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" not in names and "model.safetensors" in names
    assert LLM2Vec.from_pretrained(tmp_path / "run").decoder.config.hidden_size == 16


def test_a_model_that_is_not_there_is_said_before_data_is_fetched(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm2vec_min.hub.fetch", lambda *_: pytest.fail("something was fetched"))
    with pytest.raises(ValueError, match="'runs/mntp': no such folder"):
        train.main(["--stage", "simcse", "--model", "runs/mntp", "--device", "cpu", "--output", str(tmp_path / "new")])


def test_what_a_killed_replacement_leaves_is_named(files, model_folder, tmp_path, monkeypatch):
    """And as a model it is an unfinished run; the weights do not depend on how often it is saved and scored."""
    output = tmp_path / "run"
    flags = [*flags_of(files, model_folder, output), "--save-every", "1"]
    train.main(flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LLM2Vec, "save_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train.main([*flags, "--overwrite"])
    with pytest.raises(ValueError, match="already holds a run, and .*run.part the unfinished one .*--resume continues that"):
        train.main(flags)
    with pytest.raises(ValueError, match="run.part: is an unfinished run; train.py with --resume"):
        LLM2Vec.from_pretrained(f"{output}.part", device="cpu")
    train.main([*flags, "--resume", "--save-every", "2", "--eval-every", "1"])
    assert not Path(f"{output}.part").exists()


def test_resume_at_any_moment(files, model_folder, tmp_path, capsys):
    """Nothing there, only the arguments, or all of it: the same command gets to the end."""
    flags = ["--model", str(model_folder), "--data", str(files / "text.txt"), "--output", str(tmp_path / "run"), "--eval", "",
             "--max-length", "16", "--resume", *QUICK]  # fmt: skip
    train.main(flags)
    assert "no checkpoint yet, training starts from the beginning" in capsys.readouterr().out
    weights = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    metrics = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    for file in (tmp_path / "run").iterdir():
        if file.name not in ("train_args.json", "metrics.jsonl"):
            file.unlink()
    train.main(flags)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == weights
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == metrics
    capsys.readouterr()
    train.main(flags)
    assert "is finished, nothing is left to do" in capsys.readouterr().out


def test_pretraining_is_one_process(files, model_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--stage pretrain runs in one process, found 2"):
        train.main(["--stage", "pretrain", "--data", str(files / "text.txt"), "--output", str(files / "new")])


def test_every_file_is_held_out_in_part(files, tmp_path, monkeypatch):
    """The blocks that MNTP is scored on are spread over all that is held out, not its beginning."""
    (tmp_path / "a.txt").write_text("one two three\n" * 400)
    (tmp_path / "b.txt").write_text("seven eight nine\n" * 400)
    seen = []
    monkeypatch.setattr(train, "HELD_OUT", 4)
    monkeypatch.setattr(train, "train_mntp", lambda l2v, blocks, held_out, *_, **__: seen.append((l2v, held_out)))
    monkeypatch.setattr(LLM2Vec, "save_run", lambda *_: None)
    monkeypatch.setattr(train, "finish_output", lambda *_: None)
    train.main(["--data", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--eval", "", "--max-length", "8",
                "--output", str(tmp_path / "run"), "--device", "cpu"])  # fmt: skip
    ((l2v, held_out),) = seen
    texts = [l2v.tokenizer.decode(block) for block in held_out]
    assert len(texts) == 4 and "two" in texts[0] and "eight" in texts[-1]


def test_what_is_held_out_is_not_trained_on(tmp_path, monkeypatch):
    """Every 20th line."""
    (tmp_path / "a.txt").write_text("".join(f"number {n} and here the line ends\n" for n in range(1, 61)))
    seen = []
    monkeypatch.setattr(train, "train_mntp", lambda l2v, blocks, held_out, *_, **__: seen.append((l2v, blocks, held_out)))
    monkeypatch.setattr(LLM2Vec, "save_run", lambda *_: None)
    monkeypatch.setattr(train, "finish_output", lambda *_: None)
    train.main(["--data", str(tmp_path / "a.txt"), "--eval", "", "--max-length", "4", "--output", str(tmp_path / "run"),
                "--device", "cpu"])  # fmt: skip
    ((l2v, *both),) = seen
    trained, held_out = (set(map(int, re.findall(r"number\s*(\d+)", l2v.tokenizer.decode(rows.ravel())))) for rows in both)
    assert held_out == {20, 40, 60} and trained == set(range(1, 61)) - held_out


def test_a_preset_is_remembered(files, model_folder, tmp_path):
    """A local copy trained with --preset keeps that recipe in its next stage."""
    train.main(["--preset", "mistral-7b", "--model", str(model_folder), "--data", str(files / "text.txt"), "--eval", "",
                "--output", str(tmp_path / "run"), "--max-length", "16", *QUICK])  # fmt: skip
    assert find_preset(tmp_path / "run") is PRESETS["mistral-7b"]
    assert LLM2Vec.from_pretrained(tmp_path / "run").preset == "mistral-7b"
    parser = build_parser(["--stage", "simcse", "--model", str(tmp_path / "run")], "")
    assert parser.get_default("micro_batch_size") == 32 and parser.get_default("gradient_checkpointing") is True


def test_repeated_flags_add_up(files):
    args = build_parser([], "").parse_args(["--data", "a", "--data", "b", "c"])
    assert args.data == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give texts to compare, or --input"),
        (["--input", "x.txt"], "go together"),
        (["--input", "nowhere.txt", "--output", "x.npy"], "nowhere.txt: not a readable"),
        (["--input", "{text}", "--output", "x.txt"], "ends in .npy"),
        (["--input", "{text}", "--output", "/nowhere/x.npy"], "/nowhere/x.npy: its folder does not exist"),
        (["a", "--model", "/nowhere"], "neither a folder nor a hub id"),
        (["a", "--max-length", "0"], "max_length is 0, expected at least 1 token"),
        (["--input", "{text}", "--output", "{folder.npy}"], "folder.npy: is a folder, expected a file"),
        (["--input", "{pipe}", "--output", "x.npy"], "is a pipe, a device or a folder, expected a file"),
        (["--input", "{npy}", "--output", "{npy}"], "same.npy: is also the --input"),
        (["--input", "{utf16}", "--output", "x.npy"], "utf16.txt: holds a zero byte in its first line; is it UTF-16"),
        (["--input", "{digits}", "--output", "x.npy"], "digits.jsonl:1: expected a JSON string or an object"),
        (["a", "--device", "meta"], "device 'meta' is not available .it holds no numbers"),
        (["a", "--device", "cpu:7"], "device 'cpu:7' is not available .there is one CPU"),
        (["a", "--model", ""], "model '' is neither a folder nor a hub id"),
        (["a", "--adapter", "{model}"], "is no adapter, expected a PEFT folder with adapter_config.json"),
        (["a", "--adapter", "tiny-mntp"], "tiny-mntp: is a preset, a model with its adapters, expected one adapter's"),
        (["--input", "{cut}", "--output", "x.npy"], "cut.jsonl:2: the text holds half of a surrogate pair"),
    ],
)
def test_embed_mistakes(argv, message, files, model_folder, tmp_path):
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cut.jsonl").write_text('"a"\n{"text": "cut \\ud83d"}\n')
    (tmp_path / "utf16.txt").write_bytes("a cat\n".encode("utf-16-le"))
    (tmp_path / "digits.jsonl").write_text("1" * 5000)
    (tmp_path / "same.npy").write_text("a text")
    names = {"{text}": files / "text.txt", "{folder.npy}": tmp_path / "folder.npy", "{pipe}": tmp_path / "pipe",
             "{cut}": tmp_path / "cut.jsonl", "{utf16}": tmp_path / "utf16.txt", "{digits}": tmp_path / "digits.jsonl",
             "{npy}": tmp_path / "same.npy", "{model}": model_folder}  # fmt: skip
    argv = [str(names.get(a, a)) for a in argv]
    if "--model" not in argv:
        argv += ["--model", str(model_folder)]
    with pytest.raises(ValueError, match=message):
        embed.main(argv)


@pytest.mark.parametrize("command", [["train.py", "--stage", "nope"], ["embed.py", "--model", "nowhere", "x"]])
def test_exit_code_and_one_line(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{command[0]}: error: ") and done.stderr.count("\n") == 1


def test_one_line_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    for command in (["embed.py"], ["train.py", "--output", "/dev/null/x"]):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "link" / command[0]), *command[1:]], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_wrong_computation_shows_where(tmp_path):
    """One line is for what a check has found; whoever changes the code and errs is told the place."""
    script = tmp_path / "script.py"
    for body, status, shown in (
        ("one, two, three = 1, 2", 1, "not enough values to unpack"),
        ("import numpy; numpy.stack([numpy.ones(2), numpy.ones(3)])", 1, "in main"),
        (
            "from llm2vec_min import LLM2Vec; LLM2Vec.from_pretrained('nowhere')",
            2,
            "script.py: error: model 'nowhere' is neither",
        ),
    ):
        script.write_text(f"from llm2vec_min.cli import run\ndef main(argv):\n    {body}\nrun(main)\n")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
        assert done.returncode == status and shown in done.stderr and ("Traceback" in done.stderr) == (status == 1)


def test_a_stage_without_a_call_is_no_success(files, model_folder, monkeypatch):
    monkeypatch.setattr(train, "check", lambda args, parser: None)  # as if its flags were known
    flags = ["--model", str(model_folder), "--data", str(files / "text.txt"), "--output", str(files / "own"), *QUICK]
    with pytest.raises(ValueError, match="--stage own: has no call here"):
        train.main(["--stage", "own", *flags])


def test_dry_run_needs_no_data(capsys):
    folder = str(ROOT / "llm2vec_min/assets/tiny")  # not "tiny", which brings its own data
    flags = ["--stage", "supervised", "--preset", "smollm2-135m", "--model", folder]
    train.main([*flags, "--dry-run"])
    assert "peak memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--data: give one or more .jsonl files"):
        train.main(flags)


def test_dry_run_loads_nothing(model_folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())  # no weights beside it
    train.main(["--model", str(tmp_path), "--data", "x", "--dry-run", "--output", str(tmp_path / "run")])
    train.main(["--stage", "simcse", "--model", "tiny-mntp", "--dry-run"])  # a preset that stands on another
    train.main(
        ["--stage", "simcse", "--model", str(ROOT / "llm2vec_min/assets/tiny/adapters/mntp"), "--dry-run"]
    )  # an adapter alone
    out = capsys.readouterr().out
    assert "parameters" in out and "peak memory" in out and "logits" in out
    assert not (tmp_path / "run").exists()


def test_dry_run_on_a_gpu_plans_what_the_run_would_choose_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    peaks = []
    for free in (80e9, 12e9):
        monkeypatch.setattr(train.memory, "free_memory", lambda device, free=free: free)
        train.main(["--stage", "simcse", "--batch-size", "4096", "--max-length", "512", "--dry-run"])
        out = capsys.readouterr().out
        assert f"for {free / 1e9:.0f} GB: --gradient-checkpointing" in out
        peaks.append(float(out.split("peak memory of each process")[1].split()[0]))
    assert peaks[0] > 12 > peaks[1]


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
            "--output", str(output), *(["--attention-dropout", "0"] if stage == "simcse" else []), *extra,
        ])  # fmt: skip
        losses.append([r["loss"] for r in map(json.loads, open(output / "metrics.jsonl")) if "loss" in r])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_compile_without_a_compiler(model_folder, tmp_path):
    (tmp_path / "text.txt").write_text("some words to train on\n" * 900)
    command = [sys.executable, str(ROOT / "train.py"), "--model", str(model_folder), "--data", str(tmp_path / "text.txt"), "--eval", "",
               "--device", "cpu", "--steps", "1", "--batch-size", "4", "--max-length", "16", "--output", str(tmp_path / "run"), "--compile"]  # fmt: skip
    nowhere = {"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("train.py: error: --compile needs a compiler")


# ---- what a resumed or replaced run must not do ----


def flags_of(files, model, output, stage="simcse"):
    return ["--stage", stage, "--model", str(model), "--data", str(files / "text.txt"), "--output", str(output), "--eval", "",
            "--max-length", "16", "--save-every", "1", *QUICK]  # fmt: skip


def train_interrupted(monkeypatch, argv):
    update = Loop.update

    def die(self, *arguments):
        if self.step == 2:
            raise KeyboardInterrupt
        update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "update", die)
        train.main(argv)


def test_other_peoples_folders_stay(files, model_folder, tmp_path):
    for name in ("run.old", "run.part", "exported.old", "exported.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    argv = flags_of(files, model_folder, tmp_path / "run")
    train.main([*argv, "--resume"])
    with pytest.raises(ValueError, match="run.part is in the way and is no run of ours"):
        train.main([*argv, "--overwrite"])
    (tmp_path / "run.part").rename(tmp_path / "saved")
    train.main([*argv, "--overwrite"])
    for _ in range(2):
        export.main(["--model", str(tmp_path / "run"), "--output", str(tmp_path / "exported"), "--overwrite"])
    for name in ("run.old", "saved", "exported.old", "exported.part"):
        assert (tmp_path / name / "mine").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 6, "nothing of ours is left beside"


def test_what_is_no_part_of_a_run_is_not_replaced_with_it(files, model_folder, tmp_path):
    argv = flags_of(files, model_folder, tmp_path / "run")
    train.main(argv)
    for path in ("vectors.npy", "scores.json", "exported/model.safetensors"):
        (tmp_path / "run" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / path).write_text("precious")
        with pytest.raises(ValueError, match="--overwrite would remove what is no part of the run: "):
            train.main([*argv, "--overwrite"])
    assert "exported, scores.json, vectors.npy; move it" in str(
        pytest.raises(ValueError, train.main, [*argv, "--overwrite"]).value
    )
    for path in ("vectors.npy", "scores.json", "exported/model.safetensors"):
        (tmp_path / "run" / path).unlink()
    (tmp_path / "run" / "exported").rmdir()
    for name in (".cache", ".ipynb_checkpoints"):
        (tmp_path / "run" / name).mkdir()
    for name in (".gitattributes", "README.md", "vocab.json", "special_tokens_map.json", "tokenizer.model"):
        (tmp_path / "run" / name).touch()
    train.main([*argv, "--overwrite"])


def test_a_result_that_cannot_be_saved(files, model_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LLM2Vec, "save_run", full)
    with pytest.raises(ValueError, match="run: the result could not be saved .*No space left.*--resume goes on"):
        train.main(flags_of(files, model_folder, tmp_path / "run"))


def test_an_export_of_an_export(runs, tmp_path, capsys):
    export.main(["--model", str(runs[1]), "--output", str(tmp_path / "one"), "--normalize"])
    assert "not taken over" not in capsys.readouterr().out
    export.main(["--model", str(tmp_path / "one"), "--output", str(tmp_path / "two")])
    assert "prompts and normalization of its own, if any, are not taken over" in capsys.readouterr().out


def test_an_earlier_stage_of_a_run_has_its_preset(tmp_path):
    (tmp_path / "run" / "adapters" / "0").mkdir(parents=True)
    (tmp_path / "run" / "llm2vec_config.json").write_text(json.dumps({"preset": "tiny"}))
    assert find_preset(tmp_path / "run" / "adapters" / "0") is PRESETS["tiny"]
    assert find_preset(f"{tmp_path}/run/adapters/0/") is PRESETS["tiny"]
    (tmp_path / "run" / "adapters" / "0" / "llm2vec_config.json").write_text(json.dumps({"preset": "tiny-mntp"}))
    assert find_preset(tmp_path / "run" / "adapters" / "0") is PRESETS["tiny-mntp"], "its own, where it is a run itself"


def test_what_a_stage_learns_to_read_is_read_in_use(files, model_folder, tmp_path, monkeypatch):
    """Longer texts than the model's own 512 tokens; and a run keeps its number of processes, each of which has its noise."""
    argv = flags_of(files, model_folder, tmp_path / "run")
    argv[argv.index("--max-length") + 1] = "700"
    train_interrupted(monkeypatch, argv)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="other arguments: processes was 1, is 2"):
        patch.setattr(train, "world_size", lambda: 2)
        train.main([*argv, "--resume"])
    train.main([*argv, "--resume"])
    assert LLM2Vec.from_pretrained(tmp_path / "run").max_length == 700
    train.main(flags_of(files, tmp_path / "run", tmp_path / "next"))
    assert LLM2Vec.from_pretrained(tmp_path / "next").max_length == 700


def test_a_preset_of_adapters_does_not_replace_the_runs_own(files, tmp_path):
    argv = flags_of(files, "tiny", tmp_path / "run")
    train.main([*argv, "--preset", "tiny-llm2vec"])
    own = [tmp_path / "run" / "adapter_model.safetensors"]
    assert [adapter / own[0].name for adapter in LLM2Vec.from_pretrained(tmp_path / "run").adapters] == own


def test_resume_knows_the_model_and_every_file(files, model_folder, tmp_path, monkeypatch):
    first = flags_of(files, model_folder, tmp_path / "mntp", "mntp")
    train.main(first)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes((files / "text.txt").read_bytes())
    argv = flags_of(files, tmp_path / "mntp", tmp_path / "run")
    argv[argv.index("--data") + 1] = str(tmp_path / "data")
    train_interrupted(monkeypatch, argv)
    (tmp_path / "data" / "b.txt").write_text("one more")
    with pytest.raises(ValueError, match="other arguments: files was"):
        train.main([*argv, "--resume"])
    (tmp_path / "data" / "b.txt").unlink()
    train.main([*first, "--lr", "1e-2", "--overwrite"])
    with pytest.raises(ValueError, match="other arguments: encoder was"):
        train.main([*argv, "--resume"])


def test_the_earlier_adapter_is_the_one_that_was_loaded(files, model_folder, tmp_path, monkeypatch):
    train.main(flags_of(files, model_folder, tmp_path / "mntp", "mntp"))
    expected = (tmp_path / "mntp" / "adapter_model.safetensors").read_bytes()
    update = Loop.update

    def replace(self, *arguments):
        if (tmp_path / "mntp").exists():
            (tmp_path / "mntp").rename(tmp_path / "gone")
        update(self, *arguments)

    monkeypatch.setattr(Loop, "update", replace)
    train.main(flags_of(files, tmp_path / "mntp", tmp_path / "run"))
    assert (tmp_path / "run" / "adapters" / "0" / "adapter_model.safetensors").read_bytes() == expected
    assert np.isfinite(LLM2Vec.from_pretrained(tmp_path / "run").encode("a cat")).all()


@pytest.mark.parametrize(
    ("stage", "flag", "value"),
    [
        ("simcse", "--matryoshka", "16"), ("simcse", "--filter-negatives", "0.9"), ("mntp", "--ratio", "a=2"),
    ],
)  # fmt: skip
def test_a_flag_that_the_stage_does_not_read(files, model_folder, tmp_path, stage, flag, value):
    with pytest.raises(ValueError, match=f"{flag}: is for --stage .*, {stage} does not read it"):
        train.main([*flags_of(files, model_folder, tmp_path / "run", stage), flag, value])


@pytest.mark.parametrize(
    "wrong", [["--dim", "9999"], ["--dim", "0"], ["--dim=-1"], ["--max-length", "2", "--instruction", "Retrieve texts"]]
)
def test_a_refused_embedding_leaves_nothing(files, runs, tmp_path, wrong):
    argv = ["--model", str(runs[1]), "--input", str(files / "text.txt"), "--output", str(tmp_path / "x.npy")]
    with pytest.raises(ValueError, match="--dim is|leaves no room for the text"):
        embed.main([*argv, *wrong])
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_top_brings_its_direction_or_is_refused(runs, files, model_folder, tmp_path):
    mntp, simcse = runs
    with pytest.raises(ValueError, match="stands on 1 earlier adapters: make it the model, or name them first"):
        LLM2Vec.from_pretrained(model_folder, adapters=[simcse])
    train.main([*flags_of(files, model_folder, tmp_path / "causal"), "--causal"])
    assert LLM2Vec.from_pretrained(model_folder, adapters=[tmp_path / "causal"]).causal is True


def test_a_replacement_that_fails_keeps_the_old_folder(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("x")
    replace = os.replace

    def full(a, b):
        if a == tmp_path / "new":
            raise OSError("no space left")
        replace(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        replace_folder(tmp_path / "new", tmp_path / "old")
    assert {path.name for path in tmp_path.rglob("*.txt")} == {"old.txt", "new.txt"}


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    fsync, replace, did = os.fsync, os.replace, []
    monkeypatch.setattr(
        os, "fsync", lambda n: did.append("folder" if stat.S_ISDIR(os.fstat(n).st_mode) else "file") or fsync(n)
    )
    monkeypatch.setattr(os, "replace", lambda *paths: did.append("rename") or replace(*paths))
    write_json(tmp_path / "a.json", {})
    assert did == ["file", "rename", "folder"]


def test_a_chunk_is_done_only_when_its_vectors_are_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("".join(f"text {i}\n" for i in range(8)))
    argv = ["--model", "tiny", "--input", str(tmp_path / "t.txt"), "--device", "cpu", "--batch-size", "4", "--output"]
    monkeypatch.setattr(embed, "CHUNK", 1)
    embed.main([*argv, str(tmp_path / "whole.npy")])
    flush = np.memmap.flush

    def power_cut(self):
        if self.dtype == np.float32 and self.any():
            self[:] = 0  # what was not on the disk yet
            raise KeyboardInterrupt
        flush(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np.memmap, "flush", power_cut)
        embed.main([*argv, str(tmp_path / "x.npy")])
    embed.main([*argv, str(tmp_path / "x.npy")])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.load(tmp_path / "whole.npy"))


def test_a_text_that_changed_without_growing_is_not_continued(tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_text("".join(f"text {i}\n" for i in range(8)))
    argv = [
        "--model",
        "tiny",
        "--input",
        str(text),
        "--device",
        "cpu",
        "--batch-size",
        "4",
        "--output",
        str(tmp_path / "x.npy"),
    ]
    embed_interrupted(monkeypatch, argv)
    text.write_text("".join(f"next {i}\n" for i in range(8)))
    os.utime(text, (1, 1))
    with pytest.raises(ValueError, match="with other arguments .*modified was"):
        embed.main(argv)
