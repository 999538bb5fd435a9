"""Measurements of a model's layers and of this machine, and their cache."""
