"""State dicts as the official implementation saves them."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from sitreg_lumir.network.official import official_name
from sitreg_lumir.network.sitreg import SITReg


def official_state(in_channels: int = 6, **sizes: Any) -> "OrderedDict[str, Tensor]":
    """A state dict with the empty buffers of its coordinate systems."""
    network = SITReg(in_channels, **{"features": (4, 8), "head_features": (4, 8), **sizes})
    for head in network.heads:
        torch.nn.init.normal_(head.final.weight, std=0.3)  # type: ignore[union-attr]
    return with_indicators({official_name(name): tensor for name, tensor in network.state_dict().items()})


def with_indicators(state: dict[str, Tensor]) -> "OrderedDict[str, Tensor]":
    levels = sum(name.endswith("final_convolution.conv.bias") for name in state)
    systems = ["_transformation_coordinate_system", "_image_coordinate_system"]
    systems += [f"_feature_coordinate_systems.{level}" for level in range(levels)]
    heads = [f"_not_none_dense_extration_networks.{level}" for level in range(levels)]
    systems += [f"{head}._{kind}_coordinate_system" for head in heads for kind in ("feature", "transformation")]
    empty = {f"{system}._indicator": torch.empty(0) for system in systems}
    return OrderedDict({**empty, **state})
