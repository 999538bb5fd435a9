"""Opens models: weights from a file, a folder or the store; a backend that runs them; tokenizer and chat template."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpo_formats import ConfigError
from mpo_formats.layout import content_tensors
from mpo_runtime import native, residence
from mpo_runtime.backends.ops import check_activations
from mpo_runtime.engine import Speculation
from mpo_runtime.engine.scheduler import PARALLEL
from mpo_runtime.engine.sequence import checked_context
from mpo_runtime.machine import usable_cpus
from mpo_runtime.memory import require_memory
from mpo_runtime.model import Model
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.onnx.manifest import is_exported
from mpo_runtime.text.chat_template import ChatTemplate
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights import store
from mpo_runtime.weights.protocol import Weights

if TYPE_CHECKING:
    from mpo_runtime.backends.ops import Ops

BACKENDS = ("auto", "native", "triton", "reference")
ENGINES = ("auto", "mpo", "onnx")
MOST_THREADS = 1024


def load(
    path: str | Path,
    *,
    chi: int | None = None,
    device: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    kv_type: str = "auto",
    activations: str = "int8",
    load: str = "auto",
    verify: bool = False,
    engine: str = "auto",
    parallel: int = PARALLEL,
    prefix_bytes: int | None = None,
    speculate: Speculation | None = None,
    deterministic: bool = True,
) -> Model:
    """Loads a `.mpo` or GGUF file, a Hugging Face folder or a model of the local store.

    Args:
        path: a file, a folder, or a name that `mpo-run list` shows.
        chi: uses only the first `chi` values of every bond: a smaller, faster, less accurate model from the same file.
        device: `cpu`, a torch device such as `cuda`, or `auto`: the GPU where torch sees one.
        backend: `native`, `triton`, `reference`, or `auto`: native on a CPU where its kernels were built, else reference.
        threads: CPU threads of this process, for all its models; None keeps their number, which starts at all cores that
            the process may use (a container's CPU quota is heeded).
        context: tokens that the KV cache holds; where None, the longest context of the model, but at most 4,096.
        kv_type: element type of the KV cache: f32, f16, bf16, or int8 with the native backend only. `auto` is f16 where the
            native backend multiplies integer weights with int8 activations, whose rounding is far coarser, and f32 elsewhere.
        activations: what the native backend multiplies integer weights with: `int8` or `float`.
        load: where the native backend reads weights from: `map`, the mapped file; `copy`, memory of its own, into which they
            are moved in the background; `auto`, the faster of the two by a short measurement.
        verify: checks the file's checksums first.
        engine: `mpo`, this runtime; `onnx`, ONNX Runtime, for a folder of `mpo-run export-onnx`; `auto`, what fits the path.
        parallel, prefix_bytes, speculate, deterministic: how many texts are generated at a time, what is kept of the KV cache
            for later prompts, whether tokens are drafted from what a text repeats, and whether texts are the same beside
            others (engine/scheduler.py).

    Raises:
        MpoError: for a missing, damaged or unsupported file, or an option out of range.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine}: expected one of {', '.join(ENGINES)}")
    options: dict[str, Any] = {"chi": chi, "kv_type": kv_type, "activations": activations}
    options |= {"backend": backend, "device": find_device(device), "load": load}
    if engine == "onnx" or (engine == "auto" and is_exported(Path(path))):
        return load_onnx(Path(path), {**options, "speculate": speculate}, context=context, threads=threads)
    weights = open_weights(path, verify=verify)
    try:
        if choose_backend(backend, options["device"]) != "reference":
            require_room(weights, str(path), checked_context(weights.spec.architecture, context), options)
        network = load_network(weights, threads=threads, **options)
        text = read_text_files(weights)
        more: dict[str, Any] = {"parallel": parallel, "prefix_bytes": prefix_bytes, "speculate": speculate}
        more |= {"context": context, "deterministic": deterministic}
        return Model(weights, network, text[0], text[1], **more)
    except BaseException:
        weights.close()
        raise


def require_room(weights: Weights, name: str, context: int, options: Mapping[str, Any]) -> None:
    """Refuses a model whose weights and KV cache of one text are more than the memory that is available.

    With `load` map the weights do not count: the system reads them from the file as they are needed, however slowly.

    Raises:
        ConfigError: where they do not fit.
    """
    architecture, on_gpu = weights.spec.architecture, options["device"] != "cpu"
    kind = native_kv_type(weights, options["kv_type"], options["activations"])
    rows = 2 * architecture.num_hidden_layers * architecture.num_key_value_heads * context
    cache = rows * {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}.get(kind, 4) * architecture.head_dim
    mapped = options["load"] == "map" and not on_gpu
    size = 0 if mapped else sum(tensor.size for tensor in content_tensors(weights.spec))
    remedy = (
        "close other programs, or take a smaller --ctx-size, --kv-type int8, or a file with fewer bits (--target-size)"
    )
    remedy += "" if mapped or on_gpu else "; --load map reads the weights from the disk, slowly"
    available = None
    if on_gpu:
        from mpo_runtime.backends.reference import free_memory

        check_device(options["device"])
        available = free_memory(options["device"])
    require_memory(name, size, cache, remedy, available)


