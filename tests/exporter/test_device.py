"""Exports on another device than the CPU (other_device.py): everything is where it should be, the file is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_exporter.plan.options import Options, Target
from mpo_exporter.quantize import native
from mpo_runtime.text.token_text import TokenText
from tests.exporter.other_device import DeviceError, other_device
from tests.helpers import export_folder, granite_config, some_ids, write_folder

TEXT = TokenText("calibration", np.array(some_ids(24 * 32), np.int64), 0, "1" * 64)
HELD_OUT = TokenText("held-out", np.array(some_ids(128, 9), np.int64), 0, "2" * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(
        tmp_path_factory.mktemp("device") / "model",
        granite_config(hidden_size=32, intermediate_size=64, num_hidden_layers=2),
        dtype=torch.bfloat16,
    )


@pytest.fixture
def device() -> Iterator[str]:
    with other_device() as name:
        yield name


def test_the_emulated_device_is_one(device: str) -> None:
    here, there = torch.ones(3, 3), torch.eye(3, device=device)
    assert str((there @ here.to(device)).device.type) == device
    assert torch.equal((there @ here.to(device)).cpu(), here)
    with pytest.raises(DeviceError, match="same device"):
        there @ here
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    there[1:].mul_(2)  # a view, changed in place
    assert torch.equal(there.cpu(), torch.diag(torch.tensor([1.0, 2, 2])))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("plan", ["int4", pytest.param("auto", marks=pytest.mark.long)])
def test_an_export_on_another_device_is_the_same(folder: Path, tmp_path: Path, device: str, plan: str) -> None:
    """Up to the order of sums: a batched product need not add up as single ones do."""
    options = Options(plan, target=Target(size=60_000) if plan == "auto" else Target())
    found = []
    with native.torch_alone():
        for name in ("cpu", device):
            target = tmp_path / f"{name}.mpo"
            task = {"calibration": TEXT, "text": HELD_OUT, "windows": 2, "device": name}
            found.append(export_folder(folder, target, options, **task))
    assert found[0].spec.linears == found[1].spec.linears
    here, there = (one.comparison for one in found)
    assert here is not None and there is not None
    assert there.kl_mean == pytest.approx(here.kl_mean, rel=0.05)
