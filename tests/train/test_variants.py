"""A user's variant: found in the working folder, with its own defaults, and predicted with what it was trained on."""

import json
from pathlib import Path
from typing import Any

import data_samples
import nibabel
import numpy as np
import pytest
import torch
import warm_processes
import yaml
from cli_calls import SMALL, TINY, predict_arguments, refused, shell
from torch import nn
from variants_sample import VARIANTS

from sitreg_lumir.cli import main
from sitreg_lumir.data.views import clean_view
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.card import CARD_KEY
from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.network.input_transform import describe
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import ModelCard, load_member, load_members, save_member
from sitreg_lumir.registration.model import load_model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and the user's module."""
    folder = tmp_path_factory.mktemp("workplace")
    data_samples.make_dataset(folder / "data")
    (folder / "my_variant.py").write_text(VARIANTS)
    return folder


@pytest.fixture(autouse=True)
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))


def fit_arguments(name: str, *more: str) -> list[str]:
    own = ["--allow-imports", "my_variant"]
    return ["fit", "--name", name, "--data.root", "data", "--data.cache", "cache", *own, *TINY, *more]


def last(name: str) -> Path:
    return Path("runs") / name / "checkpoints" / "last.ckpt"


def card_of(name: str) -> dict[str, Any]:
    return dict(torch.load(last(name), weights_only=True)[CARD_KEY])


def field(folder: str) -> np.ndarray:
    return np.asarray(nibabel.load(Path(folder) / "disp_0100_0101.nii.gz").dataobj)


