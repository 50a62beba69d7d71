"""Compares our vectors with those of the authors' library (llm2vec 0.2.3) on one tiny random checkpoint.

That library needs old versions of its own, so it runs in an environment of its own:

    python -m venv authors && authors/bin/pip install torch==2.13.0 llm2vec==0.2.3 transformers==4.44.2 peft==0.13.2 "numpy<2.3"
    python tests/benchmarks/authors.py --python authors/bin/python

Prints the largest difference for every pooling mode, with and without instruction; README.md explains the ones that differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TEXTS = ["The cat sat on the mat.", "A quick brown fox jumps over the lazy dog in the middle of the night.", "What is it?"]
INSTRUCTION = "Retrieve texts that mean the same:"
MODES = ("mean", "weighted_mean", "eos_token", "bos_token")


def theirs(folder: str, output: str) -> None:
    """Runs in the other environment."""
    import torch
    from llm2vec import LLM2Vec

    vectors = {}
    for mode in MODES:
        l2v = LLM2Vec.from_pretrained(folder, pooling_mode=mode, max_length=64, doc_max_length=64, torch_dtype=torch.float32)
        for name, instruction in (("plain", ""), ("instruction", INSTRUCTION)):
            items = [[instruction, text] if instruction else text for text in TEXTS]
            vectors[f"{mode}/{name}"] = l2v.encode(items, batch_size=3, show_progress_bar=False, device="cpu").numpy()
            one = [l2v.encode([item], batch_size=1, show_progress_bar=False, device="cpu").numpy() for item in items]
            vectors[f"{mode}/{name}/one"] = np.concatenate(one)
    l2v = LLM2Vec.from_pretrained(folder, pooling_mode="mean", max_length=64, doc_max_length=64, torch_dtype=torch.float32)
    l2v.model.config._name_or_path = "meta-llama/Llama-2-7b-chat-hf"  # that is what the library goes by
    vectors["template"] = l2v.encode(TEXTS, batch_size=3, show_progress_bar=False, device="cpu").numpy()
    np.savez(output, **vectors)


def make_checkpoint(folder: Path) -> None:
    """A random Llama and a tokenizer that both generations of the libraries read."""
    from conftest import make_reference, write_tokenizer
    from llm2vec_min.config import ModelConfig

    make_reference("llama", vocab_size=600).save_pretrained(folder)
    config = ModelConfig.from_folder(folder).to_dict() | {"architectures": ["LlamaForCausalLM"], "_name_or_path": "tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, "llama-2")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def compare(python: str) -> dict[str, float]:
    """Largest absolute difference by case, components being of order one."""
    from llm2vec_min import LLM2Vec

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        folder.mkdir()
        make_checkpoint(folder)
        subprocess.run([python, __file__, "--theirs", str(folder), work + "/out.npz"], check=True)
        their = dict(np.load(work + "/out.npz"))
        l2v = LLM2Vec.from_pretrained(folder, max_length=64, device="cpu")
        differences = {}
        for name, instruction in (("plain", None), ("instruction", INSTRUCTION)):
            ended = [text + " </s>" for text in TEXTS]  # what the library does for eos_token
            head = instruction + " " if instruction else ""
            ours = {
                "mean": ("mean", l2v.encode(TEXTS, instruction, pooling="mean")),
                "weighted_mean": ("weighted_mean", l2v.encode(TEXTS, instruction, pooling="weighted_mean")),
                "eos_token": ('last, of "text </s>"', l2v.encode(ended, instruction, pooling="last")),
                "bos_token": ("the state of BOS", bos_states(l2v, [head + text for text in TEXTS])),
                "eos_token ": ("last", l2v.encode(TEXTS, instruction, pooling="last")),
                "bos_token ": ("first", l2v.encode(TEXTS, instruction, pooling="first")),
            }
            for mode, (label, vectors) in ours.items():
                for batch, suffix in (("batch of 3", ""), ("one by one", "/one")):
                    difference = np.abs(their[f"{mode.strip()}/{name}{suffix}"] - vectors).max()
                    differences[f"{mode.strip():<14} {label:<22} {name:<12} {batch}"] = float(difference)
        l2v.template = ("[INST] ", " [/INST]")
        difference = np.abs(their["template"] - l2v.encode(TEXTS, pooling="mean")).max()
        differences[f"{'mean':<14} {'mean':<22} {'template':<12} batch of 3"] = float(difference)
        l2v.template = ("", "")
        before = len(l2v.encode(["[INST]"], pooling=None)[0])  # tokens in front of the text, BOS not counted
        states = [l2v.encode([f"[INST] {text} [/INST]"], pooling=None)[0][before:] for text in TEXTS]
        difference = np.abs(their["template"] - np.stack([s.mean(0) for s in states])).max()
        differences[f"{'mean':<14} {'mean, suffix too':<22} {'template':<12} batch of 3"] = float(difference)
    return differences


def bos_states(l2v, texts: list[str]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.stack([l2v.states(l2v.tokenize([text]))[0][0, 0].numpy() for text in texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of the environment that holds llm2vec")
    parser.add_argument("--theirs", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        return theirs(*args.theirs)
    root = Path(__file__).parent.parent.parent
    sys.path[:0] = [str(root), str(root / "tests")]
    print(f"{'theirs':<14} {'ours':<22}")
    for case, difference in compare(args.python).items():
        print(f"{case}  {difference:.1e}")


if __name__ == "__main__":
    main()
