"""Lets the `mteb` package (2.x) evaluate an encoder:

python -m llm2vec_min.interop.mteb_adapter --model runs/simcse --tasks STS12 STSBenchmark SciFact --output results
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from ..cli import add_model_flags, run
from ..encoder import LLM2Vec
from ..files import read_json


class MTEBEncoder:
    """An `LLM2Vec` with the methods that mteb calls (its EncoderProtocol).

    Instructions: queries get the task's, documents none; where a task does not tell the two apart, every text gets it.

    Args:
        instructions: by task name, before mteb's own `task.metadata.prompt`. "" gives a task none.
    """

    def __init__(self, l2v: LLM2Vec, instructions: dict[str, str] | None = None):
        from mteb.models.model_meta import ModelMeta

        self.l2v, self.instructions = l2v, instructions or {}
        # mteb keeps results by name (owner/name) and revision: another run on the same base must not find this one's
        told = hashlib.sha256(json.dumps(self.instructions, sort_keys=True).encode()).hexdigest()[:8]
        revision = f"{l2v.fingerprint()}-{told}"
        name = f"llm2vec-min/{Path(l2v.base_model).name or 'model'}-{revision}"
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": revision})

    def instruction(self, task_metadata, prompt_type=None) -> str:
        """What to put before the texts of one side of a task."""
        if prompt_type is not None and str(getattr(prompt_type, "value", prompt_type)) != "query":
            return ""
        if task_metadata.name in self.instructions:
            return self.instructions[task_metadata.name]
        prompt = task_metadata.prompt or ""
        prompt = prompt.get("query", "") if isinstance(prompt, dict) else prompt
        return prompt.strip() + ":" if prompt and prompt.strip()[-1] not in ":;" else prompt

    def encode(self, inputs: DataLoader, *, task_metadata, prompt_type=None, **ignored) -> np.ndarray:
        """(N, C) float32, normalised, for batches of {"text": [...]}."""
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = self.instruction(task_metadata, prompt_type)
        return self.l2v.encode(texts, instruction, normalize=True)

    def similarity(self, a, b) -> Tensor:
        """Cosine of every pair, (N, M)."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(a, b)

    def similarity_pairwise(self, a, b) -> Tensor:
        """Cosine row by row, (N,)."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(a, b)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llm2vec_min.interop.mteb_adapter", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_model_flags(parser)
    parser.add_argument("--tasks", nargs="+", action="extend", required=True, help="names of mteb tasks")
    parser.add_argument("--instructions", metavar="FILE.json", help="task name -> instruction, before mteb's own")
    parser.add_argument("--output", default="results", help="folder for mteb's results [results]")
    args = parser.parse_args(argv)
    try:
        import mteb
    except ImportError:
        raise ValueError('the mteb package is not installed: pip install "mteb>=2"') from None
    instructions = read_json(args.instructions) if args.instructions else None
    if wrong := [name for name, text in (instructions or {}).items() if not isinstance(text, str)]:
        raise ValueError(f"{args.instructions}: the instruction of {wrong[0]!r} is no text")
    try:
        tasks = mteb.get_tasks(tasks=args.tasks)
    except KeyError as error:
        raise ValueError(f"--tasks: {error.args[0].removeprefix('KeyError: ')}") from None
    l2v = LLM2Vec.from_pretrained(args.model, adapters=args.adapter, dtype=args.dtype, device=args.device)
    encoder = MTEBEncoder(l2v, instructions)
    results = mteb.evaluate(encoder, tasks, cache=mteb.ResultCache(args.output))
    for result in results.task_results:
        print(f"{result.task_name}: {100 * result.get_score():.2f}")


if __name__ == "__main__":
    run(main)
