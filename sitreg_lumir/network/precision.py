"""How exact float32 is: convolutions and matrix products without TF32, in every process and on every GPU."""

import warnings

import torch


def turn_tf32_off() -> None:
    """Makes float32 convolutions and matrix products keep float32's 24 bits; PyTorch's convolutions use 11 by default.

    For the whole process, since that is how PyTorch keeps it; without effect on a CPU. The flags set here are those
    that every supported version of PyTorch, and every library that looks at them, reads without an error: after a mix
    of them with the newer ``fp32_precision`` reading fails.
    """
    with warnings.catch_warnings():  # some versions of PyTorch announce that the newer flags will replace these
        warnings.filterwarnings("ignore", message=".*TF32.*")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def tf32_is_on() -> bool:
    """Whether float32 convolutions or matrix products on a GPU may be rounded to TF32 in this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32.*")
        try:
            return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        except RuntimeError:  # other code has set the newer flags
            return True
