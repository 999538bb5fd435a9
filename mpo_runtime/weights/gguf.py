"""Reads a GGUF file of llama.cpp (architectures llama and granite) as weights with Dense terms.

Tensors of the types F32, F16 and BF16 are views of the mapped file; all others are dequantised by the package `gguf` when
they are asked for, and only the caller keeps them. llama.cpp reorders the rows of the query and key projections, because it
rotates neighbouring elements of a head where Hugging Face's models rotate element j with element j + D/2; here they come in
Hugging Face's order. Config, tokenizer and chat template are made from the metadata.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpo_formats import (
    Architecture,
    CheckpointError,
    Dense,
    FileSpec,
    FormatError,
    LinearSpec,
    ModelSpec,
    Provenance,
    Rope,
    VectorSpec,
)
from mpo_formats.architecture import EMBEDDING, FINAL_NORM, HEAD
from mpo_formats.spec import FloatType
from mpo_runtime.models.rope import inverse_frequencies
from mpo_runtime.text.gguf_tokenizer import end_of_text_ids, tokenizer_files
from mpo_runtime.weights.gguf_header import MAGIC, Entry, read_header

SUFFIX = ".gguf"
SUPPORTED = ("granite", "llama")
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
    "post_attention_layernorm": "ffn_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
# Dequantised tensors come as f32, which is exact, of models of at most so many parameters; of larger ones as f16, as large
# as the unquantised model. On SmolLM2-135M the rounding to f16 adds a KL of 3e-6.
MOST_EXACT = 1 << 30


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

    Raises:
        CheckpointError: where the package `gguf` is missing, and for a damaged or split file, an unsupported version,
            architecture, tensor type or tokenizer, a missing tensor or one of another shape than the metadata demand.
    """

    def __init__(self, path: Path, *, dequantised: Literal["f32", "f16"] | None = None) -> None:
        self.folder = path
        self._package = import_gguf(path)
        self._map = map_file(path)
        try:
            header = read_header(self._map, path)
            self._tensors = header.tensors
            refuse_other_kinds(header.metadata, path)
            self._check_tensors()
            self.architecture = read_architecture(header.metadata, self._tensors, self._read, path)
            many = self.architecture.parameters() > MOST_EXACT
            self._dequantised: Literal["f32", "f16"] = dequantised or ("f16" if many else "f32")
            linears = tuple(self._linear(*size) for size in self.architecture.linear_sizes())
            vectors = tuple(self._vector(name, size) for name, size in self.architecture.vector_sizes())
            self._refuse_surplus(linears, vectors)
            self._files = tokenizer_files(header.metadata, self.architecture.vocab_size, str(path))
        except BaseException:
            self.close()
            raise
        files = tuple(FileSpec(name, len(content)) for name, content in self._files.items())
        self.spec = ModelSpec(
            self.architecture, linears, vectors, files, Provenance(path.name, None, "", "", {}, None)
        )

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
        known = {stored_name(f"{name}.weight") for name in [part.name for part in (*linears, *vectors)]}
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
        array, kind = self._read(stored), self._tensors[stored].kind
        heads = self._permuted_heads(name)
        if heads:
            array = to_half_split_rows(array, heads)
        if kind in PLAIN:
            return array
        values: NDArray[Any] = self._package.dequantize(array, self._package.GGMLQuantizationType(kind))
        if self._dequantised == "f16":
            with np.errstate(over="ignore"):
                narrow = values.astype(np.float16)
            if np.isinf(narrow).any() and np.isfinite(values).all():
                raise CheckpointError(f"{self.folder}: {stored} holds values that f16 cannot; give the unquantised model")
            values = narrow
        values.flags.writeable = False
        return values

    def _permuted_heads(self, name: str) -> int:
        """The heads of a query or key projection, whose rows llama.cpp reorders; 0 for other tensors."""
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
        try:
            self._map.close()
        except BufferError:
            return


