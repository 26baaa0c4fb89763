"""Whether predictions can do what a variant of the LightningModule does in training."""

from typing import Any

import torch
from torch import nn

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.input_transform import channels_of, describe
from sitreg_lumir.network.sitreg import SITReg


def checked_transform(
    module: nn.Module, base: type, network: nn.Module, transform: nn.Module | None
) -> dict[str, Any] | None:
    """What a module's card records of the input transform, once it is sure that no more than that has to be recorded.

    Args:
        module: the variant.
        base: the class whose treatment of images predictions know.
        network: the variant's network.
        transform: its input transform, None for intensities.

    Raises:
        InputError: the variant does something with images, or has a network, that no card can hold.
    """
    name = type(module).__name__
    for method in ("inputs", "clean", "forward"):
        own = getattr(getattr(module, method), "__func__", None)  # Lightning sets the bound method on the module itself
        if own is not getattr(base, method) or method in module._modules:
            raise InputError(
                f"{name} overrides {method}(), which predictions do not know: write an nn.Module with the attribute "
                "`channels` that does it, and pass it as input_transform= to RegistrationModule"
            )
    if "mind" in module._modules:
        raise InputError(f"{name} sets self.mind, which nothing uses: set self.input_transform")
    if type(network) is not SITReg or not _is_plain(network):
        raise InputError(
            f"{name} has another network than SITReg with the sizes it states, which predictions do not know: set "
            "its sizes, or work on its input_transform, the loss terms and the views"
        )
    channels, expected = channels_of(transform), network.architecture["in_channels"]
    if channels != expected:
        kind = "the intensities have" if transform is None else f"{type(transform).__name__} gives"
        raise InputError(
            f"{name}: {kind} {channels} channel(s), but the network takes in_channels={expected}; pass the transform "
            "as input_transform= and leave in_channels out"
        )
    return describe(transform)


def _is_plain(network: SITReg) -> bool:
    """Whether a network has the parts that its sizes say, and no others."""
    sizes: dict[str, Any] = network.architecture
    with torch.device("meta"):
        known = SITReg(**sizes)
    kinds = (
        [(name, type(part)) for name, part in module_network.named_modules()] for module_network in (known, network)
    )
    return next(kinds) == next(kinds)
