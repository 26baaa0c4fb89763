"""The challenge's groups: which pair is in which, what is scored there, and that every mean is that of its pairs."""

import csv
import itertools
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data_samples
import numpy as np
import pytest
from numpy.typing import NDArray
from pages import Page
from wandb_runs import read_run, segments

from sitreg_lumir.challenge.evaluate import evaluate
from sitreg_lumir.cli import main
from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.groups import CONFIGS, challenge_lists, read_lists
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.write import save_disp, save_volume
from sitreg_lumir.train.panels import choose_pairs

SHAPE = (12, 14, 10)
FILES = {
    "in-domain": "LUMIR25_VAL_LUMIR24_Segmentation_evaluation_config.json",
    "landmarks": "LUMIR25_VAL_LUMIR24_Landmark_evaluation_config.json",
    "high-field": "LUMIR25_VAL_HighField_Segmentation_evaluation_config.json",
    "multi-modal": "LUMIR25_VAL_MultiModal_Segmentation_evaluation_config.json",
}
Volumes = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def lists(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue("shared") / "lumir25"
    if not folder.is_dir():
        pytest.skip(f"the challenge's lists are not at {folder}")
    return folder


def pairs_of(file: Path) -> list[tuple[str, str]]:
    """Fixed and moving file names of a config or of a dataset JSON, read without the package."""
    content = json.loads(file.read_text())
    entries = content.get("eval_pairs") or content["validation"]
    return [(entry["fixed"].rpartition("/")[2], entry["moving"].rpartition("/")[2]) for entry in entries]


def name_of(pair: tuple[str, str]) -> str:
    """``3455_0000_3454_0000``, as the tables name a pair."""
    return "_".join(file.removeprefix("LUMIRMRI_").removesuffix(".nii.gz") for file in pair)


def save_image(folder: Path, kind: str, file: str, volume: NDArray[Any]) -> None:
    save_volume(folder / f"{kind}Val" / file, volume, np.eye(4))


@pytest.fixture(scope="module")
def tiny(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Volumes]:
    """LUMIR 2025's 36 pairs under their real names on a tiny grid, with labels, landmarks and fields for all."""
    root = tmp_path_factory.mktemp("lumir25")
    content = json.loads((lists / "LUMIR25_dataset.json").read_text())
    content["tensorImageShape"] = {"0": list(SHAPE)}
    content["training"] = []
    (root / "LUMIR25_dataset.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    volumes: Volumes = {}
    pairs = pairs_of(root / "LUMIR25_dataset.json")
    for file in sorted({file for pair in pairs for file in pair}):
        labels = rng.choice(np.array([0, 4, 11, 23, 207], np.uint8), SHAPE, p=[0.4, 0.2, 0.2, 0.15, 0.05])
        landmarks = np.zeros(SHAPE, np.uint8)
        landmarks[3:6, 3:6, 3:6], landmarks[6:9, 7:11, 4:7] = 1, 2
        image = np.zeros(SHAPE, np.uint8)
        image[1:-1, 1:-1, 2:-1] = rng.integers(1, 256, (10, 12, 7))
        for kind, volume in (("images", image), ("labels", labels), ("landmarks", landmarks)):
            save_image(root, kind, file, volume)
            volumes[f"{kind} {file}"] = volume
    fields = root / "fields"
    for pair in pairs:
        disp = rng.uniform(-0.9, 0.9, (3, *SHAPE)).astype(np.float32)
        fixed, moving = (file.split("_")[1] for file in pair)
        save_disp(fields / f"disp_{fixed}_{moving}.nii.gz", disp, np.eye(4))
        volumes[f"disp {name_of(pair)}"] = disp
    return root, fields, volumes


def warped(volume: NDArray[Any], disp: NDArray[np.float32]) -> NDArray[Any]:
    """Nearest neighbour, 0 outside, voxel by voxel."""
    result = np.zeros_like(volume)
    for index in np.ndindex(volume.shape):
        position = [i + float(disp[(axis, *index)]) for axis, i in enumerate(index)]
        if all(0 <= place <= size - 1 for place, size in zip(position, volume.shape, strict=True)):
            result[index] = volume[tuple(int(np.floor(place + 0.5)) for place in position)]
    return result


def own_dice(pair: tuple[str, str], volumes: Volumes, labels: Sequence[int]) -> float:
    fixed, moving = (volumes[f"labels {file}"] for file in pair)
    moved = warped(moving, volumes[f"disp {name_of(pair)}"])
    values = [
        2 * ((fixed == k) & (moved == k)).sum() / ((fixed == k).sum() + (moved == k).sum())
        for k in labels
        if (fixed == k).any() and (moving == k).any()
    ]
    return float(np.mean(values))


def own_tre(pair: tuple[str, str], volumes: Volumes) -> float:
    fixed, moving = (volumes[f"landmarks {file}"] for file in pair)
    moved = warped(moving, volumes[f"disp {name_of(pair)}"])
    centres = [[np.argwhere(volume == k).mean(axis=0) for k in (1, 2)] for volume in (fixed, moved)]
    return float(np.mean([np.linalg.norm(a - b) for a, b in zip(*centres, strict=True)]))


def own_ndv(pair: tuple[str, str], volumes: Volumes) -> float:
    """The ten determinants of the paper at each inner voxel of the fixed foreground, in percent of it."""
    disp = volumes[f"disp {name_of(pair)}"].astype(np.float64)
    places = disp + np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    unit = np.eye(3, dtype=int)
    signs = [(a, b, c) for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    folded, voxels = 0.0, 0
    for index in np.argwhere(volumes[f"images {pair[0]}"] > 0):
        if not all(0 < i < n - 1 for i, n in zip(index, SHAPE, strict=True)):
            continue
        centre = places[(slice(None), *index)]

        def step(offset: NDArray[Any], index: NDArray[Any] = index, centre: NDArray[Any] = centre) -> NDArray[Any]:
            return places[(slice(None), *(index + offset))] - centre  # type: ignore[no-any-return]

        frames = [[s * step(s * unit[axis]) for axis, s in enumerate(sign)] for sign in signs]
        frames.append([step(-unit[0] - unit[1]), step(-unit[0] - unit[2]), step(-unit[1] - unit[2])])
        frames.append([step(unit[0] + unit[1]), step(unit[1] + unit[2]), step(unit[0] + unit[2])])
        folded += float(np.maximum(-np.linalg.det(np.array(frames)), 0).sum()) / 12
        voxels += 1
    return 100 * folded / voxels


def test_the_known_lists_are_those_of_the_evaluator(lists: Path) -> None:
    assert read_lists([lists / file for file in FILES.values()]) == challenge_lists()
    dataset = read_dataset(lists / "LUMIR25_dataset.json", validation=True, check_files=False)
    assert dataset.groups == ("in-domain", "high-field", "multi-modal", "landmarks")
    for group, file in FILES.items():
        assert [pair.long_name for pair in dataset.validation if pair.group == group] == [
            name_of(pair) for pair in pairs_of(lists / file)
        ]
        scored = {
            method["metric"].replace("dice", "dsc"): method.get("labels")
            for method in json.loads((lists / file).read_text())["evaluation_methods"]
        }
        for pair in dataset.validation:
            if pair.group == group:
                assert set(pair.metrics or ()) == set(scored)
                assert list(pair.labels_to_score(None) or ()) == (scored.get("dsc") or [])
                assert pair.labels_to_score((1, 2)) == (1, 2), "the data set's own win"


@pytest.mark.parametrize("where", ["known", "beside", "given"])
def test_each_group_has_the_means_of_its_pairs(
    tiny: tuple[Path, Path, Volumes], lists: Path, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, fields, volumes = tiny
    arguments = ["evaluate", str(fields), "--dataset", str(root), "-o", str(tmp_path)]
    if where == "beside":
        root = shutil.copytree(root, tmp_path / "beside")
        for file in FILES.values():
            shutil.copy(lists / file, root)
        arguments[3] = str(root)
    if where == "given":
        arguments += ["--groups", *(str(lists / file) for file in FILES.values())]
    assert main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(summary["groups"]) == [
        "in-domain",
        "high-field",
        "multi-modal",
        "landmarks",
        "T1-T1",
        "T1-T2",
        "all",
    ]
    labels = json.loads((lists / FILES["in-domain"]).read_text())["evaluation_methods"][1]["labels"]
    own: dict[str, dict[str, float]] = {}
    members = {group: [name_of(pair) for pair in pairs_of(lists / file)] for group, file in FILES.items()}
    for pair in pairs_of(lists / "LUMIR25_dataset.json"):
        name = name_of(pair)
        own[name] = {"ndv": own_ndv(pair, volumes)} if where == "known" else {}  # it takes a second
        own[name] |= {"tre": own_tre(pair, volumes)} if name in members["landmarks"] else {}
        own[name] |= {"dsc": own_dice(pair, volumes, labels)} if name not in members["landmarks"] else {}
    rows = {
        **members,
        "T1-T1": [name for name in own if not name.endswith("_0001")],
        "T1-T2": members["multi-modal"],
        "all": list(own),
    }
    with (tmp_path / "evaluation.csv").open(newline="") as stream:
        cases = {case["pair"]: case for case in csv.DictReader(stream)}
    assert {name: case["group"] for name, case in cases.items()} == {
        name: group for group, names in members.items() for name in names
    }
    for group, names in rows.items():
        row = summary["groups"][group]
        assert row["pairs"] == len(names)
        for score in ("dsc", "tre", "ndv"):
            values = [own[name][score] for name in names if score in own[name]]
            if values:
                assert row[score]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
                assert row[score]["pairs"] == len(values)
            elif score != "ndv":
                assert score not in row
        distances = [float(cases[name]["hd95"]) for name in names if cases[name]["hd95"]]
        assert ("hd95" in row) == bool(distances)
        if distances:
            assert row["hd95"]["mean"] == pytest.approx(np.mean(distances))
    paper, groups = summary["paper"], summary["groups"]
    for key, group, score in (
        ("dsc_in_domain", "in-domain", "dsc"),
        ("dsc_out_of_domain", "high-field", "dsc"),
        ("dsc_multi_modal", "multi-modal", "dsc"),
        ("tre", "landmarks", "tre"),
        ("hd95", "all", "hd95"),
        ("ndv", "all", "ndv"),
    ):
        assert paper[key]["mean"] == groups[group][score]["mean"]
    assert (paper["hd95"]["pairs"], paper["ndv"]["pairs"]) == (27, 36)
    assert "out-of-domain" in next(line for line in shown if line.startswith("as in the paper"))
    numbers = shown[shown.index(next(line for line in shown if line.startswith("as in the paper"))) + 1].split()
    assert numbers[:3] == [
        f"{100 * groups[name]['dsc']['mean']:.1f}" for name in ("in-domain", "high-field", "multi-modal")
    ]
    assert not any("none of the challenge's labels" in line for line in shown)


def test_groups_are_in_the_report_with_pictures_of_each(tiny: tuple[Path, Path, Volumes], tmp_path: Path) -> None:
    root, fields, _ = tiny
    arguments = ["evaluate", str(fields), "--dataset", str(root), "-o", str(tmp_path), "--report"]
    assert main(arguments) == 0
    page = Page(tmp_path / "report.html")
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    for group, row in summary["groups"].items():
        assert page.row(group)[1] == str(row["pairs"])
    heads = [row for row in page.rows if row[:2] == ["Dice % in-domain", "out-of-domain"]]
    cells = page.rows[page.rows.index(heads[0]) + 1]
    assert cells[0] == f"{100 * summary['groups']['in-domain']['dsc']['mean']:.1f}"
    assert cells[5] == f"{summary['groups']['all']['ndv']['mean']:.4f}"
    with (tmp_path / "evaluation.csv").open() as stream:
        names = {case["pair"]: case["group"] for case in csv.DictReader(stream)}
    parts = page.text[page.text.index("Worst pairs") : page.text.index("Dice of each structure, worst first")]
    pictured = [names[name] for name, group in itertools.pairwise(parts) if names.get(name) == group]
    assert len(page.all("details")) == 8 and sorted(pictured) == sorted(2 * list(FILES))


def copy_with(root: Path, folder: Path, change: dict[str, Any] | None = None, groups: Sequence[Any] = ()) -> Path:
    """The tiny data in a folder of its own, its JSON changed, its first pairs in the named groups."""
    target = shutil.copytree(root, folder / "data", ignore=shutil.ignore_patterns("fields"))
    file = target / "LUMIR25_dataset.json"
    content = json.loads(file.read_text()) | (change or {})
    for entry, group in zip(content["validation"], groups, strict=False):
        entry["group"] = group
    file.write_text(json.dumps(content))
    return target


def test_the_data_set_s_own_groups_and_labels_win(tiny: tuple[Path, Path, Volumes], tmp_path: Path) -> None:
    root, fields, volumes = tiny
    root = copy_with(root, tmp_path, {"evaluation_labels": [4, 11]}, ["sharp", "sharp", "blurred"])
    result = evaluate(fields, [read_dataset(root, validation=True)], tmp_path)
    groups = result.summary["groups"]
    assert list(groups)[:6] == ["in-domain", "high-field", "multi-modal", "landmarks", "blurred", "sharp"]
    assert (groups["in-domain"]["pairs"], groups["sharp"]["pairs"], groups["blurred"]["pairs"]) == (6, 2, 1)
    first = pairs_of(root / "LUMIR25_dataset.json")[:2]
    assert groups["sharp"]["dsc"]["mean"] == pytest.approx(np.mean([own_dice(p, volumes, [4, 11]) for p in first]))
    assert set(result.summary["labels"]) == {"4", "11"}


def test_given_lists_decide_alone_and_the_rest_is_in_no_group(
    tiny: tuple[Path, Path, Volumes], lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, fields, _ = tiny
    root = copy_with(root, tmp_path, groups=["mine"])
    common = ["evaluate", str(fields), "--dataset", str(root), "-o", str(tmp_path)]
    assert main([*common, "--groups", str(lists / FILES["high-field"]), str(lists / FILES["multi-modal"])]) == 0
    groups = json.loads((tmp_path / "evaluation.json").read_text())["groups"]
    assert {name: group["pairs"] for name, group in groups.items()} == {
        "high-field": 9,
        "multi-modal": 9,
        "mine": 1,
        "no group": 17,
        "T1-T1": 27,
        "T1-T2": 9,
        "all": 36,
    }
    assert groups["no group"]["tre"]["pairs"] == groups["no group"]["dsc"]["pairs"] == 17, "all that its files allow"
    row = next(case for case in csv.DictReader((tmp_path / "evaluation.csv").open()) if case["group"] == "no group")
    assert row["contrasts"] == "T1-T1"
    capsys.readouterr()
    assert main([*common, "--groups", "none"]) == 0
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(summary["groups"]) == ["T1-T1", "T1-T2", "all"] and "paper" not in summary
    assert (tmp_path / "evaluation.csv").read_text().startswith("pair,group,field,dsc,hd95,hd95_mm,tre,tre_mm,ndv,")
    assert "paper" not in capsys.readouterr().out


def test_missing_labels_and_landmarks_are_reported_and_leave_the_other_groups(
    tiny: tuple[Path, Path, Volumes], lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, fields, volumes = tiny
    root = copy_with(root, tmp_path)
    for file in sorted({file for pair in pairs_of(lists / FILES["high-field"]) for file in pair}):
        (root / "labelsVal" / file).unlink()
    first = pairs_of(lists / FILES["in-domain"])[0]
    (root / "labelsVal" / first[1]).unlink()  # the moving image of the first pair, and of no other
    shutil.rmtree(root / "landmarksVal")
    assert main(["evaluate", str(fields), "--dataset", str(root), "-o", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no label maps beside the images, LNCC instead of Dice: 10 pairs" in shown
    assert "no landmarks beside the images, LNCC instead of TRE: 9 pairs" in shown
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    labels = challenge_lists()["LUMIRMRI_3455_0000 LUMIRMRI_3454_0000"].labels or ()
    rest = [own_dice(pair, volumes, labels) for pair in pairs_of(lists / FILES["in-domain"])[1:]]
    assert summary["groups"]["in-domain"]["dsc"]["mean"] == pytest.approx(np.mean(rest))
    assert summary["groups"]["in-domain"]["dsc"]["pairs"] == 8
    assert "dsc" not in summary["groups"]["high-field"] and summary["groups"]["high-field"]["lncc"]["pairs"] == 9
    assert "mean" not in summary["paper"]["dsc_out_of_domain"]


def test_maps_of_another_labelling_are_noticed(
    tiny: tuple[Path, Path, Volumes], lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, fields, volumes = tiny
    root = copy_with(root, tmp_path)
    coarse = dict(volumes)
    for key, volume in volumes.items():
        if key.startswith("labels "):
            coarse[key] = np.searchsorted([0, 4, 11, 23, 207], volume).astype(np.uint8)  # 0 to 4
            save_image(root, "labels", key.removeprefix("labels "), coarse[key])
    common = ["evaluate", str(fields), "--dataset", str(root), "-o", str(tmp_path)]
    assert main(common) == 0
    assert "none of the challenge's labels and are not scored (1, 2, 3)" in capsys.readouterr().out
    pairs = pairs_of(lists / FILES["multi-modal"])
    for words, labels in ((["found"], range(5)), (["1", "3"], (1, 3))):
        assert main([*common, "--labels", *words]) == 0
        assert "not scored" not in capsys.readouterr().out
        groups = json.loads((tmp_path / "evaluation.json").read_text())["groups"]
        own = [own_dice(pair, coarse, labels) for pair in pairs]
        assert groups["multi-modal"]["dsc"]["mean"] == pytest.approx(np.mean(own))


def test_other_data_sets_with_such_numbers_have_no_groups(lists: Path, tmp_path: Path) -> None:
    """LUMIR 2024 has the in-domain and landmark pairs, too, among others: its means must not be of a part of them."""
    content = json.loads((lists / "LUMIR25_dataset.json").read_text())
    pairs = [pair for pair in content["validation"] if "_34" in pair["fixed"]]
    for change, groups in (
        (pairs, ("in-domain", "landmarks")),  # nothing but the challenge's pairs
        ([*pairs, {"fixed": "./imagesVal/LUMIRMRI_3465_0000.nii.gz", "moving": pairs[0]["fixed"]}], ()),
        (json.loads(json.dumps(pairs).replace("LUMIRMRI", "OTHERMRI")), ()),
        (
            [*content["validation"], {"fixed": pairs[0]["moving"], "moving": pairs[0]["fixed"]}],
            ("in-domain", "high-field", "multi-modal", "landmarks"),
        ),
    ):
        file = tmp_path / "dataset.json"
        file.write_text(json.dumps(content | {"validation": change}))
        assert read_dataset(file, check_files=False).groups == groups


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (3, "the group 3 is not a string"),
        (["a"], "is not a string"),
        (True, "True is not a string"),
        ("", "must be 1 to 40 letters"),
        (" in-domain", "must be 1 to 40 letters"),
        ("in-domain ", "must be 1 to 40 letters"),
        ("a/b", "must be 1 to 40 letters"),
        ("a\nb", "must be 1 to 40 letters"),
        ("x" * 10_000, "must be 1 to 40 letters"),
        ("=1+1", "must be 1 to 40 letters"),
        ("all", "must not be called 'all'"),
        ("no group", "must not be called 'no group'"),
    ],
)
def test_bad_names_end_in_one_line(tmp_path: Path, group: object, message: str) -> None:
    root = data_samples.make_dataset(tmp_path)
    content = data_samples.content(root)
    content["validation"][1]["group"] = group
    data_samples.write(root, content)
    with pytest.raises(InputError, match=message) as error:
        read_dataset(root, validation=True)
    assert "LUMIR_dataset.json: " in str(error.value) and "0101_0000_0102_0000" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_group_called_like_the_contrasts_of_others_is_refused(tmp_path: Path) -> None:
    root = data_samples.make_dataset(tmp_path)
    content = data_samples.content(root)
    content["validation"][0]["group"] = "T1-T1"
    data_samples.write(root, content)
    assert read_dataset(root).groups == (), "they are its own contrasts"
    mixed = "LUMIR_dataset_multimodal.json"
    description = json.loads((root / mixed).read_text())
    description["validation"][0]["group"] = "T1-T1"
    data_samples.write(root, description, mixed)
    datasets = [read_dataset(root), read_dataset(root / mixed)]
    with pytest.raises(InputError, match="'T1-T1' is called like the contrasts of some pairs"):
        evaluate(None, datasets, identity=True)
    data = LumirDataModule(str(root), validation=[mixed], cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="'T1-T1' is called like the contrasts of some pairs"):
        data.prepare_data()


def test_a_pair_in_two_groups_is_refused(tmp_path: Path) -> None:
    root = data_samples.make_dataset(tmp_path)
    content = data_samples.content(root)
    content["validation"][0]["group"] = "a"
    data_samples.write(root, content, "again.json")
    with pytest.raises(InputError, match=r"0100_0000_0101_0000 is in 'a' here, but in no group in .*LUMIR_dataset"):
        evaluate(None, [read_dataset(root), read_dataset(root / "again.json")], identity=True)


PAIR = {"fixed": "./imagesVal/LUMIRMRI_0100_0000.nii.gz", "moving": "./imagesVal/LUMIRMRI_0101_0000.nii.gz"}
DICE = {"name": "DSC", "metric": "dice", "labels": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON"),
        ("[]", "not an evaluation config"),
        ({"eval_pairs": [PAIR]}, "not an evaluation config"),
        ({"eval_pairs": [], "evaluation_methods": [DICE]}, "not an evaluation config"),
        ({"eval_pairs": [PAIR, PAIR], "evaluation_methods": [DICE]}, "0101_0000 is listed twice"),
        ({"eval_pairs": ["a"], "evaluation_methods": [DICE]}, "'a' in `eval_pairs` is no pair"),
        ({"eval_pairs": [{"fixed": PAIR["fixed"]}], "evaluation_methods": [DICE]}, "is no pair"),
        ({"eval_pairs": [PAIR | {"moving": "b.nii.gz"}], "evaluation_methods": [DICE]}, "is no pair"),
        ({"eval_pairs": [PAIR], "evaluation_methods": ["dice"]}, "must name a `metric`"),
        ({"eval_pairs": [PAIR], "evaluation_methods": [{"metric": "sdlogj"}]}, "none of dice, hd95, tre, ndv"),
        ({"eval_pairs": [PAIR], "evaluation_methods": [DICE | {"labels": [1.5]}]}, "of dice must hold whole numbers"),
        ({"eval_pairs": [PAIR], "evaluation_methods": [DICE | {"labels": [-1]}]}, "of dice must hold whole numbers"),
        ({"eval_pairs": [PAIR], "evaluation_methods": [DICE | {"labels": [1, "1"]}]}, "names a label twice"),
        ({"eval_pairs": [PAIR], "evaluation_methods": [DICE, {"metric": "hd95", "labels": [1]}]}, "different `labels`"),
    ],
)
def test_bad_lists_end_in_one_line(
    tmp_path: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    file = tmp_path / "mine_evaluation_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["evaluate", "--identity", "--dataset", str(root), "--groups", str(file)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(file) in line and message in line
    shutil.copy(file, root)
    assert main(["evaluate", "--identity", "--dataset", str(root)]) == 2
    assert message in capsys.readouterr().err


def test_wrong_options_end_in_one_line(tmp_path: Path, lists: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_samples.make_dataset(tmp_path / "data")
    common = ["evaluate", "--identity", "--dataset", str(root)]
    for words, message in (
        (["--groups", str(tmp_path / "gone.json")], "gone.json: no such file"),
        (["--groups", str(tmp_path)], "holds no *_evaluation_config.json"),
        (["--groups", str(lists)], "lists none of the pairs"),
        (["--groups", "none", str(lists)], "files or none"),
        (["--groups", str(lists), str(lists / FILES["landmarks"])], "listed"),
        (["--labels", "one"], "--labels must hold whole numbers"),
        (["--labels", "1", "found"], "--labels must hold whole numbers"),
        (["--labels", "1", "01"], "--labels names a label twice"),
    ):
        assert main([*common, *words]) == 2
        shown = capsys.readouterr().err
        assert message in shown and "Traceback" not in shown, words


@pytest.mark.parametrize("labels", [5, "all", {"a": "x"}, [1, -2], [1.5], [True], [[1]], {"1": "a", "01": "b"}])
def test_bad_evaluation_labels_end_in_one_line(tmp_path: Path, labels: object) -> None:
    root = data_samples.make_dataset(tmp_path)
    data_samples.write(root, data_samples.content(root) | {"evaluation_labels": labels})
    with pytest.raises(InputError, match=r"LUMIR_dataset.json: `evaluation_labels` (must|names)"):
        read_dataset(root)


def test_lists_beside_do_not_hide_the_data_set(tmp_path: Path, lists: Path) -> None:
    shutil.copy(lists / "LUMIR25_dataset.json", tmp_path / "my_own.json")
    for file in lists.glob(CONFIGS):
        shutil.copy(file, tmp_path)
    assert len(read_dataset(tmp_path, check_files=False).groups) == 4
    shutil.copy(tmp_path / FILES["landmarks"], tmp_path / "copy_evaluation_config.json")
    with pytest.raises(InputError, match=r"3485_0000 LUMIRMRI_3484_0000 is listed in .*, too; name the lists by"):
        read_dataset(tmp_path, check_files=False)


@pytest.mark.slow
def test_validation_of_a_training_logs_each_group(
    tiny: tuple[Path, Path, Volumes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # the logger sets it, and it must not outlive the test
    root = tiny[0]
    pairs = json.loads((root / "LUMIR25_dataset.json").read_text())["validation"]
    some = [*pairs[:2], *pairs[9:11], *pairs[18:20], *pairs[27:29]]
    change = {
        "validation": some,
        "training": [f"./imagesVal/LUMIRMRI_40{number}_0000.nii.gz" for number in (14, 15, 16)],
    }
    root = copy_with(root, tmp_path, change)
    arguments = [
        "fit", "--config", "mind", "--data.root", str(root), "--data.cache", str(tmp_path / "cache"),
        "--data.num_workers", "0", "--data.pairs_per_epoch", "1", "--data.batch_size", "1", "--trainer.max_epochs", "1",
        "--model.features", "[4,4]", "--model.head_features", "[4,4]", "--trainer.accelerator", "cpu",
        "--runs", str(tmp_path / "runs"), "--name", "tiny", "--wandb", "offline",
    ]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    history = [row for segment in segments(tmp_path / "runs" / "tiny") for row in read_run(segment).history]
    (metrics,) = (tmp_path / "runs").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(metrics.open()) if row.get("val/ndv")]
    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    predict = ["predict", "--members", str(checkpoint), "--data.root", str(root), "-o", str(tmp_path / "out")]
    assert main([*predict, "--data.cache", str(tmp_path / "cache"), "--device", "cpu"]) == 0
    groups = evaluate(tmp_path / "out", [read_dataset(root)]).summary["groups"]
    logged = {key for key, value in rows[-1].items() if value}
    for group in ("in-domain", "high-field", "multi-modal", "T1-T1", "T1-T2"):
        assert float(rows[-1][f"val/dsc/{group}"]) == pytest.approx(groups[group]["dsc"]["mean"], abs=1e-5)
        (value,) = [row[f"val/dsc/{group}"] for row in history if f"val/dsc/{group}" in row]
        assert value == pytest.approx(float(rows[-1][f"val/dsc/{group}"]))
    assert float(rows[-1]["val/tre/landmarks"]) == pytest.approx(groups["landmarks"]["tre"]["mean"], abs=1e-5)
    assert float(rows[-1]["val/hd95"]) == pytest.approx(groups["all"]["hd95"]["mean"], abs=1e-5)
    assert float(rows[-1]["val/ndv"]) == pytest.approx(groups["all"]["ndv"]["mean"], abs=1e-5)
    assert not {"val/dsc/landmarks", "val/tre/in-domain", "val/dsc/no group", "val/dsc/other"} & logged


def test_panels_show_the_paper_s_three_groups(tiny: tuple[Path, Path, Volumes], tmp_path: Path) -> None:
    data = LumirDataModule(str(tiny[0]), cache=str(tmp_path))
    data.dataset = read_dataset(tiny[0])
    data.pairs = data.dataset.validation
    assert [pair.group for pair in choose_pairs(data)] == ["in-domain", "high-field", "multi-modal"]
    data.pairs = tuple(pair for pair in data.pairs if pair.group != "in-domain")
    assert [pair.group for pair in choose_pairs(data)] == ["high-field", "multi-modal", "landmarks"]


@pytest.mark.slow
def test_one_pair_at_full_size(lists: Path, tmp_path: Path) -> None:
    """160x224x192, the challenge's 133 labels in blocks that are moved by one voxel: Dice from counting."""
    content = json.loads((lists / "LUMIR25_dataset.json").read_text())
    content |= {"training": [], "validation": content["validation"][9:10]}
    shape = tuple(content["tensorImageShape"]["0"])
    labels = np.array(challenge_lists()["LUMIRMRI_4015_0000 LUMIRMRI_4014_0000"].labels, np.uint8)
    index = 19 * (np.arange(shape[1])[:, None] // 32) + np.minimum(np.arange(shape[2]) // 10, 18)
    fixed = np.broadcast_to(labels[index], shape)
    moving = np.roll(fixed, 1, axis=1)
    (tmp_path / "LUMIR25_dataset.json").write_text(json.dumps(content))
    for subject, volume in ((4015, fixed), (4014, moving)):
        for kind in ("images", "labels"):
            save_image(tmp_path, kind, f"LUMIRMRI_{subject}_0000.nii.gz", volume)
    disp = np.zeros((3, *shape), np.float32)
    disp[1] = 1
    save_disp(tmp_path / "fields/disp_4015_4014.nii.gz", disp, np.eye(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        result = evaluate(tmp_path / "fields", [read_dataset(tmp_path, validation=True)])
    moved = np.concatenate([fixed[:, :-1], np.zeros_like(fixed[:, :1])], axis=1)  # what leaves the volume is 0
    own = [
        2 * ((fixed == label) & (moved == label)).sum() / ((fixed == label).sum() + (moved == label).sum())
        for label in labels
    ]
    (case,) = result.cases
    assert case["group"] == "high-field" and case["dsc"] == pytest.approx(np.mean(own), abs=1e-12)
    assert sum(key.startswith("dsc/") for key in case) == 133 and case["ndv"] == 0
    assert result.summary["paper"]["dsc_out_of_domain"]["mean"] == case["dsc"]
