"""The one place that says which group of the challenge a pair counts in, and what is scored there.

The evaluator of LUMIR 2025 (JHU-MedImage-Reg/LUMIR25_L2R25, commit 62d3ae4) takes four lists of pairs, one per file
``*_evaluation_config.json``, each with its metrics and labels. Its Dockerfile says which list is which: in-domain
landmarks (``LUMIR24_Landmark``), in-domain (``LUMIR24_Segmentation``), out-of-domain (``HighField_Segmentation``) and
multi-modal (``MultiModal_Segmentation``). The same four are known here without files.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.json_file import read_json

FILE_NAME = re.compile(r"(?P<prefix>[^_]+)_(?P<subject>[^_]+)_(?P<modality>[0-9]{1,9})\.nii(\.gz)?")
CONFIGS = "*_evaluation_config.json"
NO_GROUP = "no group"  # what pairs outside the groups are counted under where others have one
ORDER = ("in-domain", "high-field", "out-of-domain", "multi-modal", "landmarks")
_LARGEST_LABEL = 2**31 - 1  # of volumes of labels
_RESERVED = ("all", "other", NO_GROUP)  # rows that every table may have
_GROUP_NAME = re.compile(r"[^\W_][\w .+()&-]{0,39}")
_CONFIG_NAME = re.compile(r"(?:LUMIR\d*_[A-Za-z]+_)?(?P<name>.+)_evaluation_config\.json")
_CONFIG_GROUPS = {
    "LUMIR24_Segmentation": "in-domain",
    "LUMIR24_Landmark": "landmarks",
    "HighField_Segmentation": "high-field",
    "MultiModal_Segmentation": "multi-modal",
}
_METRICS = {"dice": "dsc", "hd95": "hd95", "tre": "tre", "ndv": "ndv"}  # the evaluator's name -> ours
_USUAL_MODALITIES = {0: "T1", 1: "T2"}  # LUMIR's codes; its 2025 JSON has T2 images without naming them
_CHALLENGE_LABELS = (
    0, 4, 11, 23, *range(30, 33), *range(35, 42), 44, 45, *range(47, 53), *range(55, 63), *range(71, 74), 75, 76,
    *range(100, 110), *range(112, 126), 128, 129, *range(132, 158), *range(160, 188), *range(190, 208),
)  # fmt: skip


class PaperColumn(NamedTuple):
    """A column of the paper's table: one score over the first of ``groups`` that is there, or over all pairs."""

    key: str
    heading: str
    score: str
    groups: tuple[str, ...]


PAPER = (
    PaperColumn("dsc_in_domain", "Dice % in-domain", "dsc", ("in-domain",)),
    PaperColumn("dsc_out_of_domain", "out-of-domain", "dsc", ("high-field", "out-of-domain")),
    PaperColumn("dsc_multi_modal", "multi-modal", "dsc", ("multi-modal",)),
    PaperColumn("tre", "TRE vox", "tre", ("landmarks",)),
    PaperColumn("hd95", "HD95 vox", "hd95", ()),
    PaperColumn("ndv", "NDV %", "ndv", ()),
)


class Group(NamedTuple):
    """What a list says of its pairs.

    Attributes:
        name: of the group; empty where a pair is only counted under its contrasts.
        metrics: those of ``dsc``, ``hd95``, ``tre`` and ``ndv`` that are scored; None: all that a pair's files allow.
        labels: for Dice and HD95, 0 like any other; None: the list names none.
    """

    name: str
    metrics: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None


def contrast(code: str, modalities: object) -> str:
    """``0000`` -> ``T1``, by a dataset JSON's ``modality`` map ("T1w Brain MRI"), else LUMIR's usual codes."""
    if not code.isdigit():
        return code
    named = modalities.get(str(int(code))) if isinstance(modalities, dict) else None
    words = str(named or _USUAL_MODALITIES.get(int(code), code)).split()
    return re.sub(r"^(T\d)w$", r"\1", words[0] if words else code)


