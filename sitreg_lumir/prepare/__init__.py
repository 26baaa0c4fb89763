"""Scans before registration: their place in the model's frame, their intensities, and raw heads made into brains."""