@pytest.mark.slow
def test_from_a_shell_a_variant_keeps_its_defaults_and_is_predicted_with_its_transform(workplace: Path) -> None:
    done = shell(fit_arguments("shell", "--model", "my_variant.OnGradient", "--model.scale", "2.5"), workplace)
    assert done.returncode == 0, done.stderr
    assert "--allow-imports my_variant" in done.stdout
    architecture = card_of("shell")["architecture"]
    assert architecture["features"] == [4, 4] and architecture["in_channels"] == 2
    transform = card_of("shell")["input_transform"]
    assert transform["class_path"] == "my_variant.Gradient" and transform["init_args"] == {"scale": 2.5, "axes": [2]}
    done = warm_processes.run(predict_arguments(Path("data"), last("shell"), Path("refused")), workplace)
    assert done.returncode == 2 and "--allow-imports my_variant" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not Path("refused").exists()
    arguments = predict_arguments(Path("data"), last("shell"), Path("shell_fields"), "--allow-imports", "my_variant")
    done = warm_processes.run(arguments, workplace)
    assert done.returncode == 0, done.stderr
    member = load_member(last("shell"), ["my_variant"])
    import my_variant  # type: ignore[import-not-found]

    fixed, moving = (
        clean_view(torch.from_numpy(data_samples.head(subject))[None, None].float())[0] for subject in (100, 101)
    )
    gradient = my_variant.Gradient(2.5)
    with torch.no_grad():
        disp, _ = member.network(fixed=gradient(fixed), moving=gradient(moving))
    np.testing.assert_allclose(field("shell_fields").transpose(3, 0, 1, 2), disp[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("variant", ["Small", "SmallPassingOn"])
def test_a_subclass_keeps_its_own_defaults_and_what_a_config_says_counts(variant: str) -> None:
    name = f"defaults_{variant}"
    Path("mine.yaml").write_text("model: {class_path: MindRegistration, init_args: {window: 3, stage_weight: 0.5}}\n")
    more = ("--config", "mine.yaml", f"--model=my_variant.{variant}", "--model.diffusion_weight", "0.25")
    if variant == "Small":
        more = more[:3]
    assert main(fit_arguments(name, *more)) == 0
    settings = yaml.safe_load((Path("runs") / name / "config.yaml").read_text())["model"]
    assert settings["class_path"] == f"my_variant.{variant}"
    arguments = settings["init_args"]
    assert arguments["features"] == [4, 8] and arguments["head_features"] == [8, 4] and arguments["window"] == 3
    assert card_of(name)["architecture"]["features"] == [4, 8]
    if variant == "Small":
        assert arguments["learning_rate"] == 7e-4 and arguments["sigma"] == 0.75
        assert card_of(name)["mind"] == {"sigma": 0.75, "radius": 2}
    else:
        assert arguments["stage_weight"] == 0.5 and arguments["diffusion_weight"] == 0.25
        assert arguments["learning_rate"] == 4e-4 and arguments["sigma"] == 0.5


def test_without_a_class_the_published_one_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sizes.yaml").write_text("model: {init_args: {features: [4, 4], head_features: [4, 4]}}\n")
    for more in (["--model.features", "[4,4]", "--model.head_features", "[4,4]"], ["--config", "sizes.yaml"]):
        with pytest.raises(SystemExit):
            main(fit_arguments("none", *more, "--print_config"))
        settings = yaml.safe_load(capsys.readouterr().out)["model"]
        assert settings["class_path"] == "sitreg_lumir.train.module.MindRegistration"
        assert settings["init_args"]["features"] == [4, 4] and settings["init_args"]["window"] == 11


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "arguments", "kept"),
    [
        ("Root", {"power": 0.25}, {"power": 0.25}),
        ("Steep", {"offset": 0.2, "power": 2.0}, {"offset": 0.2, "power": 2.0}),
        ("Gradient", {"axes": [2, 4]}, {"scale": 1.0, "axes": [2, 4]}),
        ("Learned", {"gain": 2.0}, {}),
        ("sitreg_lumir.network.mind.Mind", {"radius": 1}, {"sigma": 0.5, "radius": 1}),
    ],
)
def test_a_transform_named_in_a_config_goes_all_the_way(
    transform: str, arguments: dict[str, Any], kept: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """fit, resume, validate, predict, export, predict: both files give the same fields and hold the same state."""
    path = transform if "." in transform else f"my_variant.{transform}"
    name = f"config_{path.rpartition('.')[2]}"
    Path(f"{name}.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {
                    "class_path": "RegistrationModule",
                    "init_args": {
                        "features": [4, 4],
                        "head_features": [4, 4],
                        "window": 3,
                        "input_transform": {"class_path": path, "init_args": arguments},
                    },
                }
            }
        )
    )
    assert main(fit_arguments(name, "--config", f"{name}.yaml")) == 0
    assert main(fit_arguments(name, "--config", f"{name}.yaml", "--resume", "--trainer.max_epochs", "2")) == 0
    card = card_of(name)
    assert card["input_transform"]["class_path"] == path and card["input_transform"]["init_args"] == kept
    assert ("mind" in card) == (path == "sitreg_lumir.network.mind.Mind"), "versions that only know mind must refuse"
    assert (
        main(
            [
                "validate",
                "--config",
                f"runs/{name}/config.yaml",
                "--ckpt_path",
                str(last(name)),
                "--allow-imports",
                "my_variant",
            ]
        )
        == 0
    )
    allow = [] if path.startswith("sitreg_lumir") else ["--allow-imports", "my_variant"]
    exported = Path(f"{name}.safetensors")
    assert main(["export", str(last(name)), "-o", str(exported), *allow]) == 0
    for file, folder in ((last(name), f"{name}_1"), (exported, f"{name}_2")):
        assert main(predict_arguments(Path("data"), file, Path(folder), *allow)) == 0
    np.testing.assert_array_equal(field(f"{name}_1"), field(f"{name}_2"))
    member = load_member(exported, ["my_variant"])
    stored = torch.load(last(name), weights_only=True)["state_dict"]
    tensors = {f"input_transform.{key}": tensor for key, tensor in member.input_transform.state_dict().items()}
    assert {key: tensor.tolist() for key, tensor in stored.items() if key.startswith("input_transform.")} == {
        key: tensor.tolist() for key, tensor in tensors.items()
    }
    if transform == "Learned":
        assert len(tensors) == 4 and float(tensors["input_transform.gain"]) != 2.0, "it is trained with the network"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "my_variant.OverridesInputs", *SMALL], ("OverridesInputs", "inputs()", "input_transform")),
        (["--model", "my_variant.OverridesClean", *SMALL], ("OverridesClean", "clean()", "input_transform")),
        (["--model", "my_variant.SetsMind"], ("SetsMind", "self.input_transform")),
        (["--model", "my_variant.SetsInputs"], ("SetsInputs", "inputs")),
        (["--model", "my_variant.OtherNetwork"], ("OtherNetwork", "another network")),
        (["--model", "my_variant.OtherPart"], ("OtherPart", "another network")),
        (["--model", "my_variant.OtherChannels"], ("Gradient", "2 channel", "in_channels=6")),
        (["--model", "my_variant.Gone"], ("my_variant.Gone", "no such class")),
        (["--model", "gone_variant.Gone"], ("gone_variant.Gone", "--allow-imports gone_variant")),
        (["Untold", "0.25"], ("Untold", "attribute")),
        (["Doubled", "0.25"], ("Doubled", "other values")),
        (["Random", "0.25"], ("Random", "random")),
        (["Miscounted", "0.25"], ("Miscounted", "channels=2", "(1, 1, 24")),
        (["Uncounted"], ("Uncounted", "`channels`")),
        (["OfPath"], ("OfPath", "folder")),
        (["Gone"], ("my_variant.Gone", "no such class")),
    ],
)
def test_what_a_card_cannot_hold_is_refused_before_anything_is_cached(
    more: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if not more[0].startswith("--"):
        power = ["--model.input_transform.power", more[1]] if len(more) > 1 else []
        more = ["--model", "RegistrationModule", "--model.input_transform", f"my_variant.{more[0]}", *power, *SMALL]
    arguments = fit_arguments("refused", *more)
    arguments[arguments.index("cache")] = "untouched"
    refused(capsys, arguments, *words)
    assert not Path("runs/refused").exists() and not Path("untouched").exists()


def test_a_transform_that_cannot_be_imported_is_refused() -> None:
    class Local(nn.Module):
        channels = 1

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image

    with pytest.raises(InputError, match="top level"):
        describe(Local())


def test_foreign_classes_are_imported_only_when_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    (workplace / "trap.py").write_text("from pathlib import Path\nPath('sprung').touch()\n")
    network = SITReg(1, features=[4, 4], head_features=[4, 4])
    rows = torch.eye(4).tolist()
    file = tmp_path / "a.safetensors"

    def save(class_path: str, **arguments: Any) -> None:
        transform = {"class_path": class_path, "init_args": arguments}
        save_member(file, network, ModelCard(network.architecture, None, [8, 10, 6], rows, input_transform=transform))

    def refused_with(match: str, **allowed: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            load_member(file, **allowed)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(file))

    save("trap.Transform")
    refused_with("--allow-imports trap")
    refused_with("--allow-imports trap", allow_imports=["my_variant", "tra"])
    assert not Path("sprung").exists(), "a card that is only read runs no code"
    refused_with("defines no nn.Module", allow_imports=["trap"])
    assert Path("sprung").exists()
    save("my_variant.Gone")
    refused_with("my_variant defines no nn.Module Gone", allow_imports="my_variant")
    save("my_variant.Path")
    refused_with("my_variant defines no nn.Module Path", allow_imports=True)
    save("gone_module.Gone")
    refused_with("cannot be imported", allow_imports=["gone_module"])
    save("my_variant.Root", wrong=1)
    refused_with("cannot be made", allow_imports=["my_variant"])
    for name in ("os.system", "builtins.eval", "sitreg_lumir_other.Thing", "sitreg_lumir.cli.__main__.main"):
        save(name)
        refused_with("--allow-imports")
    save("sitreg_lumir.cli.main")
    refused_with("defines no nn.Module")
    save("my_variant.Gradient")
    refused_with("gives 2 channel", allow_imports=["my_variant"])
    save("my_variant.Root", power=0.25)
    refused_with("--allow-imports my_variant")
    for allowed in (["my_variant"], "my_variant", "other,my_variant", True):
        assert load_member(file, allowed).input_transform.power == 0.25
        assert load_model(file, device="cpu", allow_imports=allowed).members[0].input_transform.power == 0.25
    monkeypatch.setenv("SITREG_LUMIR_ALLOW_IMPORTS", "other,my_variant")
    assert load_member(file).input_transform.power == 0.25


def test_a_class_that_was_changed_since_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import my_variant

    network = SITReg(1, features=[4, 4], head_features=[4, 4])
    rows = torch.eye(4).tolist()
    transform = my_variant.Root(0.25)
    card = ModelCard(network.architecture, None, [8, 10, 6], rows, input_transform=describe(transform))
    save_member(tmp_path / "a.safetensors", network, card, input_transform=transform)
    assert load_member(tmp_path / "a.safetensors", True).input_transform.power == 0.25
    monkeypatch.setattr(my_variant.Root, "forward", lambda self, image: 1 - image**self.power)
    with pytest.raises(InputError, match="the class was changed"):
        load_member(tmp_path / "a.safetensors", True)


def test_cards_of_mind_and_of_intensities_stay_as_they_were(tmp_path: Path) -> None:
    """A card that only knows ``mind`` loads with the same transform; a new card can be read by who only knows that."""
    rows = torch.eye(4).tolist()
    for channels, mind in ((6, {"sigma": 0.75, "radius": 1}), (6, {"sigma": 0.5}), (1, None)):
        network = SITReg(channels, features=[4, 4], head_features=[4, 4])
        file = tmp_path / "a.safetensors"
        save_member(file, network, ModelCard(network.architecture, mind, [8, 10, 6], rows))
        values = json.loads(file.with_suffix(".json").read_text())
        assert values["mind"] == mind
        new = load_member(file)
        save_member(tmp_path / "b.safetensors", network, new.card)
        del values["input_transform"]
        file.with_suffix(".json").write_text(json.dumps(values))
        assert len(load_members([tmp_path])) == 2
        old = load_member(file)
        image = torch.rand(1, 1, 9, 8, 7)
        expected = image if mind is None else Mind(**mind)(image)
        assert all(torch.equal(Ensemble.of([stored]).inputs(image), expected) for stored in (old, new))


def test_members_of_an_ensemble_share_one_transform(tmp_path: Path) -> None:
    import my_variant

    rows = torch.eye(4).tolist()

    def save(name: str, transform: nn.Module) -> None:
        network = SITReg(transform.channels, features=[4, 4], head_features=[4, 4])
        card = ModelCard(network.architecture, None, [8, 10, 6], rows, input_transform=describe(transform))
        save_member(tmp_path / name, network, card, input_transform=transform)

    learned = my_variant.Learned()
    save("a.safetensors", learned)
    save("b.safetensors", learned)
    assert len(load_members([tmp_path], True)) == 2
    save("b.safetensors", my_variant.Learned())
    with pytest.raises(InputError, match="learned other values"):
        load_members([tmp_path], True)
    save("a.safetensors", my_variant.Root(0.25))
    save("b.safetensors", my_variant.Root(0.75))
    with pytest.raises(InputError, match="input_transform is"):
        load_members([tmp_path], True)


def test_another_transform_than_the_checkpoint_s_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--model", "RegistrationModule", "--model.input_transform", "my_variant.Root", *SMALL]
    assert main(fit_arguments("rooted", *more)) == 0
    changed = [*more, "--model.input_transform.power", "0.75", "--resume", "--trainer.max_epochs", "2"]
    refused(capsys, fit_arguments("rooted", *changed), "my_variant.Root", "0.75", "config.yaml")
    raw = ["validate", "--data.root", "data", "--data.cache", "cache", "--model", "RawRegistration", *SMALL]
    refused(capsys, [*raw, "--ckpt_path", str(last("rooted"))], "my_variant.Root", "raw intensities")
