"""Stores what `tiny` and its adapters make of 20 texts, so that a test sees any drift. Run it only when they are meant to change.

python tests/build_vectors.py                 # writes tests/tiny_vectors.safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from llm2vec_min import LLM2Vec

FILE = Path(__file__).parent / "tiny_vectors.safetensors"
ENCODERS = {"causal": ("tiny", True), "bidirectional": ("tiny", False)} | {
    name: (name, None) for name in (
        "tiny-mntp", "tiny-llm2vec", "tiny-supervised", "tiny-causal-simcse", "tiny-bidirectional-simcse"
    )
}  # fmt: skip
TEXTS = [
    "A cat sat on the mat.",
    "The quick brown fox jumps over the lazy dog, twice.",
    "Oil prices fell on Thursday to their lowest level in almost three years.",
    "How do I get red wine out of a white carpet?",
    "to give up a throne or high office of one's own free will",
    "Über den Wolken 🙂",
    "漢字とひらがな",
    "São Paulo, 1984: 12 million people?",
    "snake_case__name = other_name + 1",
    "x",
    " leading and trailing spaces ",
    "two\nlines\n\nand a tab\there",
    "UPPER CASE, lower case, MiXeD",
    "https://example.org/a?b=c&d=%20e",
    "3.14159265358979323846264338327950288419716939937510",
    "e\u0301 is two characters, \u00e9 is one",
    "</s> <s> are words here as well as tokens",
    "Not all that glitters is gold; all that is gold does not glitter.",
    "A very long sentence goes on " + "and on " * 40 + "until it stops.",
    "The end.",
]


def vectors(preset: str, causal: bool | None) -> torch.Tensor:
    """(20, C) float32 of length 1."""
    options = {} if causal is None else {"causal": causal}
    return torch.from_numpy(LLM2Vec.from_pretrained(preset, device="cpu", **options).encode(TEXTS, normalize=True))


if __name__ == "__main__":
    save_file({name: vectors(*encoder) for name, encoder in ENCODERS.items()}, FILE)
    print(FILE)
