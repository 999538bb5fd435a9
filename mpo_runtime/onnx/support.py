"""What the installed ONNX Runtime can run, by its version."""

from __future__ import annotations

from importlib.util import find_spec

from mpo_formats import ConfigError, ModelSpec, Quantized
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.onnx.integers import container
from mpo_runtime.onnx.manifest import Dtype

Version = tuple[int, ...]
# The first version whose CPU kernels run an operator with so many bits, found by running each from 1.20 on.
PRODUCTS: dict[tuple[int, Dtype], Version] = {
    (4, "fp32"): (1, 20),
    (4, "fp16"): (1, 20),
    (8, "fp32"): (1, 22),
    (8, "fp16"): (1, 22),
    (2, "fp32"): (1, 24),
    (2, "fp16"): (1, 28),
}
LOOKUPS: dict[int, Version] = {4: (1, 23), 8: (1, 23), 2: (1, 27)}


def require_packages(*names: str, what: str) -> None:
    """Raises ConfigError where one of these packages is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what}: needs {' and '.join(missing)}; pip install 'mpo-runtime[onnx]'")


def installed() -> Version:
    """The version of the installed runtime."""
    import onnxruntime

    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


def text_of(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


def lookup_bits() -> frozenset[int]:
    """The bit widths in which the installed runtime looks up rows of integer matrices."""
    found = installed()
    return frozenset(bits for bits, since in LOOKUPS.items() if found >= since)


def check_runtime(spec: ModelSpec, level: int, dtype: Dtype) -> None:
    """Checks that the installed runtime multiplies with the containers of every integer layer.

    Raises:
        ConfigError: naming the layer, the operator, its bits and the version that has it.
    """
    found = installed()
    for layer in spec.linears:
        if layer.name == EMBEDDING and not spec.architecture.tie_word_embeddings:
            continue  # its rows are only looked up, from a float table where the runtime cannot do it
        for term in layer.terms:
            if isinstance(term, Quantized):
                bits = container(term.bits, term.group, level)
                since = PRODUCTS[bits, dtype]
                if found < since:
                    raise ConfigError(
                        f"{layer.name}: MatMulNBits with {bits} bits in {dtype} needs onnxruntime {text_of(since)}, "
                        f"{text_of(found)} is installed; update it, or use --accuracy-level 0, which needs 4 bits only"
                    )
