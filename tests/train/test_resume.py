"""`--resume` refuses a checkpoint that training cannot go on from, in one line; a whole one goes on."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import SMALL, TINY, refused
from data_samples import make_dataset

from sitreg_lumir.cli import main
from sitreg_lumir.network.card import CARD_KEY


def entry(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a value in dictionaries and lists within each other."""

    def change(content: dict[str, Any]) -> None:
        *outer, last = place.split("/")
        target: Any = content
        for name in outer:
            target = target[int(name)] if isinstance(target, list) else target[name]
        target[last] = value

    return change


def test_wrong_and_incomplete_states_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_dataset(tmp_path / "data")
    arguments = ["fit", "--name", "a", "--runs", str(tmp_path / "runs"), "--data.root", str(root)]
    arguments += ["--data.cache", str(tmp_path / "cache"), *SMALL, *TINY]
    assert main(arguments) == 0
    whole = torch.load(tmp_path / "runs/a/checkpoints/last.ckpt", weights_only=True)
    path = tmp_path / "changed.ckpt"
    resume = [*arguments, "--resume", str(path), "--trainer.max_epochs", "2"]
    state = "optimizer_states/0/state"
    for change in (
        entry("epoch", "x"), entry("global_step", -1), entry("loops", {}), entry("loops", 3),
        entry("loops/fit_loop", {}),
        entry("loops/fit_loop/epoch_progress", {}), entry("loops/fit_loop/epoch_loop.batch_progress", 5),
        entry("callbacks", 3), entry("optimizer_states", []), entry("optimizer_states", [3]), entry(state, {}),
        entry("optimizer_states/0/param_groups", []), entry("pytorch-lightning_version", "abc"), entry(CARD_KEY, {}),
        lambda content: content["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(2)),
        lambda content: content["optimizer_states"][0]["state"].update({999: {}}),
        lambda content: next(iter(content["state_dict"].values())).fill_(torch.inf),
        lambda content: content["state_dict"].popitem(),
    ):  # fmt: skip
        content = copy.deepcopy(whole)
        change(content)
        torch.save(content, path)
        refused(capsys, resume)
    torch.save(whole, path)
    larger = [argument.replace("[4,4]", "[8,8]") for argument in resume]
    refused(capsys, larger, "changed.ckpt", "another network")
    assert main(resume) == 0