def modalities_problem(modalities: object) -> str | None:
    """What keeps a value from being a dataset JSON's ``modality``, None if nothing does."""
    if modalities is None:
        return None
    if not isinstance(modalities, dict):
        return f"must be an object of names by codes, it is {_short(modalities)}"
    for name in modalities.values():
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > 100:
            return f"must name each modality by a text, it has {_short(name)}"
    return None


def find_lists(folder: Path, pairs: Sequence[str], named: Sequence[Path] | None) -> dict[str, Group]:
    """The group of each pair that is in a list.

    Args:
        folder: of the dataset JSON.
        pairs: the data set's, by their file names: ``LUMIRMRI_0100_0000 LUMIRMRI_0101_0001``, fixed first.
        named: files, or folders that hold them, which decide alone; None: those beside the dataset JSON if they name
            one of its pairs, else the challenge's own lists if the data set holds all or nothing but their pairs.

    Returns:
        by the same names.

    Raises:
        InputError: a file is unreadable or no such list, or a pair is in two of them.
    """
    if named is not None:
        return read_lists([file for path in named for file in _files(path.expanduser())])
    beside = read_lists(sorted(folder.glob(CONFIGS)))
    if not beside.keys().isdisjoint(pairs):
        return beside
    known = challenge_lists()
    return known if known.keys() <= set(pairs) or known.keys() >= set(pairs) else {}


@cache
def challenge_lists() -> dict[str, Group]:
    """The 36 validation pairs of LUMIR 2025, as the evaluator's four files list them."""
    segmented = ("ndv", "dsc", "hd95")
    lists = (
        (Group("in-domain", segmented, _CHALLENGE_LABELS), range(3455, 3464), -1, "0000"),
        (Group("landmarks", ("ndv", "tre")), range(3485, 3494), -1, "0000"),
        (Group("high-field", segmented, _CHALLENGE_LABELS), range(4015, 4024), -1, "0000"),
        (Group("multi-modal", segmented, _CHALLENGE_LABELS), range(4024, 4033), 9, "0001"),
    )
    return {
        f"LUMIRMRI_{fixed}_0000 LUMIRMRI_{fixed + step}_{modality}": group
        for group, subjects, step, modality in lists
        for fixed in subjects
    }


def read_lists(files: Sequence[Path]) -> dict[str, Group]:
    """What the evaluator's config files say, by the pairs' file names; see :func:`find_lists`.

    Raises:
        InputError: a file is unreadable or no such list, or a pair is in two of them.
    """
    groups: dict[str, Group] = {}
    source: dict[str, Path] = {}
    for file in files:
        group, pairs = _read_list(file)
        for pair in pairs:
            if pair in groups:
                where = "twice" if source[pair] == file else f"in {source[pair].name}, too; name the lists by --groups"
                raise InputError(f"{file}: the pair {pair} is listed {where}")
            groups[pair], source[pair] = group, file
    return groups


