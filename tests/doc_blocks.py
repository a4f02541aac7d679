"""The code blocks of a Markdown page: where they are, and what the page says about running them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_MARK = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->", re.DOTALL)
_SETUP = re.compile(r"<!--\s*setup:\s*(.*?)\s*-->", re.DOTALL)
_FILE = re.compile(r"# ([\w.-]+\.(?:yaml|json|py))\n")
_INLINE = re.compile(r"batchinfer [a-z]")


class Block(NamedTuple):
    """One fenced block, or one hidden set-up whose language is ``setup``.

    ``line`` is the line of the page on which its text begins, from 1; ``reason`` says why it is not
    run, and is None where it is; ``file`` is the name under which the page's folder gets it.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None = None

    @property
    def place(self) -> str:
        return _place(self.page, self.line)

    @property
    def file(self) -> str | None:
        named = _FILE.match(self.text)
        return named[1] if named else None

    @property
    def padded(self) -> str:
        """The text after as many empty lines as are before it, so that errors name the page's line."""
        return "\n" * (self.line - 1) + self.text


def _place(page: Path, line: int) -> str:
    return f"{os.path.relpath(page, ROOT)}:{line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in its order; raises AssertionError for one that says no language."""
    return list(_blocks(page))


def _blocks(page: Path) -> Iterator[Block]:
    mark: str | None = None
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type not in ("html_block", "fence", "code_block"):
            continue
        assert token.map is not None
        line = token.map[0] + 2
        if token.type == "html_block":
            if setup := _SETUP.search(token.content):
                yield Block(page, line - 1, "setup", setup[1] + "\n")
            found = _MARK.search(token.content)
            mark = " ".join(found[1].split()) if found else None
            continue
        block = Block(page, line, token.info.strip(), token.content, mark)
        assert token.type == "fence", f"{block.place}: indent no code; fence it, and name its language"
        assert block.language, f"{block.place}: the fence names no language"
        assert mark is None or len(mark) > 8, f"{block.place}: say why it is not run"
        mark = None
        if not block.language.startswith("{"):  # {toctree} and the like are no code
            yield block


def commands_in_prose(page: Path) -> Iterator[tuple[str, str]]:
    """Each ``batchinfer …`` in backticks of a page's prose, with its place."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        for child in token.children or ():
            if child.type == "code_inline" and _INLINE.match(child.content):
                assert token.map is not None
                yield _place(page, token.map[0] + 1), child.content


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Each relative link of a page, with its place."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        for child in token.children or ():
            target = str(child.attrGet("href") or child.attrGet("src") or "")
            if target and "://" not in target and not target.startswith("mailto:"):
                assert token.map is not None
                yield _place(page, token.map[0] + 1), target
