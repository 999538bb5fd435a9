"""What the fits know about a model's activations: windows of text, second moments, output gradients."""