def load_onnx(path: Path, options: Mapping[str, Any], *, context: int | None, threads: int | None) -> Model:
    """Loads a folder of `export-onnx`.

    Args:
        options: those of this runtime, all of which must have their defaults.

    Raises:
        ConfigError: for one that has not.
    """
    for name, value in options.items():
        if value != inspect.signature(load).parameters[name].default:
            raise ConfigError(f"{name} {value}: has no meaning for ONNX Runtime; leave it out, or load the .mpo file")
    from mpo_runtime.onnx.running import load_folder

    return load_folder(path, context=context, threads=checked_threads(threads))


def open_weights(path: str | Path, *, verify: bool = False) -> Weights:
    """Opens a `.mpo` or GGUF file or a Hugging Face folder, given by its path or by its name in the local store.

    Args:
        verify: checks the checksums of a `.mpo` file.

    Raises:
        CheckpointError: when there is nothing at `path` and no such name in the store, or the model cannot be read.
        FormatError: when a `.mpo` file breaks a rule of SPEC.md.
    """
    return store.open_path(store.resolve(path), verify=verify)


def load_network(
    weights: Weights,
    *,
    chi: int | None = None,
    device: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    kv_type: str = "auto",
    activations: str = "int8",
    load: str = "auto",
) -> Decoder:
    """Loads the weights into a backend and returns the forward pass over it; the options are those of `load`.

    Raises:
        ConfigError: for a χ or a number of threads below one, or a backend or device that is absent.
    """
    if chi is not None and chi < 1:
        raise ConfigError(f"chi: expected at least 1, found {chi}")
    check_activations(activations)
    residence.check_load(load)
    ops: Ops
    device = find_device(device)
    chosen = choose_backend(backend, device)
    if chosen == "native":
        from mpo_runtime.backends.native import NativeOps

        native.instruction_set()
        native.set_threads(checked_threads(threads))
        kv_type = native_kv_type(weights, kv_type, activations)
        ops = NativeOps(weights, chi=chi, kv_type=kv_type, activations=activations)
        ops.load, ops.residence = residence.start(weights, load)
    elif chosen == "triton":
        from mpo_runtime.backends.triton import TritonOps

        check_device(device)
        kind = "f16" if kv_type == "auto" else kv_type
        ops = TritonOps(weights, chi=chi, device=device, kv_type=kind, exact=activations == "float")
    else:
        from mpo_runtime.backends.reference import ReferenceOps

        set_threads(threads)
        check_device(device)
        ops = ReferenceOps(weights, chi=chi, device=device, kv_type="f32" if kv_type == "auto" else kv_type)
    return decoder_for(weights.spec.architecture, ops)


def native_kv_type(weights: Weights, kv_type: str, activations: str) -> str:
    """The element type of the native backend's KV cache, `auto` decided."""
    if kv_type != "auto":
        return kv_type
    return "f16" if activations == "int8" and has_integers(weights) else "f32"


def find_device(device: str) -> str:
    """The device itself, or for `auto` the GPU that torch sees, else the CPU."""
    if device != "auto":
        return device
    if importlib.util.find_spec("torch") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_backend(backend: str, device: str) -> Literal["native", "triton", "reference"]:
    """The backend for a name (`auto`, `native`, `triton`, `reference`) and a device.

    Raises:
        ConfigError: for another name, for native kernels that were not built or cannot run on the device, or where Triton
            is absent or has no GPU.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend}: expected one of {', '.join(BACKENDS)}")
    if backend == "native":
        if device != "cpu":
            raise ConfigError(f"backend native: runs on the CPU, not on {device}; leave --backend out")
        if not native.available():
            raise ConfigError(
                "backend native: its kernels were not built; install a C++ compiler and mpo-runtime again"
            )
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("backend triton: needs the package triton; pip install 'mpo-runtime[gpu]'")
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError("backend triton: runs on a GPU; add --device cuda")
        return "triton"
    if backend == "auto":
        return "native" if device == "cpu" and native.available() else "reference"
    return "native" if backend == "native" else "reference"


def has_integers(weights: Weights) -> bool:
    """Whether any layer has a Quantized term; integer cores alone do not count."""
    return any(term.kind == "quantized" for linear in weights.spec.linears for term in linear.terms)


def checked_threads(threads: int | None) -> int | None:
    """The number of threads as given; raises ConfigError for less than one or more than 1,024."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        expected = "at least 1" if threads < 1 else f"at most {MOST_THREADS}"
        raise ConfigError(f"--threads: expected {expected}, found {threads}")
    return threads


def set_threads(threads: int | None) -> None:
    """Sets the number of torch's CPU threads. Raises ConfigError as `checked_threads` does.

    None keeps it, except that the first call lowers it to the CPUs that the process may use.
    """
    count = checked_threads(threads)
    if count is None:
        _heed_quota()
        return
    import torch

    torch.set_num_threads(count)


@cache
def _heed_quota() -> None:
    """Lowers torch's threads to the usable CPUs: torch counts cores and does not know the quota of a container."""
    import torch

    if usable_cpus() < torch.get_num_threads():
        torch.set_num_threads(usable_cpus())


def check_device(device: str) -> None:
    """Raises ConfigError for a device that torch does not know or that this machine does not have."""
    if device == "cpu":
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device {device}: expected cpu, cuda or another device of torch; use --device cpu") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device}: torch finds no CUDA device; use --device cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # which of them depends on the missing device
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device {device}: torch cannot use it here ({why}); use --device cpu") from None


def read_text_files(weights: Weights) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template of a model; None for each that it does not have.

    Raises:
        CheckpointError: where one of their files is damaged.
    """
    tokenizer = Tokenizer.from_files(weights.file)
    return tokenizer, None if tokenizer is None else ChatTemplate.from_files(weights.file)
