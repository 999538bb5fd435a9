"""Quantising a matrix: to nearest (rounding.py), or error-compensated (gptq.py) and improved by descent (descent.py)."""
