"""Dataset JSONs of files with any names, and several scans of a person, who is never paired with himself."""

from pathlib import Path

import numpy as np
import pytest
from data_samples import head, make_dataset, save, write

from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.data.sampler import draw_groups, draw_images
from sitreg_lumir.train.arguments import complete

SHAPE = {"tensorImageShape": {"0": [8, 10, 6]}}


def test_any_names_serve(tmp_path: Path) -> None:
    names = ["./anna.nii.gz", "./ben/t1.nii", "./carl/t1.nii", "./sub-7/ses-2/anat/sub-7_ses-2_T1w.nii.gz"]
    for number, name in enumerate([*names, "./sub-7/ses-2/anat/sub-7_ses-2_FLAIR.nii.gz"]):
        save(tmp_path / name, head(number))
    flair = "./sub-7/ses-2/anat/sub-7_ses-2_FLAIR.nii.gz"
    pairs = [{"fixed": names[0], "moving": names[1]}, {"fixed": names[0], "moving": flair}]
    write(tmp_path, SHAPE | {"training": names, "validation": pairs}, "some list.json")
    dataset = read_dataset(tmp_path, training=True, validation=True)
    assert [image.name for image in dataset.training] == ["anna_0000", "ben-t1_0000", "carl-t1_0000", "7-ses2_0000"]
    assert [image.who for image in dataset.training] == ["anna", "ben-t1", "carl-t1", "7"]
    assert [pair.long_name for pair in dataset.validation] == ["anna_0000_ben-t1_0000", "anna_0000_7-ses2_FLAIR"]
    assert [pair.contrasts for pair in dataset.validation] == ["T1-T1", "T1-FLAIR"]


def test_scans_of_one_person_are_told_by_bids_or_by_the_json(tmp_path: Path) -> None:
    bids = [f"./sub-{who}_ses-{visit}_T1w.nii.gz" for who, visit in ("11", "12", "21")]
    stated = [{"image": f"./x{number}.nii.gz", "subject": "one" if number < 2 else "other"} for number in range(3)]
    for number, entry in enumerate([*bids, *stated]):
        save(tmp_path / (entry if isinstance(entry, str) else entry["image"]), head(number))
    write(tmp_path, SHAPE | {"training": [*bids, *stated]})
    people = [image.who for image in read_dataset(tmp_path, training=True).training]
    assert people == ["1", "1", "2", "one", "one", "other"]


def test_people_are_never_paired_with_themselves_and_all_their_scans_are_drawn() -> None:
    people = ["a", "b", "b", "c", "b", "d", "d"]
    for size in (2, 3):
        drawn = draw_images(3, 1, people, size, 500)
        assert drawn.shape == (500, size)
        assert all(len({people[place] for place in row}) == size for row in drawn)
        assert set(drawn.ravel()) == set(range(len(people)))
        assert np.array_equal(drawn, draw_images(3, 1, people, size, 500))
        assert not np.array_equal(drawn, draw_images(3, 2, people, size, 500))
        groups = draw_groups(3, 1, 4, size, 500)  # the people are those of data sets with a scan each
        assert [["abcd"[who] for who in row] for row in groups] == [[people[place] for place in row] for row in drawn]
    assert np.array_equal(draw_images(3, 1, [*"abcde"], 2, 11), draw_groups(3, 1, 5, 2, 11))


def test_a_second_list_is_only_asked_for_where_it_is_or_where_users_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_dataset(tmp_path / "data")
    shipped = ["--config", "minilumir/mind_small", "--data", str(root)]

    def lists(args: list[str]) -> list[str]:
        return [argument for argument in complete(args) if argument.startswith("--data.validation")]

    assert lists(shipped) == [] and "note" not in capsys.readouterr().err
    (root / "LUMIR_dataset_multimodal.json").unlink()
    assert lists(shipped) == ["--data.validation=[]"]
    assert lists([*shipped[:2], "--data", str(root / "LUMIR_dataset.json")]) == ["--data.validation=[]"]
    assert "note: LUMIR_dataset_multimodal.json of the config is not in" in capsys.readouterr().err
    named = "--data.validation=[LUMIR_dataset_multimodal.json]"
    assert lists([*shipped, named]) == [named]  # asked for by the user, so it is refused later
    own = tmp_path / "own.yaml"
    own.write_text("data: {validation: [LUMIR_dataset_multimodal.json]}\n")
    assert lists([*shipped, "--config", str(own)]) == []
    assert capsys.readouterr().err == ""
