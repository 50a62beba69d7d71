"""Is an encoder silently wrong? One line a check: passed, FAILED with the figure, or not seen from outside.

    python -m llm2vec_min.evaluation.doctor --model runs/simcse
    python -m llm2vec_min.evaluation.doctor --model exported --with sentence-transformers
    python -m llm2vec_min.evaluation.doctor --model exported --url http://127.0.0.1:7997/v1/embeddings

Every check sees an encoder from outside, as texts in and vectors out, and holds it against vectors that are computed here in
the plainest way: one text at a time, without padding, pooled in float64, with the folder's own settings and, to give a
mistake its name, with each of the usual wrong ones. The exit code is 1 when a check fails.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..cli import add_model_flags, run
from ..encoder import LLM2VEC_CONFIG, LLM2Vec
from ..files import read_json
from ..hub import resolve

TEXTS = [
    "A cat sat down.",
    "The committee will publish its report on the flood next week.",
    "Rain",
    "She bought three apples and a loaf of bread at the market before the shops closed.",
    "Where can I renew my passport?",
    "Zoë paid 1,250 € for three crêpes 🥞 in Kraków.",
    "Two engineers explained, slowly and with many drawings, why the old bridge over the river had begun to move.",
]
LONG = " ".join(TEXTS * 3)
INSTRUCTION = "Retrieve texts that mean the same:"
MOST_TOKENS = 2048  # the longest text that is tried
Encode = Callable[..., np.ndarray]  # (texts, instruction=None) -> (N, C), all texts in one batch or request

MARK = "\x1f"  # with which an export ends its prompts


class Check(NamedTuple):
    name: str
    passed: bool | None  # None: could not be seen
    detail: str


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance of two (N, C) arrays' rows once scaled to length 1, in [0, 2]; nan where one is not a number."""
    if a.shape != b.shape:  # of a pooling whose vectors have another length
        return float("inf")
    a, b = (x / np.maximum(np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), 1e-12) for x in (a, b))
    return float(np.linalg.norm(a - b, axis=-1).max())


@torch.no_grad()
def plain_vectors(l2v: LLM2Vec, instruction: str = "") -> dict[tuple[bool, str, str], np.ndarray]:
    """(causal, tokens, pooling) -> (N, C) float64 vectors of TEXTS, for both directions, all poolings, and pooled over the
    text's "own" tokens, with the "instruction" too, or over "all".

    Raises:
        ValueError: the instruction leaves no room for a text within max_length; a pooling without a plain formula here.
    """
    prefix, suffix = l2v.template
    head = prefix + (instruction + " " if instruction else "")
    vectors: dict[tuple[bool, str, str], list[np.ndarray]] = {}
    for text in TEXTS:
        encoding = l2v.tokenizer.backend.encode(head + text + suffix)
        begins, ends = np.array(encoding.offsets).T
        inserted = np.array(encoding.special_tokens_mask, dtype=bool)
        seam, stop = len(head) - head.endswith(" "), len(head) + len(text)  # the space that joins both is the text's
        own = ~inserted & ((ends > seam) | (begins >= seam)) & (begins < stop)
        told = ~inserted & (begins >= len(prefix) - prefix.endswith(" ")) & (begins < stop)
        kept, surplus = np.ones_like(own), max(0, len(own) - l2v.max_length)
        if surplus >= own.sum():
            raise ValueError(f"max_length {l2v.max_length} leaves no room for a text")
        kept[np.flatnonzero(own)[own.sum() - surplus :]] = False  # a long text loses its end, never what stands around it
        ids = torch.tensor([encoding.ids], device=l2v.device)[:, torch.from_numpy(kept)]
        for causal in (False, True):
            hidden = l2v.decoder(ids, causal=causal)[0].double().cpu().numpy()
            for tokens, mask in (("own", own), ("instruction", told), ("all", np.ones_like(own))):
                rows = hidden[mask[kept]]
                n = np.arange(1, len(rows) + 1)
                pooled = dict(
                    mean=rows.mean(0), weighted_mean=n @ rows / n.sum(), last=rows[-1], first=rows[0], max=rows.max(0)
                )
                for mode, vector in pooled.items():
                    vectors.setdefault((causal, tokens, mode), []).append(vector)
    if (l2v.causal, "own", l2v.pooling) not in vectors:
        raise ValueError(f"there is no plain {l2v.pooling} pooling to compare with; it belongs in plain_vectors")
    return {key: np.stack(rows) for key, rows in vectors.items()}


