"""Draws the README's picture from a measured ladder: the three steps, and below each what it does to the score.

python tests/benchmarks/picture.py           # writes .github/steps-light.svg and steps-dark.svg
"""

import json
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
SETS = ("sts12", "sts13", "sts14", "sts15", "stsb_dev")
THEMES = {
    "light": dict(ink="#1f2328", soft="#59636e", line="#c9d1d9", fill="#e6eaef", bar="#8c959f", accent="#0969da"),
    "dark": dict(ink="#e6edf3", soft="#9198a1", line="#444c56", fill="#2a313a", bar="#6e7681", accent="#4493f8"),
}
WIDTH, HEIGHT, COLUMN, FULL = 880, 408, 220, 150  # FULL: height in pixels of a score of 75
TOP, BASE = 78, 330


def rungs() -> dict[str, float]:
    """Mean Spearman x 100 over the five sets (and the seeds) of each rung."""
    scores = json.loads((RESULTS / "smollm2-135m.json").read_text())["scores"]
    return {rung: mean(mean(row[name] for name in SETS) for row in seeds.values()) for rung, seeds in scores.items() if seeds}


def weighted_control() -> tuple[float, float]:
    """The same of causal + SimCSE, trained and scored with the mean in which later tokens count more, and of LLM2Vec beside it."""
    models = json.loads((RESULTS / "causal-weighted-smollm2-135m.json").read_text())["models"]
    both = ([row for name, row in models.items() if name.startswith(kind)] for kind in ("causal", "LLM2Vec"))
    causal, llm2vec = (mean(row[f"sts:{name}.tsv"]["spearman"]["value"] for row in runs for name in SETS) for runs in both)
    return causal, llm2vec


def text(x, y, content, color, size=14, anchor="middle", weight=400) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{content}</text>"
    )


def grid(x, y, causal: bool, c: dict) -> str:
    """Which of four words (rows) sees which (columns)."""
    cells = []
    for row in range(4):
        for column in range(4):
            color = c["accent"] if column <= row or not causal else c["fill"]
            opacity = 1 if column <= row else 0.65
            cells.append(
                f'<rect x="{x + 16 * column}" y="{y + 16 * row}" width="14" height="14" rx="3" fill="{color}" '
                f'fill-opacity="{opacity if color == c["accent"] else 1}"/>'
            )
    return "".join(cells)


def word(x, y, content, c: dict, hidden=False) -> str:
    style = f'fill="none" stroke="{c["accent"]}" stroke-dasharray="4 3"' if hidden else f'fill="{c["fill"]}"'
    return f'<rect x="{x - 27}" y="{y - 17}" width="54" height="26" rx="6" {style}/>' + text(x, y + 1, content, c["ink"])


def draw(theme: str) -> str:
    c, score = THEMES[theme], rungs()
    middle = [COLUMN * (i + 0.5) for i in range(4)]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>The three steps of LLM2Vec, and what each does to the score of SmolLM2-135M</title>",
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{c["accent"]}"/></marker>'
        f'<marker id="grey" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{c["bar"]}"/></marker></defs>',
    ]
    heads = ("A pretrained LLM", "1. Look both ways", "2. MNTP", "3. SimCSE")
    below = ("a word sees those before it", "drop the mask: all see all", "hide words, learn to name them",
             "twins together, others apart")  # fmt: skip
    for x, head, line in zip(middle, heads, below, strict=True):
        out += [text(x, 26, head, c["ink"], 17, weight=600), text(x, 48, line, c["soft"], 12.5)]
    out += [grid(middle[0] - 31, TOP - 14, True, c), grid(middle[1] - 31, TOP - 14, False, c)]

    x, y = middle[2], TOP + 36
    out += [word(x - 62, y, "the", c), word(x, y, "cat?", c, hidden=True), word(x + 62, y, "sat", c)]
    arrow = f'fill="none" stroke="{c["accent"]}" stroke-width="1.6" marker-end="url(#tip)"'
    out.append(f'<path d="M{x - 62} {y - 22} C{x - 56} {y - 46} {x - 14} {y - 46} {x - 4} {y - 23}" {arrow}/>')
    look = f'fill="none" stroke="{c["bar"]}" stroke-width="1.4" marker-end="url(#grey)"'
    # "the" names the word to its right, and has looked at the one beyond
    out.append(f'<path d="M{x - 62} {y + 14} C{x - 50} {y + 38} {x + 50} {y + 38} {x + 60} {y + 16}" {look}/>')
    out.append(text(x, y + 48, "sees", c["soft"], 11))
    out.append(text(x - 30, y - 45, "says", c["accent"], 11))

    x, y = middle[3], TOP + 20
    for dx, dy, color in ((-56, -6, "accent"), (-38, 10, "accent"), (34, -20, "bar"), (66, 6, "bar"), (26, 32, "bar")):
        out.append(f'<circle cx="{x + dx}" cy="{y + dy}" r="6.5" fill="{c[color]}"/>')
    out.append(
        f'<ellipse cx="{x - 47}" cy="{y + 2}" rx="28" ry="23" fill="none" stroke="{c["accent"]}" stroke-dasharray="4 3"/>'
    )
    for dx, dy in ((34, -20), (66, 6), (26, 32)):
        out.append(f'<path d="M{x - 15} {y + 2} L{x + dx - 11} {y + dy}" stroke="{c["line"]}" stroke-width="1.6"/>')

    bars = {"causal": "as it comes", "bidirectional": "after step 1", "+ MNTP": "after 1 and 2", "LLM2Vec": "LLM2Vec",
            "causal + SimCSE": "step 3 alone"}  # fmt: skip
    places = (*middle[:3], middle[3] - 44, middle[3] + 44)
    out.append(f'<path d="M20 {BASE} H{WIDTH - 20}" stroke="{c["line"]}"/>')
    for x, (name, label) in zip(places, bars.items(), strict=True):
        height = FULL * score[name] / 75
        control = name == "causal + SimCSE"
        color = c["accent"] if name == "LLM2Vec" else c["bar"]
        style = f'fill="none" stroke="{color}"' if control else f'fill="{color}"'
        out.append(f'<rect x="{x - 38:.0f}" y="{BASE - height:.1f}" width="76" height="{height:.1f}" rx="4" {style}/>')
        out.append(text(x, BASE - height - 9, f"{score[name]:.1f}", c["ink"], 17, weight=600))
        out.append(text(x, BASE + 19, label, c["ink"] if name == "LLM2Vec" else c["soft"], 12.5))
    out.append(text(WIDTH / 2, HEIGHT - 31, "Spearman x 100 on five sentence similarity sets, SmolLM2-135M, plain means, "
                    "no label seen in training.", c["soft"], 12.5))  # fmt: skip
    causal, llm2vec = weighted_control()
    out.append(text(WIDTH / 2, HEIGHT - 12, f"Trained with a mean in which later tokens count more, step 3 alone has {causal:.1f} "
                    f"(LLM2Vec on that machine: {llm2vec:.1f}).", c["soft"], 12.5))  # fmt: skip
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    for theme in THEMES:
        path = ROOT / ".github" / f"steps-{theme}.svg"
        path.write_text(draw(theme))
        print(path.relative_to(ROOT))