def import_gguf(path: Path) -> Any:
    """The package `gguf`; raises CheckpointError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{path}: GGUF files need the package gguf: pip install 'mpo-runtime[gguf]'"
        ) from None
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


def refuse_other_kinds(metadata: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for a part of a split file and for what is no language model."""
    parts = metadata.get("split.count", 0)
    if (isinstance(parts, int) and parts > 1) or re.search(r"-\d{5}-of-(?!00001)\d{5}$", path.stem):
        raise CheckpointError(
            f"{path}: is one part of a model in several files; join them: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path}: holds a part of general.type {kind!r}, expected a model; give the model's own file")


class Settings:
    """The metadata of one architecture, `llama.block_count` as `block_count`; messages name the full key."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, path: Path) -> None:
        self.metadata, self.prefix, self.path = metadata, prefix, path

    def get(self, key: str) -> Any:
        """The value of that key, or None."""
        return self.metadata.get(f"{self.prefix}.{key}")

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that is missing or of the wrong kind."""
        return CheckpointError(
            f"{self.path}: {self.prefix}.{key}: expected {expected}, found {self.get(key)!r}; download the file again"
        )

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; given for each block, the one that all have.

        Raises:
            CheckpointError: where there is none and no default, or the blocks differ.
        """
        value = self.get(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise self.wrong(key, "an integer, the same for all blocks")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; the shortest decimal of a float32, so that 1e-5 does not become 9.999999747378752e-06.

        Raises:
            CheckpointError: where there is none and no default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float):
            raise self.wrong(key, "a number")
        short = float(str(np.float32(value)))
        return short if np.float32(short) == np.float32(value) and abs(short - value) <= 1e-6 * abs(value) else value


def read_architecture(
    metadata: Mapping[str, Any], tensors: Mapping[str, Entry], read: Callable[[str], NDArray[Any]], path: Path
) -> Architecture:
    """Reads sizes, multipliers, RoPE settings and special tokens; what the forward pass cannot honour is refused by name.

    Raises:
        CheckpointError: naming the key that is missing or unsupported.
    """
    kind = metadata.get("general.architecture")
    if kind not in SUPPORTED:
        raise CheckpointError(
            f"{path}: the architecture {kind!r} is not supported; expected one of {', '.join(SUPPORTED)}; "
            "give another model"
        )
    settings = Settings(metadata, kind, path)
    granite = kind == "granite"
    refuse_unsupported(settings, granite)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing; the file is incomplete, download it again")
    heads, hidden = settings.integer("attention.head_count"), settings.integer("embedding_length")
    head_dim = settings.integer("attention.key_length", hidden // max(heads, 1))
    if settings.integer("attention.value_length", head_dim) != head_dim:
        raise settings.wrong("attention.value_length", f"{head_dim}, as attention.key_length")
    vocabulary = embedding.shape[0]
    bos, pad = (special_id(metadata, f"{name}_token_id", vocabulary) for name in ("bos", "padding"))
    try:
        return Architecture(
            model_type="granite" if granite else "llama",
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=settings.integer("feed_forward_length"),
            num_hidden_layers=settings.integer("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=settings.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=settings.integer("context_length", 2048),
            rms_norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
            rope=read_rope(settings, head_dim, read(ROPE_FACTORS) if ROPE_FACTORS in tensors else None),
            embedding_multiplier=settings.number("embedding_scale", 1.0) if granite else 1.0,
            residual_multiplier=settings.number("residual_scale", 1.0) if granite else 1.0,
            attention_multiplier=settings.number("attention.scale", head_dim**-0.5) if granite else head_dim**-0.5,
            logits_scaling=settings.number("logit_scale", 1.0) if granite else 1.0,
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=bos,
            eos_token_ids=end_of_text_ids(metadata, vocabulary),
            pad_token_id=pad,
        )
    except FormatError as error:
        raise CheckpointError(f"{path}: {error}") from None


def special_id(metadata: Mapping[str, Any], key: str, vocabulary: int) -> int | None:
    """The id of a special token, or None where the file names none that the vocabulary holds."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    return value if type(value) is int and 0 <= value < vocabulary else None


