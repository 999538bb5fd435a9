"""Reads a Hugging Face folder: config.json and one or many safetensors shards, memory-mapped, nothing converted."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import CheckpointError, Dense, FileSpec, LinearSpec, ModelSpec, Provenance, VectorSpec
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.spec import FileName, FloatType
from mpo_runtime.weights.config import architecture_from_config

ELEMENTS: dict[str, tuple[FloatType, Any]] = {
    "F32": ("f32", np.float32),
    "F16": ("f16", np.float16),
    "BF16": ("bf16", np.uint16),
}
EMBEDDED: tuple[FileName, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Buffers that older exporters wrote and no forward pass needs.
IGNORED = ("rotary_emb.inv_freq",)
HEADER_LIMIT = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a shard: where its bytes lie."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Checkpoint:
    """A Hugging Face folder seen as weights with Dense terms.

    Raises:
        CheckpointError: for a missing config.json, an unknown architecture, a truncated shard, a missing tensor or a
            tensor of another shape than config.json demands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(folder / "config.json", "copy it from the model's page")
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path, "remove it") if generation_path.exists() else {}
        self.architecture = architecture_from_config(config, generation, str(folder))
        self._maps: dict[Path, mmap.mmap] = {}
        self._stored = self._read_shards()
        linears = tuple(self._linear(*size) for size in self.architecture.linear_sizes())
        vectors = tuple(self._vector(name, size) for name, size in self.architecture.vector_sizes())
        self._refuse_surplus(linears, vectors)
        files = tuple(FileSpec(name, len(content)) for name in EMBEDDED if (content := self.file(name)))
        provenance = Provenance(folder.name, None, "", "", {}, None)
        self.spec = ModelSpec(self.architecture, linears, vectors, files, provenance)

    def _read_shards(self) -> dict[str, Stored]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            table = read_json(index, "download the folder again").get("weight_map")
            if not isinstance(table, dict):
                raise CheckpointError(f"{index}: no weight_map; download the folder again")
            names = sorted({str(name) for name in table.values()})
        else:
            names = ["model.safetensors"]
        stored: dict[str, Stored] = {}
        for name in names:
            shard = self.folder / name
            if Path(name).name != name or not shard.exists():
                raise CheckpointError(f"{shard}: missing shard; only safetensors are read, download the folder again")
            stored.update(self._read_shard(shard))
        return stored

    def _read_shard(self, shard: Path) -> dict[str, Stored]:
        damaged = f"{shard}: truncated or damaged shard"
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{damaged}: header of {length} bytes in a file of {size}; download it again")
            try:
                table = json.loads(file.read(length))
            except ValueError:
                raise CheckpointError(f"{damaged}: its header is not JSON; download it again") from None
            self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not isinstance(table, dict):
            raise CheckpointError(f"{damaged}: its header is not a JSON object; download it again")
        table.pop("__metadata__", None)
        wanted = {name: row for name, row in table.items() if not name.endswith(IGNORED)}
        return {name: place_tensor(shard, name, row, 8 + length, size) for name, row in wanted.items()}

    def _find(self, name: str, shape: tuple[int, ...]) -> Stored:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; download the folder again")
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has shape {list(stored.shape)}, config.json demands "
                f"{list(shape)}; config and weights are not of one model"
            )
        return stored

    def _linear(self, name: str, rows: int, columns: int, bias: bool) -> LinearSpec:
        weight = ELEMENTS[self._find(f"{name}.weight", (rows, columns)).dtype][0]
        bias_type = ELEMENTS[self._find(f"{name}.bias", (rows,)).dtype][0] if bias else None
        return LinearSpec(name, rows, columns, bias_type, (Dense(weight),))

    def _vector(self, name: str, size: int) -> VectorSpec:
        return VectorSpec(name, size, ELEMENTS[self._find(f"{name}.weight", (size,)).dtype][0])

    def _refuse_surplus(self, linears: tuple[LinearSpec, ...], vectors: tuple[VectorSpec, ...]) -> None:
        """A tensor that the forward pass would leave out means another architecture, and wrong text without a word."""
        known = {f"{name}.weight" for name in [linear.name for linear in linears] + [vector.name for vector in vectors]}
        known |= {f"{linear.name}.bias" for linear in linears if linear.bias}
        if self.architecture.tie_word_embeddings:
            known.add(f"{HEAD}.weight")  # a copy that some exporters write; checked to be one
            self._check_tied_head()
        for name in self._stored:
            if name not in known:
                raise CheckpointError(
                    f"{self.folder}: tensor {name} has no place in this architecture; "
                    "config.json and weights are not of one model"
                )

    def _check_tied_head(self) -> None:
        head = self._stored.get(f"{HEAD}.weight")
        if head and not np.array_equal(self._view(head), self._view(self._stored[f"{EMBEDDING}.weight"])):
            raise CheckpointError(
                f"{self.folder}: lm_head.weight differs from the embedding although config.json says "
                "tie_word_embeddings; set it to false"
            )

    def _view(self, stored: Stored) -> NDArray[Any]:
        count = math.prod(stored.shape)
        place = self._maps[stored.shard]
        raw = np.frombuffer(place, np.uint8, offset=stored.begin, count=count * width(stored.dtype))
        shaped: NDArray[Any] = raw.view(ELEMENTS[stored.dtype][1]).reshape(stored.shape)
        return shaped

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name: `<layer>.0.weight`, `<layer>.bias` or `<norm>.weight`; bf16 as uint16 bits."""
        return self._view(self._stored[name.replace(".0.weight", ".weight")])

    def dtype(self, name: str) -> str:
        """The tensor's element type: `f32`, `f16` or `bf16`."""
        return ELEMENTS[self._stored[name.replace(".0.weight", ".weight")].dtype][0]

    def file(self, name: str) -> bytes | None:
        """A file of the folder by name, None where it is absent; the chat template is also found in tokenizer_config."""
        path = self.folder / name
        if path.exists():
            return path.read_bytes()
        if name == "chat_template.jinja" and (self.folder / "tokenizer_config.json").exists():
            template = read_json(self.folder / "tokenizer_config.json", "remove it").get("chat_template")
            return template.encode() if isinstance(template, str) else None
        return None

    def sha256(self) -> str:
        """The digest of all shards, in the order of their names."""
        digest = hashlib.sha256()
        for shard in sorted(self._maps):
            with shard.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
        return digest.hexdigest()

    def close(self) -> None:
        """Unmaps the shards that no array views any more."""
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:
                continue


