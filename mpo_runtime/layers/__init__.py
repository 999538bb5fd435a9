"""Layers: a linear layer as a sum of terms, how its cores are contracted, and RoPE frequencies."""
