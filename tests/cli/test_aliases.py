"""Short and former names of options, and what may be left out, mean the same as what is written in full."""

from pathlib import Path

import pytest
from data_samples import make_dataset

from sitreg_lumir.cli import main
from sitreg_lumir.train.arguments import complete


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SITREG_LUMIR_DATA", raising=False)


@pytest.mark.parametrize(
    "arguments",
    [["fit", "--config", "ens_seed3"], ["predict", "-o", "p"], ["evaluate", "p"], ["submit", "p", "-o", "s.zip"]],
)
def test_without_data_one_line_says_what_to_give(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--data" in line and "SITREG_LUMIR_DATA" in line and "data/LUMIR" in line
    assert not list(Path().iterdir())


def test_the_usual_data_is_taken_the_variable_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "data/LUMIR")
    assert "--data.root=data/LUMIR" in complete(["--config", "mind"])
    monkeypatch.setenv("SITREG_LUMIR_DATA", "elsewhere")
    assert "--data.root=elsewhere" in complete(["--config", "mind"])
    assert "--data.root=elsewhere" not in complete(["--config", "mind", "--data", "own"])


@pytest.mark.parametrize("words", [["--data", "own"], ["--data=own"], ["--data.root", "own"], ["--data.root=own"]])
def test_data_is_the_root_by_any_name(words: list[str]) -> None:
    assert "own" in complete(words)[-1] and "--data.root" in " ".join(complete(words))


def test_a_root_in_a_config_counts_and_a_yaml_file_stays_lightning_s(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {root: stored, seed: 4}")
    (tmp_path / "data.yaml").write_text("root: stored")
    assert complete(["--config", "run.yaml"]) == ["--seed_everything=4", "--config", "run.yaml"]
    assert complete(["--data", "data.yaml"]) == ["--data=data.yaml"]


@pytest.mark.parametrize(
    ("words", "added"),
    [
        (["--seed_everything", "7"], ["--data.seed=7"]),
        (["--data.seed=7"], ["--seed_everything=7"]),
        (["--data.seed", "7", "--seed_everything", "8"], []),
        (["--seed_everything", "true"], []),
        ([], []),
    ],
)
def test_one_seed_sets_both_unless_both_are_given(words: list[str], added: list[str]) -> None:
    assert complete(["--data", "own", *words]) == [*added, "--data.root=own", *words]


def test_former_names_of_verbs_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("carry", "resample-field"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
    for option in ("--members", "--ckpt_path"):
        assert main(["validate", option, "gone.ckpt", "--data", "own"]) == 2
        assert "gone.ckpt" in capsys.readouterr().err
    for option in ("--data", "--dataset"):
        assert main(["evaluate", "p", option, "gone.json"]) == 2
        assert "gone.json" in capsys.readouterr().err
    assert main(["export", "--members", "gone.ckpt", "-o", "m.safetensors"]) == 2
    assert "gone.ckpt" in capsys.readouterr().err
    assert main(["export", "gone.ckpt", "--members", "gone.ckpt", "-o", "m.safetensors"]) == 2
