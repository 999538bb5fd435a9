"""Writes `.mpo` files in the formats that other programs read."""
