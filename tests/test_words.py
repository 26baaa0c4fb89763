"""Names say what they stand for: words of another field, and words that say nothing, name nothing in the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sitreg_lumir", "benchmarks", "tests")
SAY_NOTHING = {"found", "one", "each", "other", "here", "there", "given", "told"}
INSTEAD = {  # what a word is called in the field, or in plain English
    "carry": "resample",
    "carried": "resampled, transferred",
    "chain": "composite",
    "sides": "scans",
    "slopes": "gradients",
    "noted": "recorded",
    "seen": "augmented",
    "halved": "downsampled_by_two",
    "hits": "inside_mask",
    "mend": "fix",
    "anew": "again",
    "spoiled": "degraded",
}


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a file gives, and their lines; those of tests, which are sentences, are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.name.startswith("test_"):
                yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def problem(name: str) -> str | None:
    """What is wrong with a name."""
    bare = name.lower().strip("_")
    if bare in SAY_NOTHING:
        return "says nothing; say what it is"
    return next((f"say {INSTEAD[word]}" for word in bare.split("_") if word in INSTEAD), None)


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_are_words_of_the_field(folder: str) -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {problem(name)}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in [*names(ast.parse(path.read_text(encoding="utf-8"))), (path.stem, 1)]
        if problem(name)
    ]
    assert not problems, "\n".join(problems)


def test_old_words_are_noticed() -> None:
    tree = ast.parse("def carry(here, image):\n    self.hits = _found = 1\n    shown = image\n")
    assert {name for name, _ in names(tree) if problem(name)} == {"carry", "here", "hits", "_found"}
