"""How far the mask matters, layer by layer and place by place: 1 - cosine of a token's causal and bidirectional states.

python tests/benchmarks/directions.py --models base=$(python tests/build_smollm2.py) mntp=runs/mntp simcse=runs/simcse

writes results/directions-smollm2-135m.json: name -> layer (0 = embeddings) -> fifth of the text, over held-out lines of the
shipped text. Notebook 8 draws it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from llm2vec_min import LLM2Vec
from llm2vec_min.data import read_split
from llm2vec_min.evaluation.analysis import direction_cosines
from llm2vec_min.files import write_json

RESULTS = Path(__file__).parent / "results" / "directions-smollm2-135m.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=MODEL")
    args = parser.parse_args()
    _, lines = read_split([str(ROOT / "llm2vec_min" / "assets" / "text" / "train.txt")], every=20)
    texts = [line for line in lines if 8 <= len(line.split()) <= 30][:64]
    measured = {}
    for name, model in (pair.split("=", 1) for pair in args.models):
        cosines = direction_cosines(LLM2Vec.from_pretrained(model), texts)
        measured[name] = (1 - cosines).round(4).tolist()
        print(name, "after the last layer, first fifth to last:", measured[name][-1], flush=True)
    write_json(RESULTS, measured)


if __name__ == "__main__":
    main()