def check_stable(encode: Encode, together: np.ndarray, tolerance: float) -> list[Check]:
    """The vector of a text depends on nothing but the text."""
    alone = np.concatenate([encode([text]) for text in TEXTS])
    beside = np.concatenate([encode([text, LONG])[:1] for text in TEXTS])
    checks = []
    for name, other, how in (
        ("repeatable", encode(TEXTS), "the same texts once more"),
        ("batch size", alone, "each text alone"),
        ("order", encode(TEXTS[::-1])[::-1], "in the reverse order"),
        ("padding", beside, "each beside a long text"),
    ):
        # what padding adds is measured against the text alone, so that a fault of batches is not reported twice
        distance = apart(other, alone if name == "padding" else together)
        checks.append(Check(name, distance <= tolerance, f"{how}: {distance:.1e} away"))
    return checks


def check_vectors(encode: Encode, together: np.ndarray, l2v: LLM2Vec, tolerance: float, instruction: str | None) -> list[Check]:
    """Direction, pooled tokens and pooling: which plain vectors these are; then whether they are those they should be."""
    names = {False: "bidirectional", True: "causal"}
    plain, right = plain_vectors(l2v), (l2v.causal, "own", l2v.pooling)
    distances = {key: apart(together, rows) for key, rows in plain.items() if key[1] != "instruction"}
    nearest = right if distances[right] <= tolerance else min([right, *distances], key=distances.__getitem__)
    known = distances[nearest] <= max(tolerance, distances[right] / 5)
    inserts = apart(plain[l2v.causal, "own", "mean"], plain[l2v.causal, "all", "mean"]) > 0
    figure = f"{distances[nearest]:.1e} from them, {distances[right]:.1e} from what is meant"
    checks = []
    for name, i, show in (
        ("direction", 0, lambda x: f"{names[x]} attention"),
        ("special tokens", 1, lambda x: "the text's own tokens" if x == "own" else "BOS or template, pooled like text"),
        ("pooling", 2, lambda x: f"{x} pooling"),
    ):
        if not known:
            checks.append(Check(name, None, "the vectors are those of no direction and pooling known here"))
        elif name == "special tokens" and not inserts:
            checks.append(Check(name, True, "the tokenizer adds none"))
        elif nearest[i] == right[i]:
            checks.append(Check(name, True, show(right[i])))
        else:
            checks.append(Check(name, False, f"these are vectors of {show(nearest[i])}, meant is {show(right[i])} ({figure})"))
    checks.append(Check("agreement", distances[right] <= tolerance, f"with the plain computation: {distances[right]:.1e} away"))

    if instruction is None:
        return [*checks, Check("instruction", None, "no instruction can be given")]
    try:
        plain = plain_vectors(l2v, instruction)
    except ValueError as error:
        return [*checks, Check("instruction", None, str(error))]
    told = encode(TEXTS, instruction)
    distance, pooled, none = (
        apart(told, rows) for rows in (plain[right], plain[l2v.causal, "instruction", l2v.pooling], together)
    )
    detail = f"seen and not pooled, {distance:.1e} away"
    if distance > tolerance:
        wrong = {"it is pooled like text": pooled, "it changes nothing": none, "other vectors than the plain ones": distance}
        reason = min(wrong, key=lambda name: wrong[name] + (name.startswith("other") and 1e-9))
        detail = f"{reason}: {wrong[reason]:.1e} from that, {distance:.1e} from what is meant"
    return [*checks, Check("instruction", distance <= tolerance, detail)]


