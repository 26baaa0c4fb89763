"""Options of training that the paper does not have: what each does to a step, and that resuming repeats it exactly."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_samples
import pytest
import torch

from sitreg_lumir.cli import main
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.weights import CARD_KEY, load_member
from sitreg_lumir.train.averaging import WeightAverage
from sitreg_lumir.train.module import MindRegistration
from sitreg_lumir.train.rates import learning_rate
from sitreg_lumir.train.terms import pair_terms
from sitreg_lumir.train.triplets import View


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_samples.make_dataset(tmp_path_factory.mktemp("options") / "data", training=4)


def arguments(root: Path, runs: Path, name: str, *more: str, epochs: int = 2) -> list[str]:
    """A tiny run of three pairs an epoch, the first epoch at half resolution."""
    return [
        "fit", "--config", "mind", "--name", name, "--runs", str(runs), "--wandb", "off", "--checkpoint-every", "1",
        "--data.root", str(root), "--data.batch_size", "1", "--data.pairs_per_epoch", "3", "--data.num_workers", "0",
        "--data.cache", str(runs.parent / "cache"), "--model.features", "[4,4]", "--model.head_features", "[4,4]",
        "--model.window", "5", "--model.recompute", "false", "--model.coarse_epochs", "1",
        "--trainer.max_epochs", str(epochs),
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false",
        "--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1", *more,
    ]  # fmt: skip


def checkpoint(runs: Path, name: str) -> dict[str, Any]:
    return torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True)


def rates(runs: Path, name: str) -> list[float]:
    rows = csv.DictReader((runs / name / "metrics.csv").open())
    return [float(row["train/lr"]) for row in rows if row.get("train/lr")]


def averaging(folder: Path) -> list[str]:
    file = folder / "average.yaml"
    file.write_text("trainer: {callbacks: [{class_path: WeightAverage, init_args: {decay: 0.5}}]}")
    return ["--config", str(file)]


def module_and_views(**options: Any) -> tuple[MindRegistration, list[View]]:
    """A double precision module with a network that moves something, and the views of two smooth images."""
    torch.manual_seed(0)
    module = MindRegistration(features=[4, 4], head_features=[4, 4], window=5, **options).double()
    for head in module.network.heads:
        torch.nn.init.normal_(head.final.weight, std=0.3)
    images = torch.nn.functional.avg_pool3d(torch.rand(2, 1, 1, 14, 12, 10, dtype=torch.float64)[:, 0], 3, 1, 1)
    module.fractional_epoch = lambda: 0.0  # type: ignore[method-assign]
    return module, [View(image[None], image[None] > 0.2, module.inputs(image[None])) for image in images]


def at_step(module: MindRegistration, step: int) -> None:
    """Gives a module without a Trainer the weights of a step."""
    module.active_terms = lambda scope: [  # type: ignore[method-assign]
        (term, term.weight(0.0, step)) for term in module.terms if term.scope == scope and term.weight(0.0, step)
    ]


def test_the_rate_falls_along_half_a_cosine_and_stays_constant_by_default() -> None:
    steps = {0: 4e-4, 6: 1e-4}
    assert [learning_rate(steps, epoch, None) for epoch in (0, 5.9, 6, 9)] == [4e-4, 4e-4, 1e-4, 1e-4]
    falling = [learning_rate(steps, epoch, 8, 0.1) for epoch in (0, 4, 6, 8, 9)]
    at_6 = 1e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.75)) / 2)
    assert falling == pytest.approx([4e-4, 4e-4 * 0.55, at_6, 1e-5, 1e-5])
    with pytest.raises(InputError, match="max_epochs"):
        learning_rate(steps, 0, -1, 0.1)


def test_rarer_losses_of_earlier_stages_have_the_same_weight_on_average() -> None:
    (term,) = [term for term in pair_terms(1.0, 0.01, stage_every=4) if term.earlier]
    weights = [term.weight(0.0, step) for step in range(8)]
    assert weights == [0.04, 0, 0, 0, 0.04, 0, 0, 0]
    (term,) = [term for term in pair_terms(1.0, 0.01) if term.earlier]
    assert {term.weight(0.0, step) for step in range(8)} == {0.01}


def test_without_earlier_stages_the_rest_of_the_loss_is_the_same() -> None:
    module, views = module_and_views(stage_every=2)
    at_step(module, 0)
    whole, _ = module.pair_loss(*views)
    earlier = float(module.values["earlier_stages"][0])
    module.values = {}
    at_step(module, 1)
    rest, last = module.pair_loss(*views)
    assert "earlier_stages" not in module.values
    assert float(whole.detach()) == pytest.approx(float(rest.detach()) + 2 * 0.01 * earlier, abs=1e-12)
    assert last.inverse is not None


def test_one_direction_and_the_other_add_up_to_both() -> None:
    both, views = module_and_views(stage_weight=0.0)
    at_step(both, 0)
    expected, _ = both.pair_loss(*views)
    expected.backward()
    one_way, _ = module_and_views(stage_weight=0.0, one_direction=True)
    at_step(one_way, 0)
    forward, last = one_way.pair_loss(*views)
    back, _ = one_way.pair_loss(*reversed(views))
    ((forward + back) / 2).backward()
    assert last.inverse is None, "what nobody looks at need not be computed"
    assert one_way.pair_step(*views)[2] is not None
    assert float((forward + back).detach() / 2) == pytest.approx(float(expected), abs=2e-4)
    for parameter, reference in zip(both.parameters(), one_way.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=0.05, atol=2e-3)


def test_the_average_follows_the_weights_and_is_what_a_checkpoint_hands_on(root: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    average = averaging(tmp_path)
    assert main(arguments(root, runs, "plain")) == 0
    assert main(arguments(root, runs, "whole", *average)) == 0
    plain, whole = checkpoint(runs, "plain"), checkpoint(runs, "whole")
    for name, weights in whole["current_model_state"].items():
        assert torch.equal(weights, plain["state_dict"][name]), "averaging changes no step"
    assert int(whole["averaging_state"]["n_averaged"]) == 6
    differing = [
        name for name in plain["state_dict"] if not torch.equal(plain["state_dict"][name], whole["state_dict"][name])
    ]
    assert differing
    member = load_member(runs / "whole" / "checkpoints" / "last.ckpt")
    for name, weights in member.network.state_dict().items():
        assert torch.equal(weights, whole["state_dict"][f"network.{name}"])
    assert main(arguments(root, runs, "parts", *average, epochs=1)) == 0
    assert main(arguments(root, runs, "parts", *average, "--resume")) == 0
    parts = checkpoint(runs, "parts")
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(parts[key][name], tensor) for name, tensor in whole[key].items()), key


def test_the_average_forgets_its_beginning_first() -> None:
    average = WeightAverage(decay=0.9)
    values = [average.next_average(torch.zeros(1), torch.ones(1), count).item() for count in (1, 8, 80, 1000)]
    assert values == pytest.approx([9 / 11, 0.5, 0.1, 0.1])
    with pytest.raises(InputError, match="decay"):
        WeightAverage(decay=1.0)


def fails_at(failing: int) -> Callable[..., Any]:
    """``pair_loss``, but ending the run at a step."""
    original = MindRegistration.pair_loss

    def pair_loss(self: MindRegistration, *views: View, **options: bool) -> Any:
        if self.global_step == failing:
            raise InputError("ended on purpose")
        return original(self, *views, **options)

    return pair_loss


def test_options_reach_the_steps_and_the_card_and_resuming_repeats_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    options = ["--model.final_rate_share", "0.1", "--model.one_direction", "true", "--model.stage_every", "2"]
    options += ["--model.coarse_window", "3"]
    assert main(arguments(root, runs, "whole", *options)) == 0
    expected = [learning_rate({0: 4e-4}, step / 3, 2, 0.1) for step in range(6)]
    assert rates(runs, "whole") == pytest.approx(expected)
    whole = checkpoint(runs, "whole")
    training = whole[CARD_KEY]["training"]
    named = {"final_rate_share": 0.1, "one_direction": True, "stage_every": 2, "coarse_window": 3, "window": 5}
    assert {name: training[name] for name in named} == named
    with monkeypatch.context() as patched:
        patched.setattr(MindRegistration, "pair_loss", fails_at(4))
        assert main(arguments(root, runs, "parts", *options)) == 2  # within the second epoch
    assert checkpoint(runs, "parts")["global_step"] == 4
    assert main(arguments(root, runs, "parts", *options, "--resume")) == 0
    parts = checkpoint(runs, "parts")
    assert all(torch.equal(parts["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert rates(runs, "parts") == pytest.approx(expected)


def test_the_coarse_window_is_that_of_the_coarse_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    module, views = module_and_views(coarse_window=3, coarse_epochs=1)
    at_step(module, 0)
    losses = []
    for epoch in (0, 1):
        monkeypatch.setattr(MindRegistration, "current_epoch", epoch)
        losses.append(float(module.pair_loss(*views)[0]))
    for width, loss in zip((3, 5), losses, strict=True):
        module.window, module.coarse_window = width, None
        assert float(module.pair_loss(*views)[0]) == loss
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "wrong",
    [{"window": 4}, {"coarse_window": 0}, {"stage_every": 0}, {"final_rate_share": 0.0}, {"final_rate_share": 2.0}],
)
def test_values_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        MindRegistration(**wrong)
