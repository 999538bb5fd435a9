"""What all tests share: the folder of shared inputs, deterministic hypothesis, and a bound on torch's threads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read when the libraries are imported: no test reaches the network, and tokenizers do not warn after a fork.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton's kernels run in its interpreter, unless TRITON_INTERPRET=0 asks for a GPU; read when Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Small matrices are faster on one thread, many times so where other programs use the machine.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run; slow machines are no reason to fail.
settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared models and texts: MPO_SHARED, or `shared` beside the repository; skip without it."""
    folder = Path(os.environ.get("MPO_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"the shared folder {folder} is absent; set MPO_SHARED to one")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep measurements of the tests out of the user's cache; processes that tests start inherit the folder."""
    os.environ["MPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def few_torch_threads() -> None:
    """Keep torch from taking every core, where a collected test module has imported it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 on every CPU, for comparison with other implementations."""
    from mpo_exporter.calibrate import precision

    monkeypatch.setattr(precision, "has_units", lambda: False)
