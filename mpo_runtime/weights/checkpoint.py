"""Reads a Hugging Face folder: config.json and one or many safetensors shards, memory-mapped and not converted."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import CheckpointError, Dense, FileSpec, LinearSpec, ModelSpec, Provenance, VectorSpec
from mpo_formats.architecture import EMBEDDING, HEAD, POSITIONS
from mpo_formats.git_lfs import is_pointer, pointer_message
from mpo_formats.packing import bf16_to_f32, f32_to_bf16
from mpo_formats.spec import FileName, FloatType
from mpo_runtime.text.decode import decode_json
from mpo_runtime.text.files import TextFiles
from mpo_runtime.weights.config import architecture_from_config
from mpo_runtime.weights.names import spec_names

log = logging.getLogger(__name__)
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
IGNORED = ("rotary_emb.inv_freq", ".attn.attention.bias", ".attn.attention.masked_bias")
HEADER_LIMIT = 100_000_000
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
# Values compared at a time, which bounds the memory that two tables of different types take.
COMPARED = 1 << 22


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
        self._texts = TextFiles(folder)
        self._stored = self._renamed(self._read_shards())
        self._share_embedding()
        linears = tuple(self._linear(*size) for size in self.architecture.linear_sizes())
        vectors = tuple(self._vector(name, size) for name, size in self.architecture.vector_sizes())
        self._refuse_surplus(linears, vectors)
        files = tuple(FileSpec(name, len(content)) for name in EMBEDDED if (content := self.file(name)))
        provenance = Provenance(folder.name, None, "", "", {}, None)
        self.spec = ModelSpec(self.architecture, linears, vectors, files, provenance)

    def _read_shards(self) -> dict[str, Stored]:
        """All tensors; of one that several shards hold, the copy that the index names."""
        names, homes = self._find_shards()
        copies: dict[str, list[Stored]] = {}
        for name in names:
            for tensor, stored in self._read_shard(self.folder / name).items():
                copies.setdefault(tensor, []).append(stored)
        return {tensor: self._choose(tensor, found, homes.get(tensor)) for tensor, found in copies.items()}

    def _renamed(self, stored: dict[str, Stored]) -> dict[str, Stored]:
        """The tensors under SPEC.md's names; one that holds several matrices is divided, a table of positions is a vector."""
        tensors: dict[str, Stored] = {}
        for name, one in stored.items():
            names = spec_names(self.architecture.model_type, name)
            if len(names) > 1 and one.shape and one.shape[0] % len(names) == 0:
                rows = one.shape[0] // len(names)
                size = rows * math.prod(one.shape[1:]) * width(one.dtype)
                for index, part in enumerate(names):
                    tensors[part] = replace(one, shape=(rows, *one.shape[1:]), begin=one.begin + index * size)
            elif names[0] == f"{POSITIONS}.weight":
                tensors[names[0]] = replace(one, shape=(math.prod(one.shape),))
            else:
                tensors[names[0]] = one
        return tensors

    def _find_shards(self) -> tuple[list[str], dict[str, str]]:
        """The names of the shards, and the shard of each tensor as far as an index tells.

        As in transformers, model.safetensors comes before an index: one that lies beside it is left over from an earlier,
        divided copy of the model.
        """
        here = {path.name for path in self.folder.glob("*.safetensors")}
        homes = self._read_index()
        named = sorted(set(homes.values()))
        if named and here.issuperset(named) and (WHOLE in named or WHOLE not in here):
            return named, homes
        numbered = self._numbered_shards(here)
        found = [WHOLE] if WHOLE in here else numbered
        if not found:
            missing = [name for name in named if name not in here] or [WHOLE]
            raise CheckpointError(
                f"{self.folder / missing[0]}: missing shard; only safetensors are read, download the folder again"
            )
        if named:
            log.warning("%s: is stale and not used; %s is read", self.folder / INDEX, " and ".join(found[:2]))
        return found, {}

    def _read_index(self) -> dict[str, str]:
        """The shard of each tensor as the index tells; empty where there is none."""
        path = self.folder / INDEX
        if not path.exists():
            return {}
        table = read_json(path, "download the folder again").get("weight_map")
        if isinstance(table, dict) and table and all(isinstance(name, str) for name in table.values()):
            return dict(table)
        if not (self.folder / WHOLE).exists():
            raise CheckpointError(f"{path}: no weight_map; download the folder again")
        return {}

    @staticmethod
    def _numbered_shards(here: set[str]) -> list[str]:
        """The shards model-00001-of-N to model-N-of-N where all are here, the set with the most where there are several."""
        sets: dict[int, dict[int, str]] = {}
        for name in sorted(here):
            if found := NUMBERED.fullmatch(name):
                sets.setdefault(int(found[2]), {})[int(found[1])] = name
        whole = [shards for count, shards in sets.items() if set(shards) == set(range(1, count + 1))]
        return list(max(whole, key=len).values()) if whole else []

    def _choose(self, name: str, copies: list[Stored], home: str | None) -> Stored:
        """One of the copies of a tensor: the one that the index names, else any, where all hold the same values.

        Raises:
            CheckpointError: where there is more than one and nothing says which holds.
        """
        named = [stored for stored in copies if stored.shard.name == home]
        if named:
            return named[0]
        widest = max(copies, key=lambda stored: width(stored.dtype))
        for other in copies:
            if not self._equal(widest, other):
                raise CheckpointError(
                    f"{self.folder}: tensor {name} is in {widest.shard.name} and, with other values, in "
                    f"{other.shard.name}; remove the shard that does not belong to the model"
                )
        return widest

    def _share_embedding(self) -> None:
        """Names the table of a tied model, which may be stored as the head, after the embedding.

        Raises:
            CheckpointError: for an untied model that lacks embedding or head.
        """
        table, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
        tied = self.architecture.tie_word_embeddings
        if tied and head in self._stored:
            self._stored.setdefault(table, self._stored[head])
        missing = [name for name in (table, head) if name not in self._stored]
        if not tied and len(missing) == 1:
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]} is missing and config.json does not say tie_word_embeddings; set that "
                "to true if embedding and output share one table, else download the folder again"
            )

    def _read_shard(self, shard: Path) -> dict[str, Stored]:
        damaged = f"{shard}: truncated or damaged shard"
        size = shard.stat().st_size
        with shard.open("rb") as file:
            head = file.read(64)
            if is_pointer(head):
                raise CheckpointError(pointer_message(shard))
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
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
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing{self._beside(name)}; download the folder again"
            )
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

    def _beside(self, name: str) -> str:
        """What a module has beside a tensor that is missing, in words: another family may store it there."""
        module = name.rsplit(".", 2)[0]
        found = sorted(one.removeprefix(f"{module}.") for one in self._stored if one.startswith(f"{module}."))
        return f", while {module} has {', '.join(found[:8])}" if module.count(".") > 2 and found else ""

    def _vector(self, name: str, size: int) -> VectorSpec:
        return VectorSpec(name, size, ELEMENTS[self._find(f"{name}.weight", (size,)).dtype][0])

    def _refuse_surplus(self, linears: tuple[LinearSpec, ...], vectors: tuple[VectorSpec, ...]) -> None:
        """Raises CheckpointError for a tensor that the forward pass would not use: it would give wrong text silently."""
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
        if head and not self._equal(head, self._stored[f"{EMBEDDING}.weight"]):
            raise CheckpointError(
                f"{self.folder}: lm_head.weight differs from the embedding although config.json says "
                "tie_word_embeddings; set it to false"
            )

    def _equal(self, one: Stored, other: Stored) -> bool:
        """Whether two tensors hold the same values; where their types differ, once one is rounded to the other's."""
        if one is other:
            return True
        if one.shape != other.shape:
            return False
        left, right = self._view(one).reshape(-1), self._view(other).reshape(-1)
        if one.dtype == other.dtype:
            return bool(np.array_equal(left.view(np.uint8), right.view(np.uint8)))
        parts = range(0, left.size, COMPARED)
        pairs = [(left[start : start + COMPARED], right[start : start + COMPARED]) for start in parts]
        return all(_rounds_to(a, one.dtype, b, other.dtype) for a, b in pairs) or all(
            _rounds_to(b, other.dtype, a, one.dtype) for a, b in pairs
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
        """A file of the folder by name, None where it is absent; those about text in their usual form (`TextFiles`)."""
        return self._texts.read(name)

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
            f"{shard}: {name} has type {dtype}, expected one of {', '.join(ELEMENTS)}; "
            f"{'convert it to F32' if dtype == 'F64' else 'give the unquantised model'}"
        )
    if data + end > size:
        raise CheckpointError(f"{damaged}: {name} ends at byte {data + end}, the file at {size}; download it again")
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * width(dtype):
        raise CheckpointError(f"{damaged}: {name} has {end - begin} bytes for shape {list(shape)}; download it again")
    return Stored(shard, dtype, shape, data + begin)


def width(dtype: str) -> int:
    """Bytes of an element of a safetensors type."""
    return int(np.dtype(ELEMENTS[dtype][1]).itemsize)


def _rounds_to(values: NDArray[Any], dtype: str, target: NDArray[Any], target_dtype: str) -> bool:
    """Whether values of one type equal those of another type once they are rounded to it."""
    single = bf16_to_f32(values) if dtype == "BF16" else values.astype(np.float32)
    with np.errstate(over="ignore"):
        rounded = f32_to_bf16(single) if target_dtype == "BF16" else single.astype(ELEMENTS[target_dtype][1])
    return bool(np.array_equal(rounded, target))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object from a file; raises CheckpointError naming the file and the remedy."""
    try:
        content = decode_json(path.read_bytes(), path, remedy, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: has no {path.name}; {remedy}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; {remedy}")
    return content
