"""Layers: a linear layer as a sum of terms, and how its cores are contracted."""
