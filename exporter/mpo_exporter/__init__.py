"""Compresses decoder models into `.mpo` files."""
