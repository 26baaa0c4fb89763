"""Weights of the official SITReg implementation: its parameter names, and networks from its state dicts.

Its training code writes ``{"registration_network": state dict}`` into ``model_epoch_030.pt``, the optimiser's state
into a file of its own, and its settings into ``training_config.json`` beside them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.bounded import read_bytes
from sitreg_lumir.io.json_file import read_json
from sitreg_lumir.network.archive import load_archive
from sitreg_lumir.network.sitreg import SITReg, shapes_of
from sitreg_lumir.network.weights import Member, ModelCard

_EXTRACTOR, _HEADS, _AFFINE = "_feature_extractor", "_not_none_dense_extration_networks", "_affine_extraction_network"
_BLOCKS = f"{_EXTRACTOR}.downsampling_blocks"
_OFFICIAL = re.compile(rf"((?:.*\.)?)(?:{_EXTRACTOR}|{_HEADS}|{_AFFINE})\.")
_LUMIR_GROUPS = 4
_LARGEST = 1 << 36  # bytes

_CONV = r"(convolutions\.\d+)\.(weight|bias)"
_OFFICIAL_NAMES = (  # (our name, official name), both as regular expression and replacement
    (r"encoder\.projection\.(\w+)", r"_feature_extractor.initial_projection.\1"),
    (rf"encoder\.blocks\.0\.{_CONV}", r"_feature_extractor.initial_convs.\1.conv.\2"),
    (r"encoder\.blocks\.0\.(normalizers\.\d+\.\w+)", r"_feature_extractor.initial_convs.\1"),
    (
        r"encoder\.downsamplings\.(\d+)\.convolution\.(\w+)",
        r"_feature_extractor.downsampling_blocks.\1.downsampling.conv.\2",
    ),
    (
        r"encoder\.downsamplings\.(\d+)\.projection\.(\w+)",
        r"_feature_extractor.downsampling_blocks.\1.projection.conv.\2",
    ),
    (rf"heads\.(\d+)\.block\.{_CONV}", r"_not_none_dense_extration_networks.\1.convolutions.\2.conv.\3"),
    (
        r"heads\.(\d+)\.block\.(normalizers\.\d+\.\w+)",
        r"_not_none_dense_extration_networks.\1.convolutions.\2",
    ),
    (r"heads\.(\d+)\.final\.(\w+)", r"_not_none_dense_extration_networks.\1.final_convolution.conv.\2"),
)


def official_name(name: str) -> str:
    """The name that a parameter of :class:`SITReg` has in the official implementation's state dicts."""
    moved = re.match(r"encoder\.blocks\.([1-9]\d*)\.(convolutions|normalizers)\.(\d+)\.(\w+)", name)
    if moved:  # level l's block belongs to the official downsampling block l - 1
        level, kind, index, leaf = moved.groups()
        inner = f"{index}.conv.{leaf}" if kind == "convolutions" else f"{index}.{leaf}"
        return f"_feature_extractor.downsampling_blocks.{int(level) - 1}.conv.{kind}.{inner}"
    for pattern, replacement in _OFFICIAL_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"{name} is not a parameter of SITReg")


@dataclass(frozen=True, eq=False)
class OfficialWeights:
    """What a file of the official implementation gives.

    Attributes:
        network: float32, on the CPU.
        groups_from: a sentence on how the number of groups was chosen.
        shape: of the grid, where ``training_config.json`` states it.
    """

    network: SITReg
    groups_from: str
    shape: list[int] | None


def network_from_official(state: Mapping[str, Tensor], groups: int = 4, bound_multiplier: float = 0.99) -> SITReg:
    """A network from a state dict with the official parameter names; sizes are read from the tensors.

    Empty buffers are left out: the official implementation's coordinate systems register some.

    Args:
        state: tensors by official names.
        groups: of the group normalisations; the tensors do not show it.
        bound_multiplier: share of the control point bound that is used; the tensors do not show it.

    Raises:
        ValueError: parameters are missing, unknown or of another shape; or it is an architecture that this package
            does not have: an affine stage, levels without a head, blocks that differ in their convolutions, 2-D.
    """
    state = {name: tensor for name, tensor in state.items() if tensor.numel() > 0}
    sizes = _sizes(state)
    if groups < 1:
        raise ValueError(f"groups={groups}: must be 1 or more")
    try:
        shapes = shapes_of(**sizes, groups=groups, bound_multiplier=bound_multiplier)
    except ValueError as error:
        raise ValueError(f"groups={groups} do not go with features {sizes['features']}: {error}") from None
    ours = {official_name(name): shape for name, shape in shapes.items()}
    unknown, missing = sorted(set(state) - set(ours)), sorted(set(ours) - set(state))
    if unknown or missing:
        raise ValueError(f"not a state dict of the official SITReg:{_listed('missing', missing, unknown)}")
    for name, shape in ours.items():
        if shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, but {tuple(shape)} was expected")
        if not state[name].is_floating_point():
            raise ValueError(f"{name} holds {state[name].dtype} values, not floating-point ones")
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{name} holds values that are not finite")
    network = SITReg(**sizes, groups=groups, bound_multiplier=bound_multiplier)
    network.to(next(iter(state.values())).dtype)
    network.load_state_dict({name: state[official_name(name)] for name in network.state_dict()})
    return network