def place_tensor(shard: Path, name: str, row: Any, data: int, size: int) -> Stored:
    """Where a tensor lies, from its row in the header of a shard of `size` bytes whose data begin at byte `data`.

    Raises:
        CheckpointError: for a row that is not understood, an unknown element type, or bytes past the end of the shard.
    """
    damaged = f"{shard}: truncated or damaged shard"
    try:
        dtype, shape = str(row["dtype"]), tuple(int(length) for length in row["shape"])
        begin, end = (int(offset) for offset in row["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{damaged}: its header does not say where {name} lies; download it again") from None
    if dtype not in ELEMENTS:
        raise CheckpointError(
            f"{shard}: {name} has type {dtype}, expected one of {', '.join(ELEMENTS)}; give the unquantised model"
        )
    if data + end > size:
        raise CheckpointError(f"{damaged}: {name} ends at byte {data + end}, the file at {size}; download it again")
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * width(dtype):
        raise CheckpointError(f"{damaged}: {name} has {end - begin} bytes for shape {list(shape)}; download it again")
    return Stored(shard, dtype, shape, data + begin)


def width(dtype: str) -> int:
    """Bytes of an element of a safetensors type."""
    return int(np.dtype(ELEMENTS[dtype][1]).itemsize)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object from a file; raises CheckpointError naming the file and the remedy."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no {path.name}; {remedy}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; {remedy}")
    return content
