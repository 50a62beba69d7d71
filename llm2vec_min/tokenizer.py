"""Text to token ids on `tokenizers` alone, with left padding and the mask of the tokens to pool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

from .device import to_device
from .files import member, read_json, short

MARGIN = 32  # tokens read beyond max_length, so that what a cut does to the tokens beside it touches none that is kept
AT_ONCE = 2**22  # characters tokenized at a time: `tokenizers` keeps a hundred bytes for every token
MAX_TOKENIZER = 64 * 2**20  # bytes; twice the largest vocabulary's


class Encoded(NamedTuple):
    ids: np.ndarray  # (T,) int64, special tokens included
    pooled: np.ndarray  # (T,) bool, True = a token of the text itself


class Batch(NamedTuple):
    input_ids: Tensor  # (B, T) int64, padded on the left
    padding_mask: Tensor | None  # (B, T) bool, True = real token, on the CPU; None when nothing is padded
    pool_mask: Tensor  # (B, T) bool, True = a token of the text itself


class Tokenizer:
    """A checkpoint's `tokenizer.json`, giving the ids of transformers' AutoTokenizer (except, with Llama 2, before a text that begins
    with a space: transformers 5 changed its normalizer there).

    Special tokens are added by that file's own post-processor, as in transformers 5: it says whether a text begins with
    BOS. From `tokenizer_config.json` only the names of the special tokens are taken.

    Raises:
        ValueError: no readable tokenizer.json in the folder.
    """

    def __init__(self, folder: str | Path):
        self.path = member(folder, "tokenizer.json")
        if not self.path.is_file():
            raise ValueError(f"{self.path}: not found; a fast tokenizer is needed (transformers writes one on saving)")
        self.files = {}  # as they are now, for `save`: hours later the folder may be gone
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (path := member(folder, name)).is_file():
                if path.stat().st_size > MAX_TOKENIZER:
                    raise ValueError(f"{path}: is larger than {MAX_TOKENIZER >> 20} MB")
                self.files[name] = path.read_bytes()
        self.backend = self._call(tokenizers.Tokenizer.from_buffer, self.files["tokenizer.json"])

        config_path = member(folder, "tokenizer_config.json")
        config = read_json(config_path) if config_path.is_file() else {}
        bos, eos, pad = (self._token(config, f"{name}_token", config_path) for name in ("bos", "eos", "pad"))
        self._settle()
        # Padding is masked out everywhere, so any id will do where the tokenizer names none.
        self.pad_id = self.backend.token_to_id(pad or eos or bos or "") or 0

    def encode(
        self,
        texts: list[str],
        *,
        max_length: int | None = None,
        instruction: str | list[str] | None = None,
        prefix: str = "",
        suffix: str = "",
    ) -> list[Encoded]:
        """Ids of `prefix + instruction + " " + text + suffix`, and which of them are the text's own.

        A token belongs to the text when its characters overlap it, or the space before it. So neither special tokens nor
        the instruction or the template are pooled, whatever the tokenizer merges at the seams.

        Args:
            max_length: tokens, everything included. The end of the text is cut, never what stands around it.
            instruction: one for all texts or one each; empty or None adds nothing.
            prefix, suffix: a chat template around it all.
        Raises:
            ValueError: what stands around the text alone fills max_length.
        """
        instructions = [instruction] * len(texts) if instruction is None or isinstance(instruction, str) else instruction
        heads = [prefix + (i.strip() + " " if i and i.strip() else "") for i in instructions]
        encoded = []
        for head, text, encoding in self._encodings(heads, texts, suffix, max_length):
            ids = np.array(encoding.ids, dtype=np.int64)
            starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
            inserted = np.array(encoding.special_tokens_mask, dtype=bool)
            # The space that joins instruction and text counts as the text's: most tokenizers merge it into the first word, and
            # the others would begin a lone text with such a token, too.
            begin, stop = len(head) - head.endswith(" "), len(head) + len(text)
            overlaps = (ends > begin) & (starts < stop)
            spaces = (starts == ends) & (begin <= starts) & (starts <= stop)  # byte-level tokenizers trim them off the offsets
            pooled = (overlaps | spaces) & ~inserted
            if not text:  # the joining space alone is no text
                pooled[:] = False
            if max_length is not None and (surplus := len(ids) - max_length) > 0:
                own = np.flatnonzero(pooled)
                if surplus >= len(own):
                    raise ValueError(
                        f"instruction, template and special tokens take {len(ids) - len(own)} tokens, "
                        f"which leaves no room for the text within max_length {max_length}"
                    )
                ids, pooled = (np.delete(x, own[-surplus:]) for x in (ids, pooled))  # the text's last tokens
            if not len(ids):  # an empty text where the tokenizer adds no special token: one token that is not pooled
                ids, pooled = np.array([self.pad_id]), np.array([False])
            encoded.append(Encoded(ids, pooled))
        return encoded

    def collate(self, encoded: list[Encoded], device: torch.device | None = None) -> Batch:
        """Rows of different lengths as one batch, padded on the left to the longest; on a GPU, where any is padded, to a multiple
        of 16: its kernels prefer that, and shapes repeat."""
        lengths = [len(row.ids) for row in encoded]
        T = max(lengths)
        padded = min(lengths) < T
        if padded and device is not None and device.type == "cuda":
            T = -(-T // 16) * 16
        input_ids = np.full((len(encoded), T), self.pad_id, dtype=np.int64)
        padding_mask, pool_mask = (np.zeros((len(encoded), T), dtype=bool) for _ in range(2))
        for b, (row, length) in enumerate(zip(encoded, lengths, strict=True)):
            input_ids[b, T - length :] = row.ids
            padding_mask[b, T - length :] = True
            pool_mask[b, T - length :] = row.pooled
        input_ids, pool_mask = (to_device(torch.from_numpy(x), device) for x in (input_ids, pool_mask))
        return Batch(input_ids, torch.from_numpy(padding_mask) if padded else None, pool_mask)

    def mask_id(self, token: str = "_") -> int:
        """The id that replaces masked tokens; LLM2Vec takes the plain underscore."""
        id = self.backend.token_to_id(token)
        if id is None:
            raise ValueError(
                f"{self.path}: the mask token {token!r} is not in the vocabulary; MNTP needs a tokenizer that has it"
            )
        return id

    def pieces(self, ids) -> list[str]:
        """One readable string per token, for printing."""
        return [self.backend.decode([int(i)], skip_special_tokens=False).strip() or "·" for i in ids]

    def decode(self, ids) -> str:
        """Text of the ids, special tokens shown."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files as they were read, so that a saved model needs nothing else to read text."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    # ---- Around the backend, whose vocabulary, failures and memory have limits ----

    def _encodings(self, heads: list[str], texts: list[str], suffix: str, max_length: int | None) -> Iterator[tuple]:
        """Head, text and encoding of each text; of a very long one only the beginning, which is all that is kept of it."""
        max_chars = None if max_length is None else (max_length + MARGIN) * self._longest
        group, size = [], 0
        for number, (head, text) in enumerate(zip(heads, texts, strict=True), 1):
            group.append((head, text[:max_chars], text))
            size += len(text[:max_chars])
            if size < AT_ONCE and number < len(texts):
                continue
            encodings = self.encode_batch([head + cut + suffix for head, cut, _ in group])
            for (head, cut, text), encoding in zip(group, encodings, strict=True):
                if len(cut) < len(text) and len(encoding.ids) < max_length + MARGIN:  # a tokenizer that leaves characters out
                    cut, encoding = text, self._call(self.backend.encode, head + text + suffix)
                yield head, cut, encoding
            group, size = [], 0

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.backend.get_vocab()), default=1)

    def encode_batch(self, texts: list[str], offsets: bool = True) -> list[tokenizers.Encoding]:
        """The backend's encodings, special tokens included; faster without the offsets of tokens in the text.

        Raises:
            ValueError: the tokenizer fails.
        """
        return self._call(self.backend.encode_batch if offsets else self.backend.encode_batch_fast, texts)

    def _call(self, function, *arguments):
        try:
            return function(*arguments)
        except BaseException as error:  # tokenizers raises plain Exception, and its panics (in Rust) are not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{self.path}: the tokenizer fails ({repr(str(error)[:300])[1:-1]})") from None

    def _settle(self) -> None:
        """Switches off the backend's own padding, truncation and dropout."""
        self.backend.no_padding()
        self.backend.no_truncation()
        if getattr(self.backend.model, "dropout", None):  # the same text, the same ids
            self.backend.model.dropout = None
        self.special_ids = {id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def _token(self, config: dict, name: str, path: Path) -> str | None:
        """A token of tokenizer_config.json (a string, or a dict with its "content") if the vocabulary has it."""
        entry = config.get(name)
        content = entry.get("content") if isinstance(entry, dict) else entry
        if content is not None and not isinstance(content, str):
            raise ValueError(f"{path}: {name} is {short(entry)}, expected a token")
        return content if content and self.backend.token_to_id(content) is not None else None

    def limit_vocabulary(self, vocab_size: int) -> None:
        """Forgets the added tokens that a model has no embedding for (most often a padding token), so that a text that
        contains one is split like any other.

        Args:
            vocab_size: ids that have an embedding.
        Raises:
            ValueError: the vocabulary itself is larger, or the special tokens around every text have no embedding.
        """
        if max(self.backend.get_added_tokens_decoder(), default=0) >= vocab_size:
            raw = json.loads(self.backend.to_str())
            raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < vocab_size]
            self.backend = self._call(tokenizers.Tokenizer.from_str, json.dumps(raw))
            self._settle()
        if self.pad_id >= vocab_size:
            self.pad_id = 0
        largest = max([0, *self.backend.get_vocab().values(), *self._call(self.backend.encode, "").ids])
        if largest >= vocab_size:
            raise ValueError(f"{self.path}: has the token id {largest}, but config.json's vocab_size is {vocab_size}")
