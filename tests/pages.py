"""Parses the pages of the documentation: their blocks, how each block is tested, and the commands in them.

Every fenced ``bash`` or ``python`` block is run, unless a comment on the line before says otherwise:

    <!-- test: slow -->               run by `make test-slow`, with all blocks of the page in their order
    <!-- test: parse, REASON -->      not run; like in every block, everything in it must exist and be valid

A block with a title is a file, which is written before any block of the page is run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- test: (.*?) -->\n")
INLINE = re.compile(r"(?<!`)`((?:tapfl|make|flwr|ray) [^`]+)`(?!`)")
COMMENT = re.compile(r"(^|\s)#[^\n]*")
COMPUTED = re.compile(r"\$\(\(?[^()]*(?:\([^()]*\)[^()]*)*\)?\)")  # $(…) and $((…))
SEPARATORS = set(";&|()\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language, its file name, and how it is tested."""

    page: str
    line: int
    language: str
    title: str
    text: str
    how: str
    why: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page. Raises ValueError for an invalid mark, or a mark without a block after it."""
    text, found, marks = page.read_text(), [], {mark.end(): mark for mark in MARK.finditer(page.read_text())}
    for fence in FENCE.finditer(text):
        mark = marks.pop(fence.start(), None)
        how, _, why = (mark[1] if mark else "run").partition(", ")
        where = f"{name_of(page)}:{text.count(chr(10), 0, fence.start()) + 1}"
        if how not in ("run", "slow", "parse") or (how == "parse") != bool(why):
            raise ValueError(f"{where}: test: {mark and mark[1]}: accepted are slow, and parse with a reason")
        found.append(Block(*where.split(":"), fence[1], fence[2] or "", fence[3], how, why))  # type: ignore[arg-type]
    if marks:
        raise ValueError(f"{name_of(page)}: no block follows {next(iter(marks.values()))[0].strip()}")
    return found


def inline(page: Path) -> Iterator[str]:
    """Yields the commands that a page mentions in its text."""
    for found in INLINE.findall(FENCE.sub("", page.read_text())):
        yield " ".join(found.split())


def commands(text: str) -> list[list[str]]:
    """Returns the simple commands of shell text, as words, without comments and separators; `$(…)` becomes $X.

    A pipe has spaces around it; a|b is how usage names alternatives.
    """
    text = COMPUTED.sub("$X", COMMENT.sub(r"\1", text.replace("\\\n", " ")))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&()<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= SEPARATORS:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]
