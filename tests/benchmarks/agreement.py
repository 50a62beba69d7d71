"""Do the shipped pairs rank encoders as judged pairs do? `tiny` at each step of the ladder, under three kinds of pooling.

LLM2VEC_MIN_STS=folder-of-tsv python tests/benchmarks/agreement.py          # writes results/agreement.json
"""

import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import spearman, sts_score
from llm2vec_min.files import write_json

PRESETS = ("tiny", "tiny-mntp", "tiny-llm2vec", "tiny-supervised", "tiny-causal-simcse", "tiny-bidirectional-simcse")


def main() -> None:
    judged = [p for p in sorted(Path(os.environ["LLM2VEC_MIN_STS"]).glob("*.tsv")) if not p.stem.endswith("_train")]
    pairs = ROOT / "llm2vec_min" / "assets" / "text" / "similarity.tsv"
    encoders = [("tiny", {"causal": True}), *((preset, {}) for preset in PRESETS)]
    scores = {}
    for preset, options in encoders:
        for pooling in ("mean", "weighted_mean", "last"):
            l2v = LLM2Vec.from_pretrained(preset, pooling=pooling, **options)
            name = f"{preset}{', causal' if options else ''}, {pooling}"
            scores[name] = [sts_score(l2v, pairs), float(np.mean([sts_score(l2v, path) for path in judged]))]
            print(f"{name:45} shipped {scores[name][0]:.1f}, judged {scores[name][1]:.1f}", flush=True)
    agreement = spearman(*np.array(list(scores.values())).T)
    print(f"rank correlation over {len(scores)} encoders: {agreement:.2f}")
    results = {"sets": [path.stem for path in judged], "scores": scores, "rank_correlation": agreement}
    write_json(Path(__file__).parent / "results" / "agreement.json", results)


if __name__ == "__main__":
    main()