def refuse_unsupported(settings: Settings, granite: bool) -> None:
    """Raises CheckpointError for experts, sliding windows, and a Granite without rotary embeddings."""
    if settings.get("expert_count"):
        raise CheckpointError(f"{settings.path}: has experts, which are not supported yet; give another model")
    window = settings.get("attention.sliding_window")
    if window and window < settings.integer("context_length", 0):
        raise CheckpointError(f"{settings.path}: uses sliding-window attention, which is not supported yet")
    if granite and settings.get("rope.scaling.finetuned") is False:
        raise CheckpointError(f"{settings.path}: uses no rotary position embedding, which is not supported yet")


def read_rope(settings: Settings, head_dim: int, factors: NDArray[Any] | None) -> Rope:
    """Reads the RoPE base, and the scaling as llama.cpp stores it: a linear factor, or one divisor for each frequency.

    Raises:
        CheckpointError: for another scaling, or a rotation of a part of each head.
    """
    if settings.integer("rope.dimension_count", head_dim) != head_dim:
        raise settings.wrong("rope.dimension_count", f"{head_dim}, the size of a head: partial rotation is not supported")
    theta = settings.number("rope.freq_base", 10000.0)
    kind = settings.get("rope.scaling.type") or "linear"  # as llama.cpp takes it, with a factor of 1
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{settings.path}: RoPE scaling {kind!r} is not supported; expected none, linear or Llama 3.1's"
        )
    # llama.cpp reads a factor of 0 as 1; rope.scale_linear is the older name.
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0)) or 1.0
    try:
        scaled = linear_rope(theta, 1.0 if kind == "none" else factor)
        if factors is None or np.all(factors == 1):
            return scaled
        if scaled.scaling != "default":
            raise CheckpointError(f"{settings.path}: has a linear RoPE factor beside {ROPE_FACTORS}; give another model")
        original = settings.get("rope.scaling.original_context_length")
        return llama3_rope(theta, head_dim, factors.astype(np.float64), original)
    except (FormatError, ValueError) as error:
        raise CheckpointError(f"{settings.path}: RoPE: {error}") from None


def linear_rope(theta: float, factor: float) -> Rope:
    """The scaling that divides all frequencies by one factor."""
    if factor == 1:
        return Rope(theta, "default", 1.0, 0.0, 0.0, 0)
    return Rope(theta, "linear", factor, 0.0, 0.0, 0)


def llama3_rope(theta: float, head_dim: int, divisors: NDArray[np.float64], original: Any) -> Rope:
    """The settings of Llama 3.1's scaling from the divisor of each frequency [D/2] that they make.

    A divisor is 1 / (s + (1 − s) / factor) with s = (t − low) / (high − low) cut to 0 … 1, and t the turns that a frequency
    makes in the original context. `factor` is the divisor of the slowest; the rest follows from the divisors between. They
    depend on original/(high − low) and low/(high − low) alone, so the original context is taken as the file says, or 8,192
    as all published models have it.

    Raises:
        ValueError: where no settings give these divisors.
    """
    refused = f"{ROPE_FACTORS} holds divisors that no Llama 3.1 scaling gives; give the Hugging Face folder"
    if divisors.shape != (head_dim // 2,) or not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise ValueError(refused)
    factor = float(divisors[-1])
    if np.all(divisors == factor):
        return linear_rope(theta, factor)
    length = original if isinstance(original, int) and original > 0 else 8192
    turns = length / (2 * math.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    bounds = [(1.0, 4.0)]
    between = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if between.sum() > 1:
        share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)  # s, linear in the turns
        slope, offset = np.polyfit(turns[between], share, 1)
        bounds.append((round(float(-offset / slope), 4), round(float((1 - offset) / slope), 4)))
    for low, high in bounds:
        if not 0 < low < high:
            continue
        rope = Rope(theta, "llama3", factor, low, high, length)
        expected = inverse_frequencies(Rope(theta, "default", 1.0, 0.0, 0.0, 0), head_dim) / divisors
        if np.allclose(inverse_frequencies(rope, head_dim), expected, rtol=1e-4, atol=0):
            return rope
    raise ValueError(refused)

