"""A LUMIR dataset JSON (2024 and 2025 layout) -> its images and pairs."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitreg_lumir.data.groups import (
    CONFIGS,
    FILE_NAME,
    Group,
    contrast,
    find_lists,
    group_names,
    labels_problem,
    load_json,
    modalities_problem,
    name_problem,
    pair_key,
)
from sitreg_lumir.data.headers import header_problems
from sitreg_lumir.data.images import Image, Pair
from sitreg_lumir.data.names import parts_of
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import check_voxels
from sitreg_lumir.io.other_formats import NIFTI_SUFFIXES
from sitreg_lumir.io.volume_files import has_suffix

_PREFERRED = ("LUMIR_dataset.json", "LUMIR25_dataset.json")
_SHOWN = 20
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes, letters: what file systems take


@dataclass(frozen=True)
class LumirDataset:
    """What a dataset JSON says; ``shape`` is the grid of all its images, ``(X, Y, Z)``."""

    path: Path
    root: Path
    name: str
    shape: tuple[int, int, int]
    training: tuple[Image, ...]
    validation: tuple[Pair, ...]
    evaluation_labels: tuple[int, ...] | None
    label_names: dict[int, str]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that its validation pairs are in, in order; none where there are only contrasts."""
        return groups_of_pairs(self.validation)


def read_dataset(
    path: str | Path,
    *,
    training: bool = False,
    validation: bool = False,
    check_files: bool = True,
    images: str | Path | None = None,
    groups: Sequence[Path] | None = None,
    check_headers: bool = True,
) -> LumirDataset:
    """Reads a dataset JSON and checks all that it names.

    A pair's group is what decides first of: ``groups``; the pair's own ``"group"`` in the JSON; the evaluator's
    ``*_evaluation_config.json`` beside the JSON; the challenge's lists of 2025, if these are its pairs.

    Args:
        path: the JSON, or the folder that holds it (``LUMIR_dataset.json``, then ``LUMIR25_dataset.json``,
            then the only JSON there).
        training: training images are needed: read ``training`` and refuse less than two.
        validation: validation pairs are needed: refuse a JSON without.
        check_files: look whether each file exists and its header has the JSON's shape. Training files are
            looked at only with ``training``.
        images: the folder that the JSON's paths start from and never leave; by default the JSON's own.
        groups: the evaluator's config files, or folders of them, that decide alone where they list a pair; an empty
            list: no groups at all, contrasts only.
        check_headers: with ``check_files``, refuse files that are stored in another orientation than the first image,
            images of another voxel size, and label maps and landmarks that lie elsewhere than their image; else print
            a warning, and take arrays as they are, as the official evaluation does.

    Raises:
        InputError: the JSON or a needed part of it is missing, or entries are wrong: paths that leave the
            root, unknown file names, duplicates, missing files, other shapes, all of them named in one line.

    Examples:
        >>> dataset = sitreg_lumir.read_dataset("LUMIR", training=True, validation=True)
        >>> len(dataset.training), dataset.validation[0].name
        (5, '0100_0101')
    """
    file = _find_json(Path(path).expanduser().absolute())
    content = load_json(file, "a dataset JSON, it must hold one object with `tensorImageShape`")
    shape = _read_shape(file, content)
    problem = modalities_problem(content.get("modality"))
    if problem:
        raise InputError(f"{file}: `modality` {problem}")
    name = content.get("name", file.stem)
    if not isinstance(name, str | int | float):
        raise InputError(f"{file}: `name` must be a text, it is {str(name)[:60]}")
    problems: list[str] = []
    root = Path(images).expanduser().absolute() if images else file.parent
    listed = tuple(
        _image(root, _entry(item, "image"), problems, item.get("subject") if isinstance(item, dict) else None)
        for item in _list(file, content, "training")
    )
    entries = _list(file, content, "validation")
    pairs = tuple(_pair(root, item, content.get("modality"), problems) for item in entries)
    if groups is None or groups:
        pairs = _with_groups(file.parent, pairs, entries, groups, problems)
    for needed, key in ((training, "training"), (validation, "validation")):
        if needed and not content.get(key):
            raise InputError(f"{file}: has no `{key}` list; add it or give another dataset JSON")
    if training:
        problems += _repeated("training subject", (image.subject for image in listed))
        people = len({image.who for image in listed})
        if people < 2 and not problems:
            raise InputError(
                f"{file}: training needs at least 2 images of different subjects, `training` lists {people}"
            )
    problems += _repeated("validation pair", (pair.long_name for pair in pairs))
    if check_files and not problems:
        checked = [image for pair in pairs for image in (pair.fixed, pair.moving)]
        images_to_check = dict.fromkeys([*(listed if training else ()), *checked])
        files = [(image.path, *filter(None, (image.labels, image.landmarks))) for image in images_to_check]
        problems += header_problems(files, shape, check_headers=check_headers)
    raise_problems(file, problems)
    groups_of_pairs(pairs, file)
    labels = content.get("evaluation_labels")
    problem = None if labels is None else labels_problem(labels)
    if problem:
        raise InputError(f"{file}: `evaluation_labels` {problem}")
    names = {int(key): str(name) for key, name in labels.items()} if isinstance(labels, dict) else {}
    return LumirDataset(
        path=file,
        root=root,
        name=str(name),
        shape=shape,
        training=listed,
        validation=pairs,
        evaluation_labels=tuple(int(label) for label in labels) if labels else None,
        label_names=names,
    )


