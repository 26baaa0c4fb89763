"""The final epochs: callbacks that add the NDV penalty and the group consistency to a module's loss."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.lightning_internals import datamodule_of
from sitreg_lumir.errors import InputError
from sitreg_lumir.losses import group_consistency, ndv_sum
from sitreg_lumir.train.registration import RegistrationModule
from sitreg_lumir.train.terms import LossTerm, PairOutputs


class NdvPenalty(Callback):
    """Penalises the volume that the last fields fold, in both directions, from ``start_epoch`` on.

    Args:
        start_epoch: first epoch with the penalty.
        weight: of the folded volume, a sum over voxels. On a 2 mm grid a voxel sum has 1/8 of the terms of 1 mm: use
            8e-5 there.

    Examples:
        >>> penalty = sitreg_lumir.NdvPenalty(start_epoch=30)
        >>> penalty.weight_at(29.9, 0), penalty.weight_at(30.0, 0)
        (0.0, 1e-05)

    Source: weight from SITReg's public LUMIR configuration.
    """

    def __init__(self, start_epoch: int = 30, weight: float = 1e-5) -> None:
        if start_epoch < 0 or weight < 0:
            raise InputError(f"NdvPenalty: start_epoch and weight must not be negative, got {start_epoch} and {weight}")
        self.start_epoch = start_epoch
        self.weight = weight

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the term to the module."""
        add_term(pl_module, LossTerm("ndv_sum", "pair", self.weight_at, self.value))

    def weight_at(self, epoch: float, step: int) -> float:
        """The weight at an epoch with fraction."""
        return self.weight if epoch >= self.start_epoch else 0.0

    @staticmethod
    def value(outputs: PairOutputs) -> Tensor:
        """Folded volume of the last fields, mean of both directions and of the pairs, voxels^3."""
        last = outputs.stages[-1]
        return (ndv_sum(last.disp) + ndv_sum(last.disp_inv)) / (2 * len(last.disp))


class GroupConsistency(Callback):
    """Trains on triplets from ``start_epoch`` on: the maps around a cycle of three images should be the identity.

    Args:
        start_epoch: first epoch of triplets.
        weight: of the squared cycle error, in units of half the longest side of the field of view.
        ramp_epochs: over which the weight grows from 0, linearly.
        learning_rate: of these epochs; None keeps the module's.
        triplets_per_epoch: drawn in each of these epochs; one is one optimiser step (of three processes, or one).

    Examples:
        >>> consistency = sitreg_lumir.GroupConsistency(start_epoch=30)
        >>> consistency.weight_at(29.9, 0), consistency.weight_at(30.5, 0), consistency.weight_at(44.0, 0)
        (0.0, 20.0, 40.0)

    Source: Honkamaa & Marttinen 2025; numbers from SITReg's public LUMIR configuration.
    """

    def __init__(
        self,
        start_epoch: int = 30,
        weight: float = 40.0,
        ramp_epochs: float = 1.0,
        learning_rate: float | None = 1e-4,
        triplets_per_epoch: int = 2000,
    ) -> None:
        if start_epoch < 0 or weight < 0 or ramp_epochs < 0 or triplets_per_epoch < 1:
            raise InputError(
                "GroupConsistency: start_epoch, weight and ramp_epochs must not be negative, and triplets_per_epoch "
                f"positive, got {start_epoch}, {weight}, {ramp_epochs} and {triplets_per_epoch}"
            )
        self.start_epoch = start_epoch
        self.weight = weight
        self.ramp_epochs = ramp_epochs
        self.learning_rate = learning_rate
        self.triplets_per_epoch = triplets_per_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the term to the module."""
        add_term(pl_module, LossTerm("group_consistency", "triplet", self.weight_at, self.value))
        assert isinstance(pl_module, RegistrationModule)
        if self.learning_rate is not None:
            pl_module.learning_rates[self.start_epoch] = self.learning_rate
        if stage == "fit":
            self.announce(datamodule_of(trainer))

    def announce(self, data: Any) -> None:
        """Makes the data hand out triplets from ``start_epoch`` on."""
        if isinstance(data, LumirDataModule):
            data.use_triplets(self.start_epoch, self.triplets_per_epoch)

    def weight_at(self, epoch: float, step: int) -> float:
        """The weight at an epoch with fraction."""
        done = epoch - self.start_epoch
        if done < 0:
            return 0.0
        return self.weight * (min(done / self.ramp_epochs, 1.0) if self.ramp_epochs else 1.0)

    @staticmethod
    def value(disps: list[Tensor], disps_inv: list[Tensor], masks: list[Tensor]) -> Tensor:
        """:func:`~sitreg_lumir.losses.group_consistency` of the three pairs' last fields."""
        return group_consistency(disps, disps_inv, masks)


def add_term(module: LightningModule, term: LossTerm) -> None:
    """Gives a module one more loss term, replacing one of the same name.

    Examples:
        >>> module = sitreg_lumir.RawRegistration(features=[4, 4], head_features=[4, 4])
        >>> term = sitreg_lumir.LossTerm("mean", "pair", lambda epoch, step: 1.0, lambda outputs: outputs.fixed.mean())
        >>> sitreg_lumir.add_term(module, term)
        >>> [term.name for term in module.terms]
        ['lncc', 'diffusion', 'earlier_stages', 'mean']
    """
    if not isinstance(module, RegistrationModule):
        raise InputError(f"{term.name} needs a RegistrationModule, got {type(module).__name__}")
    module.terms = [existing for existing in module.terms if existing.name != term.name] + [term]
