"""Fitting cores to a matrix, one method a file."""
