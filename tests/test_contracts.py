"""What holds for the whole project: import arrows, lean imports, forbidden code, sizes, the gates."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "mpo_formats": ROOT / "formats" / "mpo_formats",
    "mpo_runtime": ROOT / "mpo_runtime",
    "mpo_exporter": ROOT / "exporter" / "mpo_exporter",
}
# mpo_formats <- mpo_runtime <- mpo_exporter
MAY_IMPORT = {
    "mpo_formats": {"mpo_formats"},
    "mpo_runtime": {"mpo_formats", "mpo_runtime"},
    "mpo_exporter": {"mpo_formats", "mpo_runtime", "mpo_exporter"},
}
THIRD_PARTY_OF_FORMATS = {"numpy", "safetensors"}
OURS = {"mpo_formats", "mpo_runtime", "mpo_exporter", "mpo_server", "benchmarks", "tests"}
ORACLES = {"transformers", "jinja2", "hypothesis", "pytest"}  # tests compare with them, the packages do without
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "typer", "matplotlib"}
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def sources(package: str) -> list[Path]:
    """List the Python files of a package."""
    return sorted(PACKAGES[package].rglob("*.py"))


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of what a module imports; relative imports stay inside and are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def forbidden_imports(package: str, tree: ast.AST) -> list[str]:
    """Name the imports in a module of ``package`` that break the arrows or that the package must do without."""
    problems = []
    for line, name in imported_names(tree):
        top = name.partition(".")[0]
        if top in OURS and top not in MAY_IMPORT[package]:
            problems.append(f"{line}: {package} imports {name}")
        elif top in ORACLES:
            problems.append(f"{line}: {package} imports {name}, which only tests may")
        elif package == "mpo_formats" and top not in OURS | THIRD_PARTY_OF_FORMATS | sys.stdlib_module_names:
            problems.append(f"{line}: mpo_formats imports {name}, expected numpy, safetensors and the standard library")
    return problems


def forbidden_constructs(tree: ast.AST) -> list[str]:
    """Name asserts and everything that can unpickle: the modules, torch.load and numpy's allow_pickle."""
    problems = [
        f"{line}: imports {name}" for line, name in imported_names(tree) if name.partition(".")[0] in UNPICKLERS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            problems.append(f"{node.lineno}: assert")
        elif isinstance(node, ast.Attribute) and node.attr == "load" and getattr(node.value, "id", "") == "torch":
            problems.append(f"{node.lineno}: torch.load")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            problems += [f"{node.lineno}: torch.load" for alias in node.names if alias.name == "load"]
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            problems.append(f"{node.lineno}: allow_pickle")
    return problems


def long_functions(tree: ast.AST) -> list[str]:
    """Name the functions that pass the longest that STYLE allows."""
    return [
        f"{node.lineno}: {node.name} has {length} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    ]


def in_files(package: str, problems_of: dict[Path, list[str]]) -> list[str]:
    """Put the file before each problem, and refuse a package in which nothing was scanned."""
    if not problems_of:
        pytest.fail(f"no Python file was found in {PACKAGES[package]}")
    return [f"{path.relative_to(ROOT)}:{problem}" for path, problems in problems_of.items() for problem in problems]


def parse(path: Path) -> ast.Module:
    """Parse one source file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    assert in_files(package, {path: forbidden_imports(package, parse(path)) for path in sources(package)}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_assert_and_no_pickle(package: str) -> None:
    assert in_files(package, {path: forbidden_constructs(parse(path)) for path in sources(package)}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_stay_readable(package: str) -> None:
    assert in_files(package, {path: long_functions(parse(path)) for path in sources(package)}) == []
    texts = [*sources(package), *PACKAGES[package].rglob("*.[ch]pp")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in texts}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


BAD_EXAMPLE = """
import pickle, numpy.linalg
from mpo_exporter.plan.named import Plan
import torch
def late():
    import benchmarks.nano
    importlib.import_module("transformers.models")
    assert torch.load("x")
    numpy.load("x", allow_pickle=True)
from .sibling import thing
from torch import load
"""


def test_the_scans_find_what_they_look_for() -> None:
    tree = ast.parse(BAD_EXAMPLE)
    assert sorted(forbidden_imports("mpo_formats", tree)) == [
        "11: mpo_formats imports torch, expected numpy, safetensors and the standard library",
        "3: mpo_formats imports mpo_exporter.plan.named",
        "4: mpo_formats imports torch, expected numpy, safetensors and the standard library",
        "6: mpo_formats imports benchmarks.nano",
        "7: mpo_formats imports transformers.models, which only tests may",
    ]
    assert sorted(forbidden_imports("mpo_exporter", tree)) == [
        "6: mpo_exporter imports benchmarks.nano",
        "7: mpo_exporter imports transformers.models, which only tests may",
    ]
    assert sorted(forbidden_constructs(tree)) == [
        "11: torch.load",
        "2: imports pickle",
        "8: assert",
        "8: torch.load",
        "9: allow_pickle",
    ]
    assert long_functions(ast.parse("def just_right():\n" + "    x = 1\n" * 59)) == []
    assert long_functions(ast.parse("async def too_long():\n" + "    x = 1\n" * 60)) == ["1: too_long has 61 lines"]


def loaded_by(module: str) -> set[str]:
    """Import ``module`` in a fresh interpreter and return the top-level modules that it loaded."""
    roots = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
    code = f"import sys; import {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": roots},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_runtime_stays_light() -> None:
    loaded = loaded_by("mpo_runtime")
    assert "mpo_runtime" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("program", ["mpo_runtime.cli.main", "mpo_exporter.cli.main"])
def test_the_programs_answer_help_without_the_heavy_libraries(program: str) -> None:
    assert loaded_by(program) & (HEAVY - {"typer"}) == set()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("gate", ["ruff check", "ruff format --check", "mypy"])
def test_quality_gate(gate: str) -> None:
    tool, *arguments = gate.split()
    if importlib.util.find_spec(tool) is None:
        pytest.fail(f"{tool} is not installed; install the dev extra")
    run = subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode:
        pytest.fail(f"{gate}\n{run.stdout}{run.stderr}", pytrace=False)
