"""Builds the triplets that ship, llm2vec_min/assets/text/triplets.jsonl.gz, from WordNet 3.0 (Debian package wordnet-base).

Query and positive are the definitions of two related senses, such as a verb and the noun made from it, that share words;
the hard negative is the definition of a sister of the positive's sense, under the same hypernym or around the same adjective.

    apt-get install wordnet-base && python tests/build_triplets.py
"""

import gzip
import json
import random
import re
from collections import defaultdict
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
OUTPUT = Path(__file__).parent.parent / "llm2vec_min" / "assets" / "text" / "triplets.jsonl.gz"
RELATED = {"+": "derived from", "&": "similar to", "\\": "adverb or noun of", "$": "same verb group", "^": "see also"}
EMPTY = set(
    "the a an of or and to in for with by on at from as is are be been that which who whom someone something somebody one it its "
    "his her their not no having being used usually especially such other than some any act state quality person cause make into "
    "out up more can".split()
)
RUDE = re.compile(
    r"obscen|vulgar|offensive|slang|disparag|slur|sex|genital|copulat|prostitut|buttocks|feces|excrement|ethnic", re.I
)


def read_senses() -> dict:
    """(part of speech, offset) -> (pointers, first definition), of the senses whose definition is 4 to 22 plain words."""
    senses = {}
    for path in sorted(WORDNET.glob("data.*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            rest = fields[5 + 2 * int(fields[3], 16) :]  # after the words and the number of pointers
            pointers = [
                (symbol, (kind.replace("s", "a"), offset)) for symbol, offset, kind in zip(*(rest[i::4] for i in range(3)))
            ]
            definition = re.sub(r"^\([^)]*\)\s*", "", re.split(r'[;"]', gloss)[0].strip())
            if RUDE.search(line) or definition.count("(") != definition.count(")") or not 4 <= len(definition.split()) <= 22:
                definition = ""
            senses[fields[2].replace("s", "a"), fields[0]] = pointers, definition.strip(" ,:")
    return senses


def stems(definition: str) -> set[str]:
    return {word[:5] for word in re.findall(r"[a-z]{3,}", definition.lower()) if word not in EMPTY}


def build() -> list[dict]:
    senses, random_ = read_senses(), random.Random(0)
    definition = {sense: text for sense, (_, text) in senses.items()}
    below = defaultdict(list)
    for sense, (pointers, _) in senses.items():
        for symbol, other in pointers:
            if symbol in "@&":  # a hypernym; the adjective that a satellite is similar to
                below[other].append(sense)
    triplets, seen = [], set()
    for sense, (pointers, query) in senses.items():
        for other in [other for symbol, other in pointers if symbol in RELATED]:
            positive = definition.get(other, "")
            shared = stems(query) & stems(positive)
            if not query or not positive or len(shared) < 2 or stems(query) == stems(positive):
                continue
            parents = [parent for symbol, parent in senses[other][0] if symbol in "@&"]
            sisters = {definition[sister] for parent in parents for sister in below[parent] if sister not in (sense, other)}
            sisters = [text for text in sorted(sisters) if text and stems(text) not in (stems(query), stems(positive))]
            if sisters and not {query, positive} & seen:
                seen |= {query, positive}
                triplets.append({"query": query, "positive": positive, "negative": random_.choice(sisters)})
    random_.shuffle(triplets)
    return triplets


if __name__ == "__main__":
    rows = build()
    with open(OUTPUT, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    print(f"{OUTPUT}: {len(rows)} triplets, {OUTPUT.stat().st_size} bytes")
