"""mpo-run export-onnx: writes the folder and says what became of the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_runtime.cli.console import size_text
from mpo_runtime.cli.options import Chi, File


def export_onnx(
    file: File,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder to write.", show_default="the name of FILE with -onnx"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32 or fp16: the type of activations, float weights, scales and the KV cache.")
    ] = "fp32",
    accuracy_level: Annotated[
        int,
        typer.Option(
            help="What integer weights are multiplied with: 0 float activations (exact), 4 activations in int8 (fast)."
        ),
    ] = 4,
    chi: Chi = None,
    plain_attention: Annotated[
        bool,
        typer.Option("--plain-attention", help="Write attention in plain ONNX instead of GroupQueryAttention."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a folder that export-onnx wrote.")] = False,
) -> None:
    """Write a model as a folder for ONNX Runtime.

    The integers stay integers. The folder runs with mpo-run generate and chat, and with onnxruntime-genai. Needs the extra
    `onnx`.
    """
    from mpo_runtime.onnx.support import require_packages

    require_packages("onnx", "onnxruntime", what="export-onnx")
    from mpo_runtime.onnx.export import OnnxRequest, export_onnx

    folder = out or Path(f"{file.stem or file.name}-onnx")
    exported = export_onnx(OnnxRequest(file, folder, dtype, accuracy_level, chi, plain_attention, force))
    manifest = exported.manifest
    for kind in exported.kinds:
        grown = f"{kind.written / kind.stored - 1:+.0%}" if kind.stored else ""
        typer.echo(f"{kind.name}: {size_text(kind.stored)} -> {size_text(kind.written)} ({grown})")
    size = size_text(manifest.graph_bytes + manifest.data_bytes)
    typer.echo(f"wrote {folder}, {size}; try it: mpo-run generate {folder} --engine onnx -p Once")
