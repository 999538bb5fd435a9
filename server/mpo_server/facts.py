"""What the server tells of itself and its model: /health, /v1/models, /props, /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mpo_formats import LinearSpec, Mpo, MpoFile, Quantized
from mpo_formats.layout import content_tensors, linear_bytes
from mpo_runtime import __version__, native
from mpo_runtime.model import Model
from mpo_runtime.onnx.manifest import Folder
from mpo_server.errors import ApiError, json_response
from mpo_server.metrics import CONTENT_TYPE
from mpo_server.service import Service


async def health(request: Request) -> Response:
    """Whether the server can answer."""
    service: Service = request.app.state.service
    _ = service.model  # raises while it is loaded
    return json_response({"status": "ok"})


async def models(request: Request) -> Response:
    """The one model."""
    service: Service = request.app.state.service
    return json_response({"object": "list", "data": [model_data(service, service.model)]})


async def one_model(request: Request) -> Response:
    """The model by its name."""
    service: Service = request.app.state.service
    if request.path_params["name"] != service.settings.name:
        raise ApiError(404, f"there is no such model; this server has {service.settings.name}", code="model_not_found")
    return json_response(model_data(service, service.model))


def model_data(service: Service, model: Model) -> dict[str, Any]:
    """The model in OpenAI's form, with its sizes."""
    architecture = model.network.architecture
    meta = {
        "n_ctx": model.engine.context,
        "n_ctx_train": architecture.max_position_embeddings,
        "n_vocab": architecture.vocab_size,
        "n_embd": architecture.hidden_size,
        "n_params": architecture.parameters(),
        "size": file_bytes(model),
    }
    return {
        "id": service.settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mpo-runtime",
        "meta": meta,
    }


async def metrics(request: Request) -> Response:
    """Counts for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def props(request: Request) -> Response:
    """The model: template, context, certificate, layers; the server: kernels, places, limits."""
    service: Service = request.app.state.service
    if service.props is None:
        service.props = describe(service, service.model)
    return json_response(service.props)


def describe(service: Service, model: Model) -> dict[str, Any]:
    """All that /props tells."""
    settings, architecture = service.settings, model.network.architecture
    tokenizer = model.tokenizer
    return {
        "model": settings.name,
        "model_type": architecture.model_type,
        "version": __version__,
        "parameters": architecture.parameters(),
        "bytes": file_bytes(model),
        "bits_per_weight": file_bytes(model) * 8 / architecture.parameters(),
        "n_ctx": model.engine.context,
        "n_ctx_train": architecture.max_position_embeddings,
        "total_slots": settings.parallel,
        "max_queue": settings.max_queue,
        "timeout": settings.timeout,
        "default_generation_settings": {"n_ctx": model.engine.context, "params": dict(DEFAULTS)},
        "chat_template": None if model.template is None else model.template.source,
        "bos_token": None if tokenizer is None else tokenizer.bos_token,
        "eos_token": None if tokenizer is None else tokenizer.eos_token,
        "modalities": {"vision": False, "audio": False},
        "kernels": kernels(model),
        "provenance": provenance(model),
        "quality": certificates(model),
        "layers": list(layers(model)),
        "build_info": service.fingerprint,
    }


def exported(model: Model) -> Folder | None:
    """The folder of `export-onnx` that the model is run from, if it is."""
    weights: object = model.weights
    return weights if isinstance(weights, Folder) else None


def kernels(model: Model) -> dict[str, Any]:
    """What computes."""
    if exported(model) is None:
        return native.active()
    import onnxruntime

    return {"native": f"ONNX Runtime {onnxruntime.__version__}"}


def provenance(model: Model) -> dict[str, Any]:
    """Where the weights come from."""
    folder = exported(model)
    if folder is not None:
        return {"source": folder.manifest.source, "exporter": "mpo-run export-onnx"}
    return asdict(model.weights.spec.provenance)


DEFAULTS = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def certificates(model: Model) -> list[dict[str, Any]]:
    """The quality that was measured when the file was made; empty for a model that is no `.mpo` file."""
    weights = model.weights
    return [asdict(entry) for entry in weights.certificates().entries] if isinstance(weights, MpoFile) else []


def layers(model: Model) -> Iterator[dict[str, Any]]:
    """Each linear layer: where it is, how many bits a weight takes, and its cores."""
    for linear in () if exported(model) else model.weights.spec.linears:
        bonds = [bond for term in linear.terms if isinstance(term, Mpo) for bond in term.bonds]
        yield {
            "name": linear.name,
            "shape": [linear.out_features, linear.in_features],
            "bits": 8 * linear_bytes(linear) / (linear.out_features * linear.in_features),
            "integers": next((term.bits for term in linear.terms if isinstance(term, Quantized)), None),
            "chi": max(bonds, default=None),
            "hadamard": linear.hadamard,
            "transform": 0 if linear.transform is None else linear.transform.block,
            "terms": [_term(linear, index) for index in range(len(linear.terms))],
        }


def _term(linear: LinearSpec, index: int) -> str:
    term = linear.terms[index]
    if isinstance(term, Quantized):
        return f"int{term.bits}/{term.group}"
    if isinstance(term, Mpo):
        return f"{len(term.out_dims)} cores χ={','.join(map(str, term.bonds))} {term.dtype}"
    return term.dtype


def file_bytes(model: Model) -> int:
    """Bytes of the file, or of a folder's tensors."""
    weights, folder = model.weights, exported(model)
    if folder is not None:
        return folder.size
    return weights.size if isinstance(weights, MpoFile) else sum(one.size for one in content_tensors(weights.spec))
