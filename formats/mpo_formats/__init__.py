"""The `.mpo` format (SPEC.md): its contents as dataclasses, a strict reader, a crash-safe writer. Needs numpy only."""

from __future__ import annotations

from mpo_formats.architecture import Architecture, ModelSpec, Rope
from mpo_formats.codec import VERSIONS
from mpo_formats.errors import CheckpointError, ConfigError, FormatError, MpoError, OutputError, PlanError
from mpo_formats.provenance import Certificate, Certificates, Provenance, Quality
from mpo_formats.reader import MpoFile
from mpo_formats.spec import Dense, FileSpec, Layouts, LinearSpec, Mpo, Quantized, Term, Transform, VectorSpec
from mpo_formats.writer import MpoWriter

__all__ = [
    "VERSIONS",
    "Architecture",
    "Certificate",
    "Certificates",
    "CheckpointError",
    "ConfigError",
    "Dense",
    "FileSpec",
    "FormatError",
    "Layouts",
    "LinearSpec",
    "ModelSpec",
    "Mpo",
    "MpoError",
    "MpoFile",
    "MpoWriter",
    "OutputError",
    "PlanError",
    "Provenance",
    "Quality",
    "Quantized",
    "Rope",
    "Term",
    "Transform",
    "VectorSpec",
]
