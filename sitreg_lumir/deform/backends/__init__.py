"""What computes the operations on deformations: plain torch, compiled CPU loops, or Triton kernels on a GPU."""

from sitreg_lumir.deform.backends.choice import BACKENDS as BACKENDS
from sitreg_lumir.deform.backends.choice import backend_of as backend_of
from sitreg_lumir.deform.backends.choice import compiled_on_cpu as compiled_on_cpu
from sitreg_lumir.deform.backends.choice import use_backend as use_backend
from sitreg_lumir.deform.backends.interface import Backend as Backend
