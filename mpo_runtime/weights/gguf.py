"""Reads a GGUF file of llama.cpp (architectures llama, granite, qwen2 and qwen3) as weights with Dense terms.

Tensors of the types F32, F16 and BF16 are views of the mapped file; all others are dequantised by the package `gguf` when
they are asked for. Of llama and granite, llama.cpp reorders the rows of the query and key projections, because it
rotates neighbouring elements of a head where Hugging Face's models rotate element j with element j + D/2; here they come in
Hugging Face's order. Config, tokenizer and chat template are made from the metadata.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpo_formats import CheckpointError, Dense, FileSpec, LinearSpec, ModelSpec, Provenance, VectorSpec
from mpo_formats.architecture import EMBEDDING, FINAL_NORM, HEAD
from mpo_formats.spec import FloatType
from mpo_runtime.text.gguf_tokenizer import tokenizer_files
from mpo_runtime.weights.gguf_config import REORDERED, ROPE_FACTORS, read_architecture, refuse_other_kinds
from mpo_runtime.weights.gguf_header import MAGIC, Entry, read_header

log = logging.getLogger(__name__)
SUFFIX = ".gguf"
# Type numbers of ggml that are stored as they are used.
PLAIN: dict[int, tuple[FloatType, Any]] = {0: ("f32", np.float32), 1: ("f16", np.float16), 30: ("bf16", np.uint16)}
NAMES = {EMBEDDING: "token_embd", HEAD: "output", FINAL_NORM: "output_norm"}
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Dequantised tensors come as f32, which is exact, of models of at most so many parameters; of larger ones as f16, as large
# as the unquantised model. On SmolLM2-135M the rounding to f16 adds a KL of 3e-6.
MOST_EXACT = 1 << 30
AT_ONCE = 1 << 22  # values that are dequantised at a time
F16_LIMIT = 65520.0  # from here on a value rounds to infinity


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file by its suffix or its first bytes."""
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class Gguf:
    """A GGUF file seen as weights with Dense terms; `folder` is the file itself, as a checkpoint's is its folder.

    Args:
        dequantised: what dequantised tensors come as; None for f32 up to MOST_EXACT parameters and f16 above.
        kept: bytes of dequantised tensors that are kept, the latest, for a caller that asks for each many times.

    Raises:
        CheckpointError: where the package `gguf` is missing, and for a damaged or split file, an unsupported version,
            architecture, tensor type or tokenizer, a missing tensor or one of another shape than the metadata demand.
    """

    def __init__(self, path: Path, *, dequantised: Literal["f32", "f16"] | None = None, kept: int = 0) -> None:
        self.folder = path
        self._room, self._kept = kept, dict[str, NDArray[Any]]()
        self._package = import_gguf(path)
        self._map = map_file(path)
        try:
            header = read_header(self._map, path)
            self._tensors = header.tensors
            refuse_other_kinds(header.metadata, path)
            self._check_tensors()
            self.architecture = read_architecture(header.metadata, self._tensors, self._read, path)
            # Whoever asks for no type runs the file as it is, and need not hear of the time that takes where that is short.
            self._slow = dequantised is None and self.architecture.parameters() > MOST_EXACT
            self._dequantised: Literal["f32", "f16"] = dequantised or ("f16" if self._slow else "f32")
            linears = tuple(self._linear(*size) for size in self.architecture.linear_sizes())
            vectors = tuple(self._vector(name, size) for name, size in self.architecture.vector_sizes())
            self._refuse_surplus(linears, vectors)
            self._files = tokenizer_files(header.metadata, self.architecture.vocab_size, str(path))
        except BaseException:
            self.close()
            raise
        files = tuple(FileSpec(name, len(content)) for name, content in self._files.items())
        self.spec = ModelSpec(self.architecture, linears, vectors, files, Provenance(path.name, None, "", "", {}, None))

    def _check_tensors(self) -> None:
        """Raises CheckpointError for tensors of a type that cannot be read, or that the file does not hold whole."""
        size, checked = len(self._map), set(PLAIN)
        for name, entry in self._tensors.items():
            block, length = self._block_size(name, entry.kind)
            if entry.kind not in checked:
                self._require_dequantiser(name, entry.kind, length)
                checked.add(entry.kind)
            if not entry.shape or entry.shape[-1] % block:
                raise CheckpointError(
                    f"{self.folder}: truncated or damaged GGUF file: {name} has shape {list(entry.shape)}, "
                    f"its type packs {block} columns at a time; download it again"
                )
            end = entry.begin + math.prod(entry.shape) // block * length
            if end > size:
                raise CheckpointError(
                    f"{self.folder}: truncated or damaged GGUF file: {name} ends at byte {end}, the file at {size}; "
                    "download it again"
                )

    def _block_size(self, name: str, kind: int) -> tuple[int, int]:
        """Elements and bytes of a block of a tensor type."""
        try:
            found: tuple[int, int] = self._package.GGML_QUANT_SIZES[self._package.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{self.folder}: {name} has the tensor type {kind}, which the installed package gguf does not know; "
                "pip install --upgrade gguf, or get the model in another type"
            ) from None
        return found

    def _require_dequantiser(self, name: str, kind: int, length: int) -> None:
        """Raises CheckpointError where the package cannot dequantise a type; tries it on one block of zeros."""
        known = self._package.GGMLQuantizationType(kind)
        try:
            self._package.dequantize(np.zeros((1, length), np.uint8), known)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.folder}: {name} has the type {known.name}, which the installed package gguf does not "
                "dequantise; pip install --upgrade gguf, or get the model in another type"
            ) from None

    def _find(self, name: str, shape: tuple[int, ...]) -> Entry:
        entry = self._tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; the file is incomplete, download it again")
        if entry.shape != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has shape {list(entry.shape)}, the metadata demand {list(shape)}; "
                "the file is damaged, download it again"
            )
        return entry

    def _linear(self, name: str, rows: int, columns: int, bias: bool) -> LinearSpec:
        weight = self._type(self._find(stored_name(f"{name}.weight"), (rows, columns)))
        bias_type = self._type(self._find(stored_name(f"{name}.bias"), (rows,))) if bias else None
        return LinearSpec(name, rows, columns, bias_type, (Dense(weight),))

    def _vector(self, name: str, size: int) -> VectorSpec:
        return VectorSpec(name, size, self._type(self._find(stored_name(f"{name}.weight"), (size,))))

    def _type(self, entry: Entry) -> FloatType:
        return PLAIN[entry.kind][0] if entry.kind in PLAIN else self._dequantised

    def _refuse_surplus(self, linears: tuple[LinearSpec, ...], vectors: tuple[VectorSpec, ...]) -> None:
        """A tensor that the forward pass would leave out means another architecture, and wrong text without a word."""
        known = {stored_name(f"{linear.name}.weight") for linear in linears}
        known |= {stored_name(f"{vector.name}.weight") for vector in vectors}
        known |= {stored_name(f"{linear.name}.bias") for linear in linears if linear.bias}
        surplus = sorted(self._tensors.keys() - known - {ROPE_FACTORS})
        if surplus:
            raise CheckpointError(
                f"{self.folder}: tensor {surplus[0]} has no place in a {self.architecture.model_type} model; "
                "give the model's Hugging Face folder if it is of a supported architecture"
            )

    def _read(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored, rows in llama.cpp's order: plain types as views, others as bytes [rows, bytes]."""
        entry = self._tensors[name]
        block, length = self._block_size(name, entry.kind)
        count = math.prod(entry.shape) // block * length
        raw = np.frombuffer(self._map, np.uint8, count, entry.begin)
        if entry.kind not in PLAIN:
            return raw.reshape(*entry.shape[:-1], entry.shape[-1] // block * length)
        kind = np.dtype(PLAIN[entry.kind][1])
        if entry.begin % kind.itemsize:  # possible where the file's alignment is below 4
            raw = raw.copy()
        shaped: NDArray[Any] = raw.view(kind).reshape(entry.shape)
        return shaped

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name: `<layer>.0.weight`, `<layer>.bias` or `<norm>.weight`; bf16 as uint16 bits.

        Raises:
            CheckpointError: where a value does not fit into f16.
        """
        stored = stored_name(name)
        if stored in self._kept:
            self._kept[stored] = self._kept.pop(stored)  # the latest
            return self._kept[stored]
        array, kind = self._read(stored), self._tensors[stored].kind
        heads = self._permuted_heads(name)
        if heads:
            array = to_half_split_rows(array, heads)
        return array if kind in PLAIN else self._keep(stored, self._dequantise(stored, array))

    def _keep(self, stored: str, values: NDArray[Any]) -> NDArray[Any]:
        """Keeps a tensor where there is room, in the place of those that were not asked for the longest."""
        if values.nbytes <= self._room:
            self._kept[stored] = values
            while sum(array.nbytes for array in self._kept.values()) > self._room:
                del self._kept[next(iter(self._kept))]
        return values

    def _dequantise(self, stored: str, raw: NDArray[np.uint8]) -> NDArray[Any]:
        """The values of a tensor from its bytes [rows, bytes]; some rows at a time, so that little memory is needed beside."""
        if self._slow:
            log.warning(
                "%s: is dequantised whenever it is opened, which takes minutes; export it once: mpo-export", self.folder
            )
            self._slow = False
        entry = self._tensors[stored]
        kind = self._package.GGMLQuantizationType(entry.kind)
        values = np.empty(entry.shape, np.float32 if self._dequantised == "f32" else np.float16)
        rows, packed = values.reshape(-1, entry.shape[-1]), raw.reshape(-1, raw.shape[-1])
        step = max(1, AT_ONCE // entry.shape[-1])
        for start in range(0, len(rows), step):
            part = self._package.dequantize(packed[start : start + step], kind)
            with np.errstate(over="ignore"):
                rows[start : start + step] = part
            if values.dtype == np.float16 and np.abs(part).max() >= F16_LIMIT and np.isfinite(part).all():
                raise CheckpointError(
                    f"{self.folder}: {stored} holds values that f16 cannot; give the unquantised model"
                )
        values.flags.writeable = False
        return values

    def _permuted_heads(self, name: str) -> int:
        """The heads of a query or key projection whose rows llama.cpp reorders; 0 for other tensors."""
        if self.architecture.model_type not in REORDERED:
            return 0
        if ".self_attn.q_proj." in name:
            return self.architecture.num_attention_heads
        return self.architecture.num_key_value_heads if ".self_attn.k_proj." in name else 0

    def dtype(self, name: str) -> str:
        """The tensor's element type: `f32`, `f16` or `bf16`."""
        return self._type(self._tensors[stored_name(name)])

    def file(self, name: str) -> bytes | None:
        """A file made from the metadata (tokenizer.json, tokenizer_config.json, chat_template.jinja), or None."""
        return {str(known): content for known, content in self._files.items()}.get(name)

    def sha256(self) -> str:
        """The digest of the file."""
        with self.folder.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Unmaps the file, unless an array still views it."""
        self._kept.clear()
        try:
            self._map.close()
        except BufferError:
            return


def import_gguf(path: Path) -> Any:
    """The package `gguf`; raises CheckpointError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path}: GGUF files need the package gguf: pip install 'mpo-runtime[gguf]'") from None
    return gguf


def map_file(path: Path) -> mmap.mmap:
    """Maps a file for reading; raises CheckpointError where it is empty or cannot be opened."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        why = error.strerror if isinstance(error, OSError) else "it is empty"
        raise CheckpointError(f"{path}: cannot be read ({why}); download it again") from None


def stored_name(name: str) -> str:
    """llama.cpp's name of a tensor of ours, such as `blk.3.attn_q.weight`."""
    layer, _, part = name.replace(".0.weight", ".weight").rpartition(".")
    if layer in NAMES:
        return f"{NAMES[layer]}.{part}"
    block, _, inner = layer.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{BLOCK_NAMES[inner]}.{part}"


def to_half_split_rows(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows [heads · D, ...] from llama.cpp's order, pairs (j, j + D/2) side by side, to Hugging Face's, halves."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
