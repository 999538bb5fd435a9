"""docs/plans.md: every option, plan, key and file that it names exists, its example works, and nothing is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer.main

from mpo_exporter.cli import main as cli
from mpo_exporter.plan.file import LAYER_KEYS, PLAN_KEYS, SHAPES, TERM_KEYS, read_plan
from mpo_exporter.plan.named import PLANS
from mpo_formats.spec import BITS, GROUPS
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import granite_config, write_folder

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
# Options of the command that other documents tell about.
ELSEWHERE = {
    "--out",
    "--force",
    "--eval-text",
    "--measure-tokens",
    "--certify-chi",
    "--device",
    "--threads",
    "--version",
    "--task",
    "--calib",
    "--calib-windows",
    "--help",
}


def options_of(name: str) -> set[str]:
    command = typer.main.get_command(cli.app).commands[name]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_every_option_that_is_named_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    known = options_of("export") | options_of("profile")
    assert named - known == set() and len(named) > 20


def test_every_option_about_plans_is_named() -> None:
    about = {
        name for name in options_of("export") if name.startswith("--") and not name.startswith(("--heal", "--no-"))
    }
    missing = {name for name in about - ELSEWHERE if name not in TEXT and not name.startswith("--report")}
    assert missing == set()


def test_every_plan_and_key_is_named() -> None:
    names = (
        *PLANS,
        *PLAN_KEYS,
        *LAYER_KEYS,
        *TERM_KEYS,
        *(key for keys in TERM_KEYS.values() for key in keys if key != "kind"),
    )
    assert [name for name in names if f"`{name}`" not in TEXT] == []
    values = (*map(str, BITS), *map(str, GROUPS), *SHAPES)
    assert [value for value in values if value not in TEXT] == []


def test_the_example_of_a_plan_file_is_one(tmp_path: Path) -> None:
    [example] = re.findall(r"^    (\{\n.*?^    \})", TEXT, re.MULTILINE | re.DOTALL)
    assert json.loads(example)["version"] == 1
    (tmp_path / "plan.json").write_text(example)
    folder = write_folder(tmp_path / "model", granite_config(hidden_size=64, intermediate_size=64))
    plan = read_plan(tmp_path / "plan.json")
    assert plan.plan == "int4" and len(plan.layers(Checkpoint(folder).spec)) == 9


@pytest.mark.parametrize("kind", ["survey", "sensitivity", "outcomes", "latency", "rates"])
def test_the_kept_files_are_those_that_the_code_writes(kind: str) -> None:
    sources = (ROOT / "exporter" / "mpo_exporter").rglob("*.py")
    assert any(f'CacheFile("{kind}"' in path.read_text(encoding="utf-8") for path in sources)
    assert f"`{kind}-…`" in TEXT


def test_the_files_and_variables_that_are_named_exist() -> None:
    for path in re.findall(r"`(benchmarks/[a-z_]+\.py)`", TEXT):
        assert (ROOT / path).exists(), path
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "exporter" / "mpo_exporter").rglob("*.py")]
    for name in ("MPO_CACHE", "MPO_HOME", "XDG_CACHE_HOME"):
        assert name in TEXT and any(f'"{name}"' in source for source in sources)