def _listed(first: str, missing: Sequence[str], unknown: Sequence[str]) -> str:
    words = ""
    for word, names in ((first, missing), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            words += f" {word} {', '.join(names[:3])}{more};"
    return words.rstrip(";")


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of :class:`SITReg`, from names and shapes."""
    affine = next((name for name in state if name.startswith(f"{_AFFINE}.")), None)
    if affine is not None:
        raise ValueError(f"it has an affine stage ({affine}), which this package does not have")

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"not a state dict of the official SITReg: {name} is missing")
        if state[name].ndim != 5:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, but a network of volumes has five axes there"
            )
        return state[name].shape

    def count(prefix: str) -> int:
        """How many numbered entries a module list has."""
        numbers = {int(m[1]) for name in state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
        if numbers and numbers != set(range(len(numbers))):
            gap = min(set(range(max(numbers) + 1)) - numbers)
            raise ValueError(f"not a state dict of the official SITReg: {prefix}.{gap} is missing")
        return len(numbers)

    features, channels = shape(f"{_EXTRACTOR}.initial_projection.weight")[:2]
    levels, heads = 1 + count(_BLOCKS), count(_HEADS)
    if heads != levels:
        raise ValueError(
            f"it has {levels} levels of features, but {heads} heads ({_HEADS}); this package needs one for each"
        )
    blocks = [f"{_EXTRACTOR}.initial_convs", *(f"{_BLOCKS}.{level}.conv" for level in range(levels - 1))]
    blocks += [f"{_HEADS}.{level}.convolutions" for level in range(heads)]
    convolutions = {block: count(f"{block}.convolutions") for block in blocks}
    if len(set(convolutions.values())) > 1:
        least, most = (choose(convolutions, key=convolutions.__getitem__) for choose in (min, max))
        raise ValueError(
            f"{least} has {convolutions[least]} convolutions and {most} {convolutions[most]}; "
            "this package has as many in every block"
        )
    return {
        "in_channels": channels,
        "features": [features, *(shape(f"{_BLOCKS}.{level}.projection.conv.weight")[0] for level in range(levels - 1))],
        "head_features": [shape(f"{_HEADS}.{level}.final_convolution.conv.weight")[1] for level in range(heads)],
        "convolutions": convolutions[blocks[0]],
    }


def read_official(path: str | Path, groups: int | None = None) -> OfficialWeights:
    """The network in a file that the official implementation saved: its training file, or a bare state dict.

    Names may start with a common prefix such as ``module.``.

    Args:
        path: read with ``weights_only=True``; or ``.safetensors``.
        groups: of the group normalisations, which the tensors do not show. By default what ``training_config.json``
            beside the file says, else 4, as in the authors' LUMIR configuration.

    Raises:
        InputError: missing, damaged, no such state dict or several, or of an architecture that this package lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = load(read_bytes(path, _LARGEST, "weights")) if path.suffix == ".safetensors" else load_archive(path)
    except InputError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds for damaged or foreign files
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: cannot be read as weights ({reason})") from None
    settings = _training_config(path)
    stated, groups_from = settings.get("groups"), "as --groups says"
    if groups is None:
        groups = stated or _LUMIR_GROUPS
        groups_from = "as training_config.json says" if stated else "as in the LUMIR configuration (the file is silent)"
    try:
        state = _only_state(content)
        network = network_from_official(state, groups, settings.get("bound_multiplier", 0.99)).float()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:400]}") from None
    features = settings.get("features")
    if features is not None and features != network.architecture["features"]:
        raise InputError(
            f"{path.with_name('training_config.json')}: says features {features}, but {path.name} has "
            f"{network.architecture['features']}; the file belongs to another training"
        )
    return OfficialWeights(network.eval(), f"{groups} groups, {groups_from}", settings.get("shape"))


