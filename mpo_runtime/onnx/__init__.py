"""ONNX: writes a model as a graph for ONNX Runtime, and runs such a folder."""
