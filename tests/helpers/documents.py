"""The README and the pages of the documentation as tests read them: their commands and their code."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
BUILT = {"cli.md", "configs.md", "shipped-members.md"}  # of docs/reference, made when the site is built

_FENCE = re.compile(r"^```(?P<language>\w*) *(?:title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A code block: its language, the file that it stands for (or nothing), and its text."""

    language: str
    title: str
    text: str


def name_of(page: Path) -> str:
    """A page's name for test ids."""
    return str(page.relative_to(ROOT).with_suffix(""))


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    matches = _FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["title"] or "", match["text"]) for match in matches]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `sitreg-lumir` line in a page's code blocks."""
    texts = [block.text for block in blocks(page) if block.language in ("", "bash")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    starts = ("sitreg-lumir ", "srun sitreg-lumir ")
    return [shlex.split(line.removeprefix("srun "), comments=True)[1:] for line in lines if line.startswith(starts)]


def files_shown(page: Path) -> list[str]:
    """Names of the files whose content a page shows."""
    return [block.title for block in blocks(page) if block.title]
