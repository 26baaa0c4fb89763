"""The recipes of the documentation for schedulers: their commands are those of the command line."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from documents import DOCS

from sitreg_lumir.cli import command_line
from sitreg_lumir.registration.batch import Shard

RECIPES = DOCS / "how-to" / "recipes"


def commands(recipe: Path) -> list[list[str]]:
    """The arguments of the commands of a script or of a Snakefile's rules, with the values of a first part."""
    text = recipe.read_text().replace("\\\n", " ")
    text = re.sub(r'"\s*\n\s*" ?', " ", text)  # texts of Python that belong together
    values = {"$SLURM_ARRAY_TASK_ID": "1", "{wildcards.part}": "1", "{params.parts}": "4", "{params.options}": ""}
    for name, value in (values | {"{input}": "pairs.csv"}).items():
        text = text.replace(name, value)
    lines = re.findall(r"sitreg-lumir (register --pairs .*?)(?:\|\||$)", text.replace('"', ""), re.M)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", ["register.sbatch", "Snakefile"])
def test_a_part_and_the_table_are_asked_for_as_the_command_line_understands_it(name: str) -> None:
    options = [command_line().parse_args(arguments) for arguments in commands(RECIPES / name)]
    assert [option.collect for option in options].count(True) == 1
    (part,) = [option.shard for option in options if option.shard]
    shard = Shard.parse(part)
    assert shard.number == 1
    if name == "register.sbatch":
        assert f"--array=1-{shard.count} " in (RECIPES / name).read_text()
    assert {option.pairs.name for option in options} == {"pairs.csv"}
    assert len({option.output for option in options}) == 1


def test_the_script_is_one_that_bash_understands() -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    assert subprocess.run([bash, "-n", str(RECIPES / "register.sbatch")], capture_output=True).returncode == 0
