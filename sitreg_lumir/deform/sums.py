"""Sums over volumes that are right at any size and do not depend on the number of threads.

PyTorch on a CPU cuts a sum of all values into as many parts as there are threads; a sum along an axis it does not cut.
"""

import torch
from torch import Tensor

_SHORT = 4096  # values that one thread adds up


def exact_sum(values: Tensor) -> Tensor:
    """The sum of all values.

    Args:
        values: any shape and real type, masks included.

    Returns:
        a scalar, float64.
    """
    while values.ndim > 1:
        values = values.sum(dim=-1, dtype=torch.float64)
    if len(values) > _SHORT:
        whole = len(values) // _SHORT * _SHORT
        return exact_sum(values[:whole].view(-1, _SHORT)) + values[whole:].sum(dtype=torch.float64)
    return values.sum(dtype=torch.float64)


def exact_mean(values: Tensor) -> Tensor:
    """The mean of all values, a scalar, float64; NaN where there are none."""
    return exact_sum(values) / values.numel()
