"""Compiled CPU loops for the operations on deformations (numba)."""
