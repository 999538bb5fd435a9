"""`--device`: which backend a device gets, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_formats import ConfigError
from mpo_runtime import loading, room
from mpo_runtime.loading import choose_backend, decided_kv_type, find_device, load, open_weights
from tests.golden.test_golden import FOLDER as GOLDEN
from tests.helpers import granite_config, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("device") / "model", granite_config())


def test_a_gpu_gets_the_kernels_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert choose_backend("auto", "cuda") == choose_backend("auto", "cuda:1") == "triton"
    assert choose_backend("reference", "cuda") == choose_backend("auto", "mps") == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == "cuda" and find_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == "cpu"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    words = r"needs the package triton; pip install 'mpo-runtime\[gpu\]', or add --backend reference"
    for backend, where in (("auto", "device cuda"), ("triton", "backend triton")):
        with pytest.raises(ConfigError, match=f"{where}: {words}"):
            choose_backend(backend, "cuda")
    assert choose_backend("reference", "cuda") == "reference"


def test_a_model_that_does_not_fit_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 200_000))
    with pytest.raises(
        ConfigError, match=r"needs .* GB of memory .* on cuda:0, .*--kv-type int8.*--device cpu; .*vLLM"
    ):
        load(folder, device="cuda:0")


@pytest.mark.parametrize(
    "name", ["sum", "int3", "int8", "dense-f16", "mpo-int4", "bias-untied", "hadamard", "transform"]
)
@pytest.mark.parametrize("options", [{"exact": False, "chi": None}, {"exact": True, "chi": 2}])
def test_the_memory_of_weights_is_predicted(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    from mpo_runtime.backends.triton import TritonOps

    with open_weights(GOLDEN / f"{name}.mpo") as weights:
        ops = TritonOps(weights, device="cpu", **options)
        found = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of([ops._linears, ops._vectors])}
        held = sum(found.values())  # views of the same matrix count once
        assert room.device_bytes(weights.spec, **options) == held


def tensors_of(found: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """All tensors in dictionaries, lists and objects of this project."""
    seen = set() if seen is None else seen
    if id(found) in seen:
        return []
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, dict):
        inside = list(found.values())
    elif isinstance(found, list | tuple):
        inside = list(found)
    elif type(found).__module__.startswith("mpo_runtime"):
        slots = [getattr(found, slot) for slot in getattr(type(found), "__slots__", ())]
        inside = [*getattr(found, "__dict__", {}).values(), *slots]
    else:
        return []
    return [tensor for one in inside for tensor in tensors_of(one, seen)]


def test_the_memory_of_the_cache_is_predicted(folder: Path) -> None:
    weights = open_weights(folder)
    spec = weights.spec
    rows = 2 * spec.architecture.num_hidden_layers * spec.architecture.num_key_value_heads * 10
    size = spec.architecture.head_dim
    found = [room.cache_bytes(spec, 10, kind) for kind in ("f32", "f16", "bf16", "int8")]
    assert found == [rows * size * 4, rows * size * 2, rows * size * 2, rows * (size + 4)]
    assert decided_kv_type(weights, "triton", "auto", "float") == "f16"
    assert decided_kv_type(weights, "reference", "auto", "int8") == "f32"
    assert decided_kv_type(weights, "native", "int8", "int8") == "int8"
    weights.close()
