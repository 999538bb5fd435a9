"""Quantising a matrix, one method a file."""
