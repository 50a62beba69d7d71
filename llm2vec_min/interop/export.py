"""A trained encoder as one folder of merged weights that transformers and sentence-transformers load, with equal vectors.

python -m llm2vec_min.interop.export --model runs/simcse --output exported --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers

from ..cli import add_model_flags, run
from ..encoder import LLM2Vec
from ..files import new_folder, read_json, write_json

# sentence-transformers pools all tokens but those of a prompt. So instructions end with this marker, and where the
# tokenizer begins texts with BOS, every other text gets the marker alone as its prompt. The exported tokenizer drops it at
# either end of a string and reads it as a space elsewhere: a prompt by itself is BOS and the instruction, in front of a text
# it is followed by a space, and what is left to pool is what `LLM2Vec.encode` pools.
MARKER = "\x1f"
PROBES = ("a", "The cat", " two", "1984", "🙂", "_", "\n")
PLAIN = "plain"  # name of the prompt of a text without an instruction
POOLING_NAMES = {"mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken", "first": "cls_token",
                 "weighted_mean": "weightedmean_tokens"}  # fmt: skip
MAPPED = {"causal", "pooling_mode", "max_length", "template"}  # of `LLM2Vec.settings()`: what this file writes in others' terms


def export_model(
    l2v: LLM2Vec,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    prompts: dict[str, str] | None = None,
    normalize: bool = False,
    sentence_transformers: bool = True,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    scores: dict[str, float] | None = None,
) -> None:
    """Writes the folder, beside its place first, so that no half-written one is ever left.

    Args:
        dtype: of the stored weights; default: as they are.
        prompts: instructions by name, such as {"query": "Retrieve similar texts:"}, for `encode(..., prompt_name="query")`.
        normalize: sentence-transformers returns vectors of length 1.
        sentence_transformers: also write what that library needs; False for this project and transformers alone.
        scores: numbers for the model card, by data set.
    Raises:
        ValueError: the folder exists, or sentence-transformers could not give the same vectors, and why.
    """
    if unknown := l2v.settings().keys() - MAPPED:
        raise ValueError(f"no one else would know of {min(unknown)}: transformers would give other vectors")
    if not sentence_transformers and (prompts or normalize):
        raise ValueError(
            "prompts and --normalize are sentence-transformers' to apply, which --no-sentence-transformers leaves out"
        )
    if PLAIN in (prompts or {}):
        raise ValueError(f"the prompt name {PLAIN!r} stands for a text without an instruction, take another")
    # query and document, or sentence-transformers makes up empty ones without the marker
    prompts = {PLAIN: "", "query": "", "document": "", **(prompts or {})}
    for prompt in prompts.values():
        l2v.tokenize(["a"], prompt)  # refuses one that leaves no room for a text
    if sentence_transformers:
        _refuse_unequal(l2v, prompts)
    output = Path(output).expanduser()
    l2v.check_place(output, overwrite)
    with new_folder(output) as folder:
        l2v.write_merged(folder, dtype, max_shard_bytes)
        _write_tokenizer(l2v, folder)
        if sentence_transformers:
            _write_sentence_transformers(l2v, folder, prompts, normalize)
        (folder / "README.md").write_text(
            model_card(l2v, prompts, normalize, scores or {}, sentence_transformers), encoding="utf-8"
        )


def _refuse_unequal(l2v: LLM2Vec, prompts: dict[str, str]) -> None:
    """ValueError where sentence-transformers cannot pool the tokens that `LLM2Vec.encode` pools."""

    def refuse(reason: str) -> None:
        raise ValueError(
            f"sentence-transformers would give other vectors: {reason}; "
            "--no-sentence-transformers exports for this project and transformers alone"
        )

    if l2v.pooling not in POOLING_NAMES:
        refuse(f"it has no {l2v.pooling} pooling")
    if any(l2v.template):
        refuse(f"it pools the chat template {l2v.template!r}")
    if not l2v.tokenizer.encode(["a"])[0].pooled[-1]:
        refuse("the tokenizer ends every text with a special token, which it pools")
    if l2v.pooling == "weighted_mean" and (_begins_with_bos(l2v) or any(prompts.values())):
        refuse("its weighted mean counts positions from the beginning, BOS and instruction included")
    if _with_marker(l2v) is None and (_begins_with_bos(l2v) or any(prompts.values())):
        refuse("its prompts cannot be told from the text with this tokenizer")
    for prompt in filter(None, prompts.values()):
        alone = l2v.tokenizer.encode([prompt.strip()])[0].ids
        for text in PROBES:
            (row,) = l2v.tokenizer.encode([text], instruction=prompt)
            if len(row.ids) - row.pooled.sum() != len(alone) or list(row.ids[: len(alone)]) != list(alone):
                refuse(f"the tokenizer reads the instruction {prompt!r} otherwise before a text than alone")


def _begins_with_bos(l2v: LLM2Vec) -> bool:
    return not l2v.tokenizer.encode(["a"])[0].pooled[0]


def _with_marker(l2v: LLM2Vec) -> Tokenizer | None:
    """The tokenizer that reads "marker + text" as the text; None if it cannot be had.

    The marker at the beginning becomes nothing. Where the tokenizer puts a space before a text, unless there is one, but
    only at the very first character (Metaspace), it becomes that space.
    """
    for metaspace in ([], [(f"\\A{MARKER}(?! )", " ")]):
        tokenizer = Tokenizer.from_str(l2v.tokenizer.backend.to_str())
        rules = [(f"{MARKER}\\z", ""), *metaspace, (f"\\A{MARKER}", ""), (MARKER, " ")]
        steps = [normalizers.Replace(Regex(pattern), content) for pattern, content in rules]
        tokenizer.normalizer = normalizers.Sequence([*steps, *filter(None, [tokenizer.normalizer])])
        if all(tokenizer.encode(MARKER + text).ids == l2v.tokenizer.backend.encode(text).ids for text in PROBES):
            return tokenizer
    return None


def _write_tokenizer(l2v: LLM2Vec, folder: Path) -> None:
    (_with_marker(l2v) or l2v.tokenizer.backend).save(str(folder / "tokenizer.json"))
    before = json.loads(l2v.tokenizer.files.get("tokenizer_config.json", "{}"))
    write_json(
        folder / "tokenizer_config.json",
        {
            # not LlamaTokenizer: transformers 5 would rebuild that from the vocabulary, and drop the marker
            "tokenizer_class": "PreTrainedTokenizerFast",
            # no bos_token: tokenizer.json inserts BOS all the same, and sentence-transformers takes a named special
            # token at the end of a prompt for one that the tokenizer appends, so that a prompt of BOS alone would be none
            "eos_token": before.get("eos_token"),
            "pad_token": l2v.tokenizer.backend.id_to_token(l2v.tokenizer.pad_id),
            # from a row's beginning, padding included, sentence-transformers 5.2 leaves out a prompt's tokens, and every
            # version before 6 counts the positions of its weighted mean
            "padding_side": "right",
            "model_max_length": l2v.max_length,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def _write_sentence_transformers(l2v: LLM2Vec, folder: Path, prompts: dict[str, str], normalize: bool) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed, indent=2) + "\n")
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": l2v.max_length, "do_lower_case": False})
    pooling = {"word_embedding_dimension": l2v.width, "include_prompt": False}
    pooling |= {f"pooling_mode_{theirs}": ours == l2v.pooling for ours, theirs in POOLING_NAMES.items()}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {
                name: prompt.strip() + MARKER if prompt or _begins_with_bos(l2v) else "" for name, prompt in prompts.items()
            },
            "default_prompt_name": PLAIN if _begins_with_bos(l2v) else None,
            "similarity_fn_name": "cosine",
        },
    )


def model_card(
    l2v: LLM2Vec, prompts: dict[str, str], normalize: bool, scores: dict[str, float], sentence_transformers: bool
) -> str:
    """README.md of the exported folder: base model, recipe, how to load it."""
    stages = []
    for adapter in l2v.adapters:
        path = adapter / "train_args.json"
        if path.is_file():
            arguments = read_json(path)
            keys = ("stage", "steps", "batch_size", "max_length", "lr", "seed")
            stages.append(", ".join(f"{key} {arguments[key]}" for key in keys if key in arguments))
        else:
            stages.append(adapter.name)
    library = "sentence-transformers" if sentence_transformers else "transformers"
    task = "sentence-similarity" if sentence_transformers else "feature-extraction"
    header = ["---", f"library_name: {library}", f"pipeline_tag: {task}"]
    if sentence_transformers:
        imported = "from sentence_transformers import SentenceTransformer  # and transformers >= 5.2"
        opened = 'SentenceTransformer("this folder")'
    else:
        imported, opened = "from llm2vec_min import LLM2Vec", 'LLM2Vec.from_pretrained("this folder")'
    if "/" in l2v.base_model and not Path(l2v.base_model).exists():
        header.append(f"base_model: {l2v.base_model.partition('@')[0]}")
    lines = [
        *header,
        f"tags: [llm2vec, {library}, feature-extraction]",
        "---",
        "",
        f"# Text encoder made from {Path(l2v.base_model).name} with LLM2Vec",
        "",
        f"- Base model: {l2v.base_model}, all adapters merged",
        f"- Attention: {'causal' if l2v.causal else 'bidirectional'}; pooling: {l2v.pooling}, over the text's own tokens; "
        f"at most {l2v.max_length} tokens{'; vectors of length 1' if normalize else ''}",
        *[f"- Adapter {i}: {stage}" for i, stage in enumerate(stages, 1)],
        *[f"- Instruction `{name}`: {' '.join(prompt.split())}" for name, prompt in prompts.items() if prompt],
        *[f"- {name}: {value:.2f}" for name, value in scores.items()],
        "",
        "```python",
        imported,
        "",
        f'vectors = {opened}.encode(["a text", "another"])',
        "```",
        "",
        *_warnings(l2v, sentence_transformers),
        "Method: LLM2Vec (arXiv 2404.05961). Made with llm2vec-min.",
        "",
    ]
    return "\n".join(lines)


def _warnings(l2v: LLM2Vec, sentence_transformers: bool) -> list[str]:
    """Where the folder gives other vectors without a word, for its card."""
    named = (
        "**Only the instructions named here** are left out of the mean: sentence-transformers pools another `prompt=` along with "
        "the text."
    )
    direction = (
        "**Do not use it with transformers before 5.2**: they ignore `is_causal` in `config.json`, so attention is causal."
    )
    servers = (
        "**Behind a server**, ask the doctor first: one that does not call `encode` of sentence-transformers (infinity 0.0.78) "
        "knows no prompts and pools the token that begins every text."
    )
    left_out = (
        "**Not made for sentence-transformers**: its files are left out, and without them it may pool other tokens (BOS, a template). "
        "transformers gives the same token states."
    )
    wrong = [direction] * (not l2v.causal)
    if sentence_transformers:
        wrong += [named]
        wrong += [servers] * (_begins_with_bos(l2v) and l2v.pooling != "last")
    else:
        wrong.append(left_out)
    return [line for text in wrong for line in (text, "")]


def read_spearman(metrics: Path) -> list[float]:
    """A run's scores on its --eval pairs, in the order of its steps; lines that hold none, or are damaged, are passed over."""
    scores = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []:
        try:
            score = float(json.loads(line)["spearman"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        scores += [score] if math.isfinite(score) else []
    return scores


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llm2vec_min.interop.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_model_flags(parser, device="cpu")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--prompt", nargs="+", action="extend", default=[], metavar="NAME=INSTRUCTION", help='such as query="Retrieve texts:"'
    )
    parser.add_argument("--normalize", action="store_true", help="sentence-transformers returns vectors of length 1")
    parser.add_argument("--sentence-transformers", action=argparse.BooleanOptionalAction, default=True,
                        help="write what that library needs [on]")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    if wrong := [p for p in args.prompt if "=" not in p]:
        raise ValueError(f"--prompt {wrong[0]!r}: expected NAME=INSTRUCTION")
    names = [p.partition("=")[0] for p in args.prompt]
    if wrong := [name for name in names if not name.strip() or names.count(name) > 1]:
        raise ValueError(
            f"--prompt: the name {wrong[0]!r} is empty or there twice, expected one of its own for each instruction"
        )
    if not (args.prompt or args.normalize) and (Path(args.model).expanduser() / "modules.json").is_file():
        print(
            "the --model has a modules.json: prompts and normalization of its own, if any, are not taken over; give them again"
        )
    l2v = LLM2Vec.from_pretrained(args.model, adapters=args.adapter, device=args.device or "cpu", dtype=args.dtype)
    spearman = (
        [] if args.adapter else read_spearman(Path(args.model).expanduser() / "metrics.jsonl")
    )  # a run's own, for the card
    export_model(
        l2v,
        args.output,
        dtype=args.dtype,
        prompts=dict(p.split("=", 1) for p in args.prompt),
        normalize=args.normalize,
        sentence_transformers=args.sentence_transformers,
        overwrite=args.overwrite,
        scores={"Spearman x 100 on the run's --eval pairs": spearman[-1]} if spearman else None,
    )
    print(f"exported to {args.output}")


if __name__ == "__main__":
    run(main)
