"""Backends: complete implementations of the op set."""
