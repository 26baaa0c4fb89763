"""How far the members' own fields differ: where they do, the result is less certain."""

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.registration.model import Model
from sitreg_lumir.registration.pair import ModelPair


def check_members(model: Model) -> None:
    """Refuses a single network that cannot be run on mirrored images either.

    Raises:
        InputError: there is only one field to be had.
    """
    if len(_networks(model).networks) < 2:
        raise InputError(f"{model.files[0]}: `uncertainty` needs two members or more; name several, or leave it out")


def spread_of_members(model: Model, pair: ModelPair) -> NDArray[np.float32]:
    """Runs each member alone, on the images and on mirrored ones, and measures how far their fields differ.

    Args:
        model: one member or several.
        pair: the images.

    Returns:
        ``(X, Y, Z)``, voxels, model grid, on which the fixed image lies: root mean squared distance from the mean.
    """
    together = _networks(model)
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bfloat16")
    fixed, moving = pair.fixed.to(model.device), pair.moving.to(model.device)
    fields = []
    with torch.inference_mode(), half:
        for network in together.networks:
            (stage,) = Ensemble([network], together.input_transform).run(fixed=fixed, moving=moving, inverse=False)
            fields.append(stage.disp[0].float().cpu())
    stacked = torch.stack(fields)
    spread: NDArray[np.float32] = (stacked - stacked.mean(dim=0)).square().sum(dim=1).mean(dim=0).sqrt().numpy()
    return spread


def _networks(model: Model) -> Ensemble:
    try:
        return Ensemble.of(model.members, flip=True)
    except InputError:  # their grid has no mirror image
        return Ensemble.of(model.members)