def load_json(file: Path, wanted: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: it is unreadable or holds something else; ``wanted`` says what it should be.
    """
    return read_json(file, wanted, "give another file")


def labels_problem(labels: object) -> str | None:
    """What keeps a list (or an object's keys) from being labels, None if nothing does."""
    if not isinstance(labels, (list, dict)):
        return f"must be a list of labels or an object of their names, it is {_short(labels)}"
    for label in labels:
        whole = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not whole and not (isinstance(label, str) and label.isascii() and label.isdigit()):
            return f"must hold whole numbers from 0 on, it has {_short(label)}"
        if len(str(label)) > 10 or int(label) > _LARGEST_LABEL:
            return f"must hold whole numbers up to {_LARGEST_LABEL}, it has {_short(label)}"
    if isinstance(labels, dict) and not all(isinstance(name, str | int | float) for name in labels.values()):
        return "must name its labels by text"
    values = [int(label) for label in labels]
    return "names a label twice" if len(set(values)) < len(values) else None


def name_problem(name: object) -> str | None:
    """What keeps a value from being a group's name, None if nothing does."""
    if not isinstance(name, str):
        return f"the group {_short(name)} is not a string"
    if name in _RESERVED:
        return f"the group must not be called {name!r}"
    if not _GROUP_NAME.fullmatch(name) or name != name.strip():
        return f"the group {_short(name)} must be 1 to 40 letters, digits, spaces or signs of .+()&-_"
    return None


def ordered(names: Iterable[str]) -> list[str]:
    """Names of groups: the challenge's first, in the order of the paper's columns, :data:`NO_GROUP` last."""
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(dict.fromkeys(names), key=lambda name: (name == NO_GROUP, places.get(name, len(ORDER)), name))


def group_names(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The groups that pairs have, in order.

    Args:
        pairs: of each its group, empty if it has none, and its contrasts.

    Raises:
        InputError: a group is called like the contrasts of other pairs, so that the two could not be distinguished.
    """
    listed = list(pairs)
    names = ordered(name for name, _ in listed if name)
    mixed = sorted(set(names) & {contrasts for _, contrasts in listed})
    if mixed:
        raise InputError(f"the group {mixed[0]!r} is called like the contrasts of some pairs; give it another name")
    return tuple(names)


def other_labelling(values: Iterable[int], where: str) -> str:
    """What to say of label maps that hold other values than the challenge scores; ``where`` others can be named."""
    listed = sorted(values)
    shown = ", ".join(map(str, listed[:8])) + (", ..." if len(listed) > 8 else "")
    return (
        f"the label maps hold values that are none of the challenge's labels and are not scored ({shown}): if they "
        f"follow another labelling, as LUMIR's coarse ones do, name theirs by {where}"
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(CONFIGS))
    if not files:
        raise InputError(f"{path}: holds no {CONFIGS}; name the files of the challenge's evaluator")
    return files


def _read_list(file: Path) -> tuple[Group, list[str]]:
    """A config's group and its pairs."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a {CONFIGS} of the challenge's evaluator")
    wanted = "an evaluation config, which holds one object with `eval_pairs` and `evaluation_methods`"
    content = load_json(file, wanted)
    pairs, methods = content.get("eval_pairs"), content.get("evaluation_methods")
    if not isinstance(pairs, list) or not isinstance(methods, list) or not pairs:
        raise InputError(f"{file}: not {wanted}")
    match = _CONFIG_NAME.fullmatch(file.name)
    name = match["name"] if match else file.stem
    name = _CONFIG_GROUPS.get(name, name)
    problem = name_problem(name)
    if problem:
        raise InputError(f"{file}: {problem}; it comes from the file's name, rename the file")
    metrics, labels = [], None
    for method in methods:
        metric = method.get("metric") if isinstance(method, dict) else None
        if not isinstance(metric, str):
            raise InputError(f"{file}: each of `evaluation_methods` must name a `metric`, one is {_short(method)}")
        if metric not in _METRICS:
            continue
        metrics.append(_METRICS[metric])
        if "labels" in method:
            problem = labels_problem(method["labels"])
            if problem:
                raise InputError(f"{file}: the `labels` of {metric} {problem[:1].lower()}{problem[1:]}")
            stated = tuple(int(label) for label in method["labels"])
            if labels not in (None, stated):
                raise InputError(f"{file}: dice and hd95 have different `labels`; give both the same")
            labels = stated
    if not metrics:
        raise InputError(f"{file}: `evaluation_methods` has none of {', '.join(_METRICS)}")
    return Group(name, tuple(metrics), labels or None), [_pair(file, entry) for entry in pairs]


def _pair(file: Path, entry: object) -> str:
    images = [entry.get(role) if isinstance(entry, dict) else None for role in ("fixed", "moving")]
    names = [Path(image).name if isinstance(image, str) else "" for image in images]
    if not all(FILE_NAME.fullmatch(name) for name in names):
        raise InputError(
            f"{file}: {_short(entry)} in `eval_pairs` is no pair of a `fixed` and a `moving` image named like "
            "LUMIRMRI_<subject>_<modality>.nii.gz"
        )
    return pair_key(*names)


def pair_key(fixed: str, moving: str) -> str:
    """A pair's file names without their endings, which may differ from list to list."""
    return " ".join(re.sub(r"\.nii(\.gz)?$", "", name) for name in (fixed, moving))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
