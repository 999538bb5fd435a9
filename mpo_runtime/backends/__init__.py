"""Backends: complete implementations of the op set (ops.py)."""
