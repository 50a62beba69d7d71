"""What the notebooks share: one palette, sharp figures, source code in view, and statements that are checked as they are made."""

import inspect
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TEXT = ROOT / "llm2vec_min" / "assets" / "text"
COLORS = {
    "causal": "#8a94a6", "bidirectional": "#63b3ed", "+ MNTP": "#3182ce", "LLM2Vec": "#1a4480", "causal + SimCSE": "#dd6b20",
    "bidirectional + SimCSE": "#d69e2e", "+ supervised": "#2f855a",
}  # fmt: skip
RUNGS = tuple(COLORS)


def setup(seed: int = 0, figures: str = "svg") -> None:
    """The same randomness and the same look everywhere; `figures` "svg", or "retina" (PNG) where an SVG would be large."""
    torch.manual_seed(seed)
    set_matplotlib_formats(figures)
    plt.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11,
        "figure.dpi": 80, "figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 10, "image.cmap": "viridis",
        "legend.frameon": False, "font.sans-serif": ["DejaVu Sans", "sans-serif"], "svg.fonttype": "none", "svg.hashsalt": "llm2vec-min",
    })  # fmt: skip


def claim(sentence: str, holds: bool) -> str:
    """A statement about what was just measured: stops the notebook if it is not true, else prints it with a tick.

    Returns it, so that the title of a figure can be one: `ax.set_title(claim("MNTP helps", after > before))`.
    """
    if not holds:
        raise AssertionError(f"not true: {sentence}")
    print("✓", sentence)
    return sentence


def source(function: object, doc: bool = False) -> Markdown:
    """The package's own code, shown in the notebook; without its docstring unless asked for."""
    code = inspect.getsource(function)
    if not doc and function.__doc__:
        start = code.index('"""')
        code = code[:start].rstrip() + "\n" + code[code.index('"""', start + 3) + 3 :].lstrip("\n")
    return Markdown(f"```python\n{code.rstrip()}\n```")


def results(name: str) -> dict:
    """What was measured outside the notebooks: a file of `tests/benchmarks/results`."""
    return json.loads((ROOT / "tests" / "benchmarks" / "results" / f"{name}.json").read_text())
