"""The learning rate as a function of the epoch, so that resuming has nothing to restore."""

import math
from collections.abc import Mapping

from sitreg_lumir.errors import InputError


def learning_rate(rates: Mapping[int, float], epoch: float, epochs: int | None, final_share: float = 1.0) -> float:
    """The learning rate at an epoch with fraction.

    Args:
        rates: first epoch -> rate from there on.
        epoch: how much of the training is done.
        epochs: of the whole training.
        final_share: of the rate, at the end; below 1, it falls along half a cosine.

    Raises:
        InputError: the rate is to fall, and nobody says over how many epochs.

    Source: Loshchilov & Hutter, SGDR, ICLR 2017; one period.
    """
    rate = rates[max(first for first in rates if first <= epoch)]
    if final_share == 1:
        return rate
    if epochs is None or epochs < 1:
        raise InputError("--model.final_rate_share: the rate falls over --trainer.max_epochs, which must be given")
    done = min(epoch / epochs, 1.0)
    return rate * (final_share + (1 - final_share) * (1 + math.cos(math.pi * done)) / 2)


def check_share(final_share: float) -> None:
    """Refuses a share of the learning rate that makes no sense.

    Raises:
        InputError: not above 0, or above 1.
    """
    if not 0 < final_share <= 1:
        raise InputError(f"--model.final_rate_share {final_share}: must be above 0 and at most 1")
