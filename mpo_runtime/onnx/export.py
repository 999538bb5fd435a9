"""The export: a model in, a folder for ONNX Runtime out, written beside its place and renamed when it is whole."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from mpo_formats import ConfigError, Dense, OutputError, Quantized, Term
from mpo_formats.layout import term_tensors
from mpo_runtime.onnx.decoder import check_architecture, write_decoder
from mpo_runtime.onnx.genai import CONFIG, genai_config, text_files
from mpo_runtime.onnx.graph import Graph
from mpo_runtime.onnx.integers import LEVELS
from mpo_runtime.onnx.manifest import DATA, MANIFEST, MODEL, VERSION, Dtype, Manifest, is_exported
from mpo_runtime.onnx.support import check_runtime, lookup_bits, require_packages
from mpo_runtime.weights.protocol import Weights
from mpo_runtime.weights.store import open_path, resolve

DTYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}
TEMPORARY = ".partial"


@dataclass(frozen=True, slots=True)
class OnnxRequest:
    """What a user asks for.

    level: the accuracy level of integer products: 0 multiplies with float activations, 4 with activations rounded to int8.
    chi: cuts every bond to its first `chi` values. plain: attention in plain ONNX, without the fused operator.
    """

    source: Path
    folder: Path
    dtype: str = "fp32"
    level: int = 4
    chi: int | None = None
    plain: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        if self.level not in LEVELS:
            raise ConfigError(f"--accuracy-level {self.level}: expected 0 (float activations) or 4 (int8 activations)")
        if self.chi is not None and self.chi < 1:
            raise ConfigError(f"--chi: expected at least 1, found {self.chi}")


@dataclass(slots=True)
class Kind:
    """Bytes of all terms of one kind, in the source and in the graph."""

    name: str
    stored: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Exported:
    """A written folder: its bytes, and those of each kind of term before and after."""

    manifest: Manifest
    kinds: tuple[Kind, ...]


def export_onnx(request: OnnxRequest) -> Exported:
    """Writes the folder.

    Raises:
        MpoError: for a source that cannot be read or has an architecture without a graph, a runtime that lacks an operator, a
            folder that is in the way, or a disk that is full; nothing is left behind.
    """
    require_packages("onnx", "onnxruntime", what="export-onnx")
    check_folder(request)
    weights = open_path(resolve(request.source))
    try:
        check_architecture(weights.spec.architecture)
        check_runtime(weights.spec, request.level, cast(Dtype, request.dtype))
        with whole_folder(request) as folder:
            return write_folder(weights, request, folder)
    finally:
        weights.close()


def write_folder(weights: Weights, request: OnnxRequest, folder: Path) -> Exported:
    """Writes all files into an empty folder."""
    files = text_files(weights)
    config = genai_config(weights.spec.architecture, files)  # first: it finds damaged files
    graph = Graph(folder, DTYPES[request.dtype])
    try:
        written = write_decoder(
            graph,
            weights,
            level=request.level,
            chi=request.chi,
            plain=request.plain,
            lookup_bits=lookup_bits(),
        )
        graph.write()
    finally:
        graph.close()
    manifest = Manifest(
        VERSION,
        request.source.name,
        cast(Dtype, request.dtype),
        request.level,
        written.shares_buffer,
        (folder / MODEL).stat().st_size,
        (folder / DATA).stat().st_size,
        weights.spec.architecture,
    )
    config["search"]["past_present_share_buffer"] = written.shares_buffer
    files[CONFIG] = json.dumps(config, indent=2).encode()
    files[MANIFEST] = manifest.to_bytes()
    for name, content in files.items():
        with (folder / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return Exported(manifest, tuple(kinds(weights, graph)))


def kinds(weights: Weights, graph: Graph) -> Iterator[Kind]:
    """The bytes of each kind of term before and after, in the order of the layers."""
    sizes = graph.sizes()
    found: dict[str, Kind] = {}
    for layer in weights.spec.linears:
        for index, term in enumerate(layer.terms):
            prefix = f"{layer.name}.{index}"
            kind = found.setdefault(kind_name(term), Kind(kind_name(term)))
            tensors = term_tensors(prefix, term, layer.out_features, layer.in_features)
            kind.stored += sum(tensor.size for tensor in tensors)
            kind.written += sum(size for name, size in sizes.items() if name.startswith(f"{prefix}."))
    yield from found.values()


def kind_name(term: Term) -> str:
    """A kind of term in words."""
    if isinstance(term, Quantized):
        return f"{term.bits} bits"
    return f"{term.dtype} matrices" if isinstance(term, Dense) else f"{term.dtype} cores"


def check_folder(request: OnnxRequest) -> None:
    """Raises OutputError where the folder cannot be made, or something is there that must not be replaced."""
    folder = request.folder
    if not folder.parent.is_dir():
        raise OutputError(f"{folder.parent}: is no folder; make it first, or give another --out")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_exported(folder):
        raise OutputError(f"{folder}: exists and is no folder of export-onnx; give another --out")
    if not request.force:
        raise OutputError(f"{folder}: exists; give another --out, or --force to replace it")


@contextmanager
def whole_folder(request: OnnxRequest) -> Iterator[Path]:
    """A folder beside the one asked for, which takes its place at the end, or is removed where that is not reached.

    Raises:
        OutputError: when the disk refuses the bytes.
    """
    target = request.folder
    temporary = target.with_name(f".{target.name[:64]}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            old = temporary.with_suffix(".old")
            target.rename(old)
            try:
                temporary.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    except OSError as error:
        where = error.filename or target
        raise OutputError(
            f"{where}: {error.strerror or error}; nothing was kept, make room or give another --out"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