def check_length(encode: Encode, l2v: LLM2Vec) -> Check:
    """The last word of a text of max_length tokens still counts."""
    most, (prefix, suffix) = min(l2v.max_length, MOST_TOKENS), l2v.template

    def texts(n: int) -> list[str]:
        return [" ".join([*["the"] * n, last]) for last in ("sun", "dog")]

    def tokens(n: int) -> int:
        return max(len(row.ids) for row in l2v.tokenizer.encode(texts(n), prefix=prefix, suffix=suffix))

    def seen(n: int, encode: Encode = encode) -> bool:
        """The last word moves the vector by more than encoding the same text twice does."""
        one, other, again = (encode([text]) for text in (*texts(n), texts(n)[0]))
        return apart(one, other) > max(1e-6, 3 * apart(one, again))

    def last(holds: Callable[[int], bool], low: int, high: int) -> int:
        """The largest number for which it holds: at `low` it does, at `high` it does not."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    n = last(lambda n: tokens(n) <= most, 0, most + 1)
    if not seen(n, l2v.encode):
        return Check("length", None, f"with {l2v.pooling} pooling the last word does not show")
    if seen(n):
        return Check("length", True, f"read to token {tokens(n)}; settings cut at {l2v.max_length}, without a warning")
    cut = tokens(last(seen, 0, n))
    return Check("length", False, f"texts are cut after about {cut} tokens, the settings say {l2v.max_length}")


def check_files(folder: Path) -> list[Check]:
    """An export's config.json tells transformers the direction that it was trained with."""
    settings = read_json(folder / LLM2VEC_CONFIG) if (folder / LLM2VEC_CONFIG).is_file() else {}
    if "exported_from" not in settings:
        return []
    found, meant = read_json(folder / "config.json").get("is_causal", True), settings.get("causal", False)
    detail = f"is_causal in config.json is {found}" + (f", meant is {meant}" if found != meant else "")
    return [Check("files", found == meant, detail)]


def examine(encode: Encode, l2v: LLM2Vec, *, tolerance: float = 1e-4, instruction: str | None = INSTRUCTION) -> list[Check]:
    """All checks of an encoder.

    Args:
        encode: (texts, instruction=None) -> (N, C) array, all texts in one batch.
        l2v: the encoder that it should equal: weights, tokenizer, direction, pooling, max_length.
        tolerance: distance of two vectors of length 1 that is rounding only; bfloat16 needs about 0.05.
        instruction: to try; None where `encode` takes none.
    """
    together, expected = encode(TEXTS), (len(TEXTS), l2v.width)
    if together.shape != expected:
        return [Check("numbers", False, f"vectors of shape {together.shape}, expected {expected}")]
    lengths = np.linalg.norm(together, axis=-1)
    if not (lengths > 0).all() or not np.isfinite(lengths).all():
        return [Check("numbers", False, f"lengths from {lengths.min():g} to {lengths.max():g}, expected finite ones above 0")]
    return [
        Check("numbers", True, f"finite, lengths from {lengths.min():.3g} to {lengths.max():.3g}"),
        *check_stable(encode, together, tolerance),
        *check_vectors(encode, together, l2v, tolerance, instruction),
        check_length(encode, l2v),
    ]


# ---- Encoders seen from outside ----


