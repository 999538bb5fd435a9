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
from mpo_runtime import native, residence
from mpo_runtime.backends.ops import check_activations
from mpo_runtime.engine import Speculation
from mpo_runtime.engine.scheduler import PARALLEL
from mpo_runtime.engine.sequence import checked_context
from mpo_runtime.machine import usable_cpus
from mpo_runtime.model import Model
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.onnx.manifest import is_exported
from mpo_runtime.room import require_room
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
    deterministic: bool | None = None,
) -> Model:
    """Loads a `.mpo` or GGUF file, a Hugging Face folder or a model of the local store.

    Args:
        path: a file, a folder, or a name that `mpo-run list` shows.
        chi: uses only the first `chi` values of every bond: a smaller, faster, less accurate model from the same file.
        device: `cpu`, a torch device such as `cuda`, or `auto`: the GPU where torch sees one.
        backend: `native`, `triton`, `reference`, or `auto`: triton on a CUDA device, native on a CPU where its kernels were
            built, else reference.
        threads: CPU threads of this process, for all its models; None keeps their number, which starts at all cores that
            the process may use (a container's CPU quota is heeded).
        context: tokens that the KV cache holds; where None, the longest context of the model, but at most 4,096.
        kv_type: element type of the KV cache: f32, f16, bf16, or int8, which the reference has not. `auto` is f16 on a GPU, and
            where the native backend multiplies integers with int8 activations, whose rounding is far coarser; else f32.
        activations: what integers are multiplied with, `int8` or `float`; on a GPU several tokens in bf16, or in float32.
        load: where the native backend reads weights from: `map`, the mapped file; `copy`, memory of its own, into which they
            are moved in the background; `auto`, the faster of the two by a short measurement.
        verify: checks the file's checksums first.
        engine: `mpo`, this runtime; `onnx`, ONNX Runtime, for a folder of `mpo-run export-onnx`; `auto`, what fits the path.
        parallel, prefix_bytes, speculate: how many texts are generated at a time, what is kept of the KV cache for later
            prompts, and whether tokens are drafted from what a text repeats (engine/scheduler.py).
        deterministic: whether texts are the same beside others; None: except with triton, whose batches would run one by one.

    Raises:
        MpoError: for a missing, damaged or unsupported file, or an option out of range.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine}: expected one of {', '.join(ENGINES)}")
    options: dict[str, Any] = {"chi": chi, "kv_type": kv_type, "activations": activations}
    options |= {"backend": backend, "device": checked_device(device), "load": load}
    if engine == "onnx" or (engine == "auto" and is_exported(Path(path))):
        return load_onnx(Path(path), {**options, "speculate": speculate}, context=context, threads=threads)
    weights = open_weights(path, verify=verify)
    try:
        chosen = require_fit(weights, str(path), context, options)
        network = load_network(weights, threads=threads, **options)
        tokenizer, template = read_text_files(weights)
        more: dict[str, Any] = {"parallel": parallel, "prefix_bytes": prefix_bytes, "speculate": speculate}
        more |= {"context": context, "deterministic": chosen != "triton" if deterministic is None else deterministic}
        return Model(weights, network, tokenizer, template, **more)
    except BaseException:
        weights.close()
        raise


def require_fit(weights: Weights, name: str, context: int | None, options: Mapping[str, Any]) -> str:
    """The backend of a model; raises ConfigError where the model does not fit into the memory that it would run in.

    The reference is not asked: it rebuilds matrices from the file where memory does not suffice.
    """
    chosen = choose_backend(options["backend"], options["device"])
    if chosen != "reference":
        kv_type = decided_kv_type(weights, chosen, options["kv_type"], options["activations"])
        context = checked_context(weights.spec.architecture, context)
        require_room(weights, name, context, {**options, "kv_type": kv_type})
    return chosen


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
    device = checked_device(device)
    chosen = choose_backend(backend, device)
    kv_type = decided_kv_type(weights, chosen, kv_type, activations)
    if chosen == "native":
        from mpo_runtime.backends.native import NativeOps

        native.instruction_set()
        native.set_threads(checked_threads(threads))
        ops = NativeOps(weights, chi=chi, kv_type=kv_type, activations=activations)
        ops.load, ops.residence = residence.start(weights, load)
    elif chosen == "triton":
        from mpo_runtime.backends.triton import TritonOps

        ops = TritonOps(weights, chi=chi, device=device, kv_type=kv_type, exact=activations == "float")
    else:
        from mpo_runtime.backends.reference import ReferenceOps

        set_threads(threads)
        ops = ReferenceOps(weights, chi=chi, device=device, kv_type=kv_type)
    return decoder_for(weights.spec.architecture, ops)


def decided_kv_type(weights: Weights, backend: str, kv_type: str, activations: str) -> str:
    """The element type of a backend's KV cache, `auto` decided."""
    if kv_type != "auto":
        return kv_type
    rounds = backend == "native" and activations == "int8" and has_integers(weights)
    return "f16" if rounds or backend == "triton" else "f32"


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
            is absent or has no GPU. `auto` never takes the reference on a CUDA device: it is slow there, so it is asked for.
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
    if backend == "triton" or (backend == "auto" and device.startswith("cuda")):
        if importlib.util.find_spec("triton") is None:
            where = "backend triton" if backend == "triton" else f"device {device}"
            raise ConfigError(
                f"{where}: needs the package triton; pip install 'mpo-runtime[gpu]', or add --backend reference (slow)"
            )
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


def checked_device(device: str) -> str:
    """The device that a name stands for (`find_device`); raises ConfigError as `check_device` does."""
    found = find_device(device)
    check_device(found)
    return found


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