def import_official(
    path: str | Path, shape: Sequence[int], affine: Sequence[Sequence[float]], groups: int | None = None
) -> Member:
    """A member from a file that the official implementation saved; see :func:`read_official`.

    With 6 input channels it is taken to see MIND features as this package computes them.

    Args:
        path: of the file.
        shape: of the grid the network was trained on; the file does not say it.
        affine: 4x4, voxel to world (RAS, mm) of that grid.
        groups: of the group normalisations.

    Raises:
        InputError: missing, damaged, not such a state dict, or trained on another input or grid.
    """
    path = Path(path)
    official = read_official(path, groups)
    channels = official.network.architecture["in_channels"]
    if channels not in (1, 6):
        raise InputError(f"{path}: has {channels} input channels; known are 1 (intensities) and 6 (MIND)")
    if official.shape is not None and official.shape != list(shape):
        raise InputError(
            f"{path.with_name('training_config.json')}: the network was trained on {tuple(official.shape)}, but the "
            f"data set's volumes are {tuple(shape)}; name the data set that it was trained on"
        )
    mind = {"sigma": 0.5, "radius": 2} if channels == 6 else None
    rows = [[float(value) for value in row] for row in affine]
    training = {"imported": path.name, "groups": official.groups_from}
    return Member(
        official.network, ModelCard(official.network.architecture, mind, list(shape), rows, training=training)
    ).eval()


def _only_state(content: Any) -> dict[str, Tensor]:
    """The one state dict with official names in a file's content, without a common prefix.

    Raises:
        ValueError: there is none, or several, or other tensors stand among its names.
    """
    states = _find_states(content, "")
    if len(states) > 1:
        raise ValueError(f"holds several models ({', '.join(sorted(states))}); save one of them alone")
    if not states:
        optimiser = isinstance(content, Mapping) and any(
            isinstance(value, Mapping) and "param_groups" in value for value in (content, *content.values())
        )
        hint = ": this is an optimiser's state; name the file of the model, model_epoch_..." if optimiser else ""
        raise ValueError(f"holds no state dict of the official SITReg{hint}")
    return next(iter(states.values()))


def _find_states(content: Any, place: str) -> dict[str, dict[str, Tensor]]:
    """State dicts with official names by where they stand, in a dictionary and those within it."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    prefixes = {match[1] for name in tensors if (match := _OFFICIAL.match(name))}
    states: dict[str, dict[str, Tensor]] = {}
    for prefix in prefixes:
        where = f"{place}{prefix}".rstrip(".") or "the file itself"
        states[where] = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    stray = [name for name, value in tensors.items() if value.numel() and not name.startswith(tuple(prefixes))]
    if len(prefixes) == 1 and stray:
        raise ValueError(f"holds tensors that do not belong to the network: {', '.join(sorted(stray)[:3])}")
    for name, value in content.items():
        states.update(_find_states(value, f"{place}{name}."))
    return states


def _training_config(path: Path) -> dict[str, Any]:
    """What ``training_config.json`` beside a file says of the network beyond its tensors.

    Raises:
        InputError: the settings are such that this package has no such network.
    """
    file = path.with_name("training_config.json")
    if not file.is_file():
        return {}
    try:
        model = read_json(file, "the settings of a training", "fix it")["application"]["config"]["model"]
        normalizer, activation = model["normalizer"], model.get("activation", {"type": "ReLUFactory"})
        kinds = normalizer["type"], activation["type"]
        settings = {
            "groups": int(normalizer["args"]["n_groups"]) if kinds[0] == "GroupNormalizerFactory" else None,
            "bound_multiplier": float(model["max_control_point_multiplier"]),
            "shape": [int(size) for size in model["input_shape"]],
            "features": [int(count) for count in model["n_features_per_resolution"]],
        }
        factors = [float(factor) for factor in model["transformation_downsampling_factor"]]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(
            f"{file}: cannot be understood as the settings of {path.name} ({type(error).__name__}: {error}); fix it, "
            "or move the weights to a folder of their own"
        ) from None
    for name, value, wanted in (
        ("normalizer", kinds[0], "GroupNormalizerFactory"),
        ("activation", kinds[1], "ReLUFactory"),
        ("transformation_downsampling_factor", factors, [1.0] * 3),
    ):
        if value != wanted:
            raise InputError(f"{file}: {name} is {value}; this package has {wanted} only")
    return settings
