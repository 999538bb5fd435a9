"""Targets as users write them, and the options that they make."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from mpo_exporter.plan.budget import default_bytes
from mpo_exporter.plan.options import Options
from mpo_exporter.request import Asked, size_bytes
from mpo_formats import ConfigError, PlanError
from tests.exporter.test_budget import size_of
from tests.exporter.test_plan import dense_model


@pytest.mark.parametrize(
    ("text", "size"),
    [("2.1GB", 2_100_000_000), ("900 MB", 900_000_000), ("1200000", 1_200_000), ("1.5kb", 1500), ("7B", 7)],
)
def test_sizes_as_users_write_them(text: str, size: int) -> None:
    assert size_bytes(text) == size


def test_targets_in_bytes() -> None:
    spec = dense_model()
    make: Callable[..., Options] = lambda **given: Asked(**given).resolved("auto", Options(), spec, True)  # noqa: E731
    assert make(target_size="1MB").target_bytes == 10**6
    assert make(target_bpw=3.0).target_bytes == int(3 * spec.architecture.parameters() / 8)
    assert make(target_ratio=0.5).target_bytes == pytest.approx(
        size_of(spec, spec.linears) / 2, rel=0.2
    )  # header and certificate aside
    assert make().target_bytes == default_bytes(spec)
    assert Asked().resolved("auto", Options(), spec, False).target_bytes is None
    assert make(max_kl=0.1).target_bytes is None or make(max_kl=0.1).max_kl is None
    with pytest.raises(ConfigError, match="--target-size and --max-kl: give one of them"):
        Asked(target_size="1MB", max_kl=0.1).options("auto", 32, 2)
    for wrong in (float("inf"), float("nan"), 1e308, 33.0):
        with pytest.raises(ConfigError, match=re.escape(f"--target-bpw {wrong:g}: expected more than 0")):
            Asked(target_bpw=wrong).options("auto", 32, 2)
    assert make(target_size="9" * 400).target_bytes == 10**18
    with pytest.raises(ConfigError, match="--target-ratio 1.5: expected more than 0 and at most 1"):
        Asked(target_ratio=1.5).options("auto", 32, 2)
    with pytest.raises(PlanError, match="expected the plan auto, found int4"):
        Asked(target_size="1MB").resolved("int4", Options("int4"), spec, True)
