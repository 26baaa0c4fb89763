"""An average of the weights over the steps of a training, which is what a checkpoint hands on."""

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from sitreg_lumir.errors import InputError


class WeightAverage(WeightAveraging):
    """An exponential moving average of the weights after each optimiser step.

    A checkpoint's ``state_dict``, which is what export, predict and validation take, holds the average. The weights
    that training goes on with lie beside it, so that a resumed run takes the same steps as one that never stopped.
    A checkpoint without an average starts one.

    Args:
        decay: share of the average that stays at each step, once ``1 / (1 - decay)`` steps are done; before, the
            average forgets its beginning faster: ``(1 + n) / (10 + n)`` stays at its n-th step.

    Examples:
        >>> average = sitreg_lumir.WeightAverage(decay=0.999)
        >>> average.next_average(torch.zeros(()), torch.ones(()), count=0)
        tensor(0.9000)

    Source: Polyak & Juditsky, Acceleration of stochastic approximation by averaging, 1992.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"WeightAverage: decay must be 0 or more and below 1, got {decay}")
        self.decay = decay
        super().__init__(avg_fn=self.next_average)

    def next_average(self, average: Tensor, weights: Tensor, count: Tensor | int) -> Tensor:
        """One parameter's average after the next step, from that of ``count`` steps before."""
        kept = min(self.decay, (1 + float(count)) / (10 + float(count)))
        return average + (1 - kept) * (weights - average)
