"""Weights of the official SITReg implementation: its parameter names, and networks from its state dicts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import Member, ModelCard

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


def network_from_official(state: Mapping[str, Tensor], groups: int = 4, bound_multiplier: float = 0.99) -> SITReg:
    """A network from a state dict with the official parameter names; sizes are read from the tensors.

    Raises:
        ValueError: parameters are missing, unknown or of another shape.
    """
    heads = "_not_none_dense_extration_networks"
    try:
        first = state["_feature_extractor.initial_projection.weight"]
        levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith(heads))
        convolutions = 1 + max(
            int(key.split(".")[3]) for key in state if key.startswith("_feature_extractor.initial_convs.convolutions.")
        )
        features = [first.shape[0]] + [
            state[f"_feature_extractor.downsampling_blocks.{level}.projection.conv.weight"].shape[0]
            for level in range(levels - 1)
        ]
        head_features = [state[f"{heads}.{level}.final_convolution.conv.weight"].shape[1] for level in range(levels)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a state dict of the official SITReg: {error} is missing") from None
    network = SITReg(
        in_channels=first.shape[1],
        features=features,
        head_features=head_features,
        convolutions=convolutions,
        groups=groups,
        bound_multiplier=bound_multiplier,
    ).to(first.dtype)
    ours = {name: official_name(name) for name in network.state_dict()}
    unknown = sorted(set(state) - set(ours.values()))
    missing = sorted(set(ours.values()) - set(state))
    if unknown or missing:
        raise ValueError(f"not a state dict of this SITReg: missing {missing[:3]}, unknown {unknown[:3]}")
    network.load_state_dict({name: state[official] for name, official in ours.items()})
    return network


def import_official(path: str | Path, shape: Sequence[int], affine: Sequence[Sequence[float]]) -> Member:
    """A member from a file that the official implementation saved: a state dict, or one inside a dictionary.

    With 6 input channels it is taken to see MIND features as this package computes them.

    Args:
        path: read with ``weights_only=True``.
        shape: of the grid the network was trained on; the file does not say it.
        affine: 4x4, voxel to world (RAS, mm) of that grid.

    Raises:
        InputError: missing, damaged, or not such a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or foreign files
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: cannot be read as weights ({reason})") from None
    state = _find_state(content)
    if state is None:
        raise InputError(f"{path}: holds no state dict of the official SITReg")
    try:
        network = network_from_official(state).float()
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    mind = {"sigma": 0.5, "radius": 2} if network.architecture["in_channels"] == 6 else None
    rows = [[float(value) for value in row] for row in affine]
    card = ModelCard(network.architecture, mind, list(shape), rows, training={"imported": path.name})
    return Member(network, card).eval()


def _find_state(content: Any) -> dict[str, Tensor] | None:
    """The tensors with official names, here or in a nested dictionary, without a common prefix."""
    if not isinstance(content, Mapping):
        return None
    marker = "_feature_extractor.initial_projection.weight"
    for key in content:
        if isinstance(key, str) and key.endswith(marker):
            prefix = key.removesuffix(marker)
            return {name.removeprefix(prefix): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    return next(filter(None, map(_find_state, content.values())), None)
