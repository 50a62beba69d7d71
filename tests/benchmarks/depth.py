"""What the loss of the mask does at each depth: Spearman x 100 of each layer's states, causal and bidirectional, untrained.

python tests/benchmarks/depth.py --models tiny $(python tests/build_smollm2.py)     # writes results/depth.json
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from llm2vec_min import LLM2Vec
from llm2vec_min.data import read_pairs
from llm2vec_min.encoder import sorted_batches
from llm2vec_min.evaluation import spearman
from llm2vec_min.files import write_json
from llm2vec_min.pooling import pool

RESULTS = Path(__file__).parent / "results" / "depth.json"
PAIRS = ROOT / "llm2vec_min" / "assets" / "text" / "similarity.tsv"


@torch.no_grad()
def layer_scores(model: str, causal: bool) -> list[float]:
    """Of what enters each layer (the embeddings first) and of the final states, all read through the final norm, or the last
    would be treated in another way; mean pooling, shipped pairs."""
    l2v = LLM2Vec.from_pretrained(model, causal=causal)
    gold, first, second = read_pairs(PAIRS)
    texts = list(dict.fromkeys(first + second))
    row = {text: i for i, text in enumerate(texts)}
    encoded = l2v.tokenize(texts)
    layers = l2v.decoder.config.num_hidden_layers + 1
    vectors = torch.zeros(layers, len(texts), l2v.decoder.config.hidden_size)
    for rows in sorted_batches([len(e.ids) for e in encoded], 32, 1024):
        batch = l2v.tokenizer.collate([encoded[i] for i in rows], l2v.device)
        *states, last = l2v.decoder(batch.input_ids, batch.padding_mask, causal=causal, all_layers=True)
        for layer, state in enumerate((*map(l2v.decoder.norm, states), last)):
            vectors[layer, rows] = pool(state, batch.pool_mask).cpu()
    scores = []
    for layer in F.normalize(vectors, dim=-1).numpy():
        cosines = np.einsum("nc,nc->n", layer[[row[t] for t in first]], layer[[row[t] for t in second]])
        scores.append(100 * spearman(cosines, gold))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny"])
    args = parser.parse_args()
    measured = {}
    for model in args.models:
        scores = {"causal": layer_scores(model, True), "bidirectional": layer_scores(model, False)}
        print(f"{model}\n{'layer':>5} {'causal':>8} {'both ways':>10}")
        for layer, row in enumerate(zip(*scores.values(), strict=True)):
            print(f"{layer:>5} {row[0]:>8.1f} {row[1]:>10.1f}")
        measured[Path(model).name] = scores
    write_json(RESULTS, measured)


if __name__ == "__main__":
    main()
