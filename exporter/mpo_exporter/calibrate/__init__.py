"""Calibration: windows of text, second moments of the activations, Fisher information of the outputs."""
