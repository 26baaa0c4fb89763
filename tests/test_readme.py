"""What README and documentation tell to type works: each command is understood, those on two scans are run."""

import re
from pathlib import Path

import pytest
from documents import DOCS, PAGES, README, ROOT, commands, files_shown, name_of

from sitreg_lumir.cli import command_line
from sitreg_lumir.train.configs import config_names

OPEN_VERBS = ("fit", "validate", "test", "predict")  # they take every setting of data, model and Trainer
SHOWN = [(page, arguments) for page in PAGES for arguments in commands(page)]


def test_there_are_commands_and_the_first_registers_the_example() -> None:
    assert len(SHOWN) > 60
    assert {arguments[0] for _, arguments in SHOWN} >= {
        "register",
        "apply",
        "preprocess",
        "resample-field",
        "fit",
        "predict",
    }
    assert commands(README)[0][:5] == ["register", "--fixed", "EXAMPLE-T1", "--moving", "EXAMPLE-T2"]


def test_the_readme_is_short_and_begins_with_make() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 600
    assert text.splitlines()[3].startswith("make demo") and text.splitlines()[4].startswith("make test")


@pytest.mark.parametrize(
    ("page", "arguments"), SHOWN, ids=[f"{name_of(page)}: {' '.join(arguments)}" for page, arguments in SHOWN]
)
def test_each_command_is_understood(page: Path, arguments: list[str]) -> None:
    options, rest = command_line().parse_known_args(arguments)
    assert options.verb in OPEN_VERBS or not rest, rest
    if options.verb == "fit":
        assert set(options.config) <= {*config_names(), "config.yaml", *files_shown(page)}, options.config
    for argument in rest:
        assert not argument.startswith("--") or re.match(r"--(data|model|trainer)(\.\w+)*$", argument), argument


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"python ((?:benchmarks|docs/scripts)/[\w/]+\.py)", text):
        assert (ROOT / name).is_file(), name
    if page == README:
        for name in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
            assert (ROOT / name).is_file() or name.startswith("https://"), name


def test_configs_that_are_named_exist() -> None:
    """In the pages, in the configs' own comments, in what the command line says, and in the notebooks."""
    known = set(config_names())
    sources = [*PAGES, ROOT / "Makefile", ROOT / "Dockerfile", *(ROOT / "sitreg_lumir/cli").glob("*.py")]
    sources += [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "notebooks").glob("*.ipynb")]
    named = 0
    for source in sources:
        text = source.read_text(encoding="utf-8")
        own = files_shown(source) if source.suffix == ".md" else []
        names = re.findall(r"--config[ =]([\w./-]*\w)", text) + re.findall(r"`(minilumir/\w+)`", text)
        names += re.findall(r"\bconfigs/([\w/]+)\.yaml", text)
        named += len(names)
        for name in names:
            known_here = name in known or name in own or name.endswith("config.yaml") or name == "NAME"
            assert known_here, f"{source.relative_to(ROOT)} names {name}"
    assert named > len(known)
    for file in (ROOT / "configs").rglob("*.yaml"):
        own = re.findall(r"--config[ =]([\w./-]*\w)", file.read_text())
        assert own in ([], [str(file.relative_to(ROOT / "configs").with_suffix(""))]), file


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS)}\n" in navigation, page