def raise_problems(source: str | Path, problems: list[str]) -> None:
    """Raises one ``InputError`` with the first 20 problems and the number of the rest, if there are any."""
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise InputError(f"{source}: {count}{'; '.join(problems[:_SHOWN])}{more}")


def _find_json(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a LUMIR dataset JSON or the folder that holds it")
    for name in _PREFERRED:
        if (path / name).is_file():
            return path / name
    candidates = sorted(set(path.glob("[!.]*.json")) - set(path.glob(CONFIGS)))
    if len(candidates) != 1:
        what = f"several JSON files ({', '.join(f.name for f in candidates[:5])})" if candidates else "no JSON file"
        raise InputError(f"{path}: holds {what}; give the path of the dataset JSON itself")
    return candidates[0]


def _read_shape(file: Path, content: dict[str, Any]) -> tuple[int, int, int]:
    shape = content.get("tensorImageShape")
    shape = next(iter(shape.values()), None) if isinstance(shape, dict) else shape
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f'{file}: `tensorImageShape` must be {{"0": [X, Y, Z]}}, it is {str(shape)[:80]}')
    check_voxels(file, shape)
    return shape[0], shape[1], shape[2]


def _list(file: Path, content: dict[str, Any], key: str) -> list[Any]:
    entries = content.get(key) or []
    if not isinstance(entries, list):
        raise InputError(f"{file}: `{key}` must be a list")
    return entries


def _entry(item: object, key: str) -> object:
    return item.get(key) if isinstance(item, dict) else item


def _image(root: Path, entry: object, problems: list[str], person: object = None) -> Image:
    """The image an entry names; what is wrong with it is appended to ``problems``.

    Args:
        root: that paths start from.
        entry: the path.
        problems: gets what is wrong.
        person: the entry's ``subject``, if it has one.
    """
    written = Path(os.path.normpath(str(entry)))  # links may lead elsewhere, the written path may not
    path = root / written
    match = FILE_NAME.fullmatch(path.name)
    if not isinstance(entry, str):
        problems.append(f"the entry {repr(entry)[:80]} is not a path")
    elif "\0" in entry or len(entry) > _LONGEST_PATH or any(len(p.encode()) > _LONGEST_NAME for p in written.parts):
        problems.append(f"the path {entry[:60]!r}... is longer than a file's can be, or holds a NUL")
        return Image(root / "too long", "", "")
    elif written.parts[:1] == ("..",) or not path.is_relative_to(root):
        problems.append(f"{entry} leaves the folder {root}")
    elif not has_suffix(path.name, *NIFTI_SUFFIXES):
        problems.append(f"{entry} is no .nii.gz or .nii file")
    if person is not None and (not isinstance(person, str) or not person):
        problems.append(f"the `subject` {person!r} of {entry} is no name")
    stated = person if isinstance(person, str) else ""
    if match:
        return Image(path, match["subject"], match["modality"], stated)
    names = parts_of(written)
    return Image(path, names.subject, names.modality, stated or names.person)


def _pair(root: Path, item: object, modalities: object, problems: list[str]) -> Pair:
    if not isinstance(item, dict) or "fixed" not in item or "moving" not in item:
        item = {"fixed": item, "moving": item}
    fixed, moving = (_image(root, item[role], problems) for role in ("fixed", "moving"))
    return Pair(fixed, moving, "-".join(contrast(image.modality, modalities) for image in (fixed, moving)))


def _with_groups(
    folder: Path,
    pairs: Sequence[Pair],
    entries: Sequence[object],
    named: Sequence[Path] | None,
    problems: list[str],
) -> tuple[Pair, ...]:
    """The pairs with what lists and entries say of them; what is wrong with a name is appended to ``problems``."""
    keys = [pair_key(pair.fixed.path.name, pair.moving.path.name) for pair in pairs]
    lists = find_lists(folder, keys, named)
    grouped = []
    for pair, key, entry in zip(pairs, keys, entries, strict=True):
        listed = lists.get(key)
        own = entry.get("group") if isinstance(entry, dict) else None
        if own is not None and (named is None or listed is None):
            problem = name_problem(own)
            if problem:
                problems.append(f"validation pair {pair.long_name}: {problem}")
                continue
            listed = (listed or Group(""))._replace(name="" if own == pair.contrasts else str(own))
        grouped.append(pair._replace(listed=listed))
    return tuple(grouped)


def groups_of_pairs(pairs: Iterable[Pair], source: str | Path = "the validation pairs") -> tuple[str, ...]:
    """The groups that pairs are in, in the order of tables.

    Raises:
        InputError: a group is called like the contrasts of other pairs; ``source`` stands at the start of the line.
    """
    try:
        return group_names((pair.named_group, pair.contrasts) for pair in pairs)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _repeated(what: str, names: Iterable[str]) -> list[str]:
    return [f"{what} {name} is listed {count} times" for name, count in Counter(names).items() if name and count > 1]
