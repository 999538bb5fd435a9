"""The GPU backend: the op set with Triton kernels where they pay, and torch's for the rest."""

from mpo_runtime.backends.triton.ops import TritonOps

__all__ = ["TritonOps"]
