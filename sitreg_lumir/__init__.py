"""SITReg on MIND features: symmetric, inverse consistent, diffeomorphic brain MRI registration."""

__version__ = "0.1.0"
