"""The maths of deformations; knows only tensors."""
