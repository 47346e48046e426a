"""The code of the documentation: every fenced block of the pages, and why one is not run."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import ROOT

PAGES = {
    path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<why>.*) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. `why_not` is the reason in `<!-- not run: ... -->` above one that cannot run here, or None."""

    page: str
    line: int
    code: str
    why_not: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, language: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("code")) + 1, textwrap.dedent(found["code"]), found["why"])
        for found in BLOCK.finditer(text)
        if found["language"] == language
    ]


def run(block: Block, scope: dict, folder: Path) -> None:
    """Runs a block; one that names a file of code in its first line (`# my_file.py`) is written to `folder` too."""
    if file := re.match(r"# (\w+\.py)\b", block.code):
        (folder / file[1]).write_text(block.code, encoding="utf-8")
    lines = "\n" * (block.line - 1)  # so that a traceback names the line of the page
    exec(compile(lines + block.code, str(PAGES[block.page]), "exec"), scope)
