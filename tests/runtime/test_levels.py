"""One file on every instruction set that this CPU has: the same greedy text in float mode, which is the reference's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpo_exporter.plan.file import read_plan
from mpo_exporter.plan.options import Options
from mpo_exporter.source import embedded_model
from mpo_formats import Mpo, MpoFile, Quantized
from tests.conftest import ROOT
from tests.helpers import export_folder
from tests.runtime.native_cases import LEVELS, needs_native

pytestmark = needs_native
PROMPTS = [[0, 50, 60, 100, 2000, 400, 300, 77], [5, 6, 7, 8, 9, 10], [0, 900, 1800], [3000, 44, 1200, 17]]
TOKENS = 48
INTEGERS = [{"kind": "quantized", "bits": 5, "group": 64}]
# The layers that a plan of 4 bits stores otherwise, their terms, and the blocks of the transform of their inputs.
FILES: dict[str, dict[str, Any]] = {
    "integers": {"match": "_proj$", "terms": INTEGERS},
    "cores beside integers": {
        "match": "_proj$",
        "terms": [*INTEGERS, {"kind": "mpo", "chi": 6, "shape": "balanced", "dtype": "int8"}],
    },
    "cores instead of integers": {
        "match": "[kv]_proj$",
        "terms": [{"kind": "mpo", "chi": 96, "shape": "low-rank", "dtype": "f16"}],
    },
    "transforms": {"match": "_proj$|embed", "terms": INTEGERS, "hadamard": 128},
}
# What such a layer is, as a file has it.
KINDS: dict[str, tuple[tuple[type, ...], int]] = {
    "integers": ((Quantized,), 0),
    "cores beside integers": ((Quantized, Mpo), 0),
    "cores instead of integers": ((Mpo,), 0),
    "transforms": ((Quantized,), 128),
}
# Imports nothing of the tests, which need torch.
RUN = """
import json, sys
from mpo_runtime import load, native
from mpo_runtime.sampler import SamplingOptions
prompts, count = json.loads(sys.argv[2]), int(sys.argv[3])
greedy = SamplingOptions(temperature=0)
with load(sys.argv[1], activations="float", kv_type="f32", backend=sys.argv[4]) as model:
    texts = [[step.token for step in model.engine.generate(ids, greedy, max_tokens=count, stop_ids=())] for ids in prompts]
print(json.dumps([native.active()["native"], texts]))
"""


def texts(file: Path, backend: str, level: str) -> list[list[int]]:
    """What a process writes after each prompt, beyond the end token too, on that instruction set alone."""
    roots = os.pathsep.join(str(ROOT / part) for part in ("", "formats", "exporter"))
    environment = os.environ | {"PYTHONPATH": roots, "MPO_ISA": level}
    arguments = [str(file), json.dumps(PROMPTS), str(TOKENS), backend]
    command = [sys.executable, "-W", "ignore", "-c", RUN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    active, found = json.loads(done.stdout)
    assert active == level
    return list(found)


@pytest.mark.parametrize("kind", FILES)
def test_every_level_writes_the_text_of_the_reference(tmp_path: Path, kind: str) -> None:
    plan, file = tmp_path / "plan.json", tmp_path / "model.mpo"
    plan.write_text(json.dumps({"version": 1, "plan": "int4", "layers": [FILES[kind]]}))
    export_folder(embedded_model(), file, Options("int4", file=read_plan(plan)))
    with MpoFile(file) as opened:
        assert KINDS[kind] in {(tuple(map(type, one.terms)), one.hadamard) for one in opened.spec.linears}
    expected = texts(file, "reference", LEVELS[0])
    assert [len(one) for one in expected] == [TOKENS] * len(PROMPTS)
    assert len({token for one in expected for token in one}) > 20
    assert {name: texts(file, "native", name) for name in LEVELS} == dict.fromkeys(LEVELS, expected)