def through_sentence_transformers(folder: Path, l2v: LLM2Vec) -> tuple[Encode, str | None]:
    """An export opened by that library, in `l2v`'s dtype, and an instruction that the export knows (None if it has none)."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError("--with sentence-transformers: it is not installed: pip install sentence-transformers") from None
    if not (folder / "modules.json").is_file():
        raise ValueError(f"--with sentence-transformers: {folder} is no export, make one: python -m llm2vec_min.interop.export")
    options = {"use_safetensors": True, "torch_dtype": l2v.decoder.norm.weight.dtype}
    model = SentenceTransformer(str(folder), device=str(l2v.device), local_files_only=True, model_kwargs=options)
    prompts = [prompt for prompt in model.prompts.values() if prompt.strip(MARK)]

    def encode(texts: list[str], instruction: str | None = None) -> np.ndarray:
        given = {"prompt": prompts[0]} if instruction else {}
        return model.encode(texts, batch_size=len(texts), **given)

    return encode, prompts[0].strip(MARK) if prompts else None


def over_http(url: str, model: str) -> Encode:
    """A server that speaks OpenAI's embedding protocol; asks it for `model` if it lists that or nothing, else for its first.

    Raises:
        ValueError: no such address, no answer, or another answer than embeddings.
    """

    def ask(address: str, body: dict | None = None) -> dict:
        data = json.dumps(body).encode() if body else None
        try:
            request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            raise ValueError(f"--url {address}: no usable answer ({error})") from None

    if not url.startswith(("http://", "https://")) or not url.endswith("/embeddings"):
        raise ValueError(f"--url {url}: expected http://HOST:PORT/.../embeddings")
    try:
        listed = [entry["id"] for entry in ask(url.removesuffix("embeddings") + "models")["data"]]
        model = model if model in listed else listed[0]
    except (ValueError, KeyError, IndexError, TypeError):
        pass  # a server may list none

    sizes: set[tuple] = set()

    def encode(texts: list[str], instruction: str | None = None) -> np.ndarray:
        answer = ask(url, {"model": model, "input": texts})
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"--url {url}: expected data: [{{index, embedding}}, ...], found {str(answer)[:60]}") from None
        if len(vectors) != len(texts):
            raise ValueError(f"--url {url}: found {len(vectors)} vectors for {len(texts)} texts")
        sizes.add(vectors.shape[1:])
        if len(sizes) > 1:
            raise ValueError(f"--url {url}: found vectors of another size than before: {sorted(sizes)}")
        return vectors

    return encode


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llm2vec_min.evaluation.doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_model_flags(parser)
    parser.add_argument("--with", dest="library", choices=["sentence-transformers"], help="open the folder with this library")
    parser.add_argument("--url", help="a server of this folder with OpenAI's protocol, http://127.0.0.1:PORT/v1/embeddings")
    parser.add_argument("--tolerance", type=float, help="distance of unit vectors that is rounding [1e-4; bfloat16 0.05]")
    args = parser.parse_args(argv)
    if args.library and args.url:
        raise ValueError("--with and --url look at two encoders, give one of them")
    if args.tolerance is not None and not 0 <= args.tolerance < 2:  # no two vectors of length 1 are farther apart
        raise ValueError(f"--tolerance is {args.tolerance}, expected a distance in [0, 2)")
    l2v = LLM2Vec.from_pretrained(args.model, adapters=args.adapter, dtype=args.dtype, device=args.device)
    folder, instruction = resolve(args.model), INSTRUCTION

    def encode(texts: list[str], instruction: str | None = None) -> np.ndarray:
        return l2v.encode(texts, instruction, batch_size=len(texts))

    if args.library:
        encode, instruction = through_sentence_transformers(folder, l2v)
    elif args.url:
        encode, instruction = over_http(args.url, args.model), None
    half = l2v.decoder.norm.weight.dtype != torch.float32
    tolerance = (0.05 if half else 1e-4) if args.tolerance is None else args.tolerance
    checks = [*check_files(folder), *examine(encode, l2v, tolerance=tolerance, instruction=instruction)]
    for check in checks:
        verdict = {True: "passed", False: "FAILED", None: "not seen"}[check.passed]
        print(f"{verdict:<9} {check.name:<15} {check.detail}")
    if any(check.passed is False for check in checks):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
