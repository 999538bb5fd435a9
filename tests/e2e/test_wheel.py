"""The wheels: they hold what they need and no more, and run in an environment without a compiler or the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("mpo_runtime/", "mpo_formats/", "mpo_exporter/", "mpo_server/", "mpo_vllm/")
MOST_BYTES = 40_000_000
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=["native", "pure"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A wheel built from the source tree, as `make wheel` does before auditwheel names its platform."""
    target = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), str(ROOT)]
    try:  # without the network where the build's tools are installed
        import nanobind  # noqa: F401
        import scikit_build_core  # noqa: F401

        command.insert(4, "--no-build-isolation")
    except ImportError:
        pass
    extra = {"MPO_NO_NATIVE": "1"} if request.param == "pure" else {}
    subprocess.run(command, check=True, env=os.environ | extra)
    [built] = target.glob("*.whl")
    return request.param, built


def test_a_wheel_holds_what_it_needs(wheel: tuple[str, Path]) -> None:
    kind, path = wheel
    names = zipfile.ZipFile(path).namelist()
    info = [name for name in names if ".dist-info/" in name]
    rest = [name for name in names if name not in info]
    assert [name for name in rest if not name.startswith(PACKAGES)] == []
    assert [name for name in names if name.endswith((".cpp", ".hpp", ".pyc", ".mpo"))] == []
    modules = [name for name in names if "_native." in name and name.endswith(".so")]
    assert len(modules) == (kind == "native"), modules
    assert path.name.endswith("-py3-none-any.whl") == (kind == "pure")
    models = [name for name in names if name.endswith(".safetensors")]
    assert models == ["mpo_exporter/data/granite-nano/model.safetensors"], "the embedded model is in one place"
    assert path.stat().st_size < MOST_BYTES


def test_an_installed_wheel_generates_without_a_compiler(wheel: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = wheel
    environment = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    zipfile.ZipFile(path).extractall(packages)  # what an installer does with a wheel, without asking an index
    # What the wheel needs comes from this environment; its .pth files, and with them the source tree, are not read.
    needed = [place for place in sys.path if place.endswith("-packages") or (Path(place) / "numpy").is_dir()]
    (packages / "needed.pth").write_text("\n".join(needed) + "\n")
    bare = {"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path), "MPO_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(python), "-c", "from mpo_runtime.cli.main import main; main()", *words],
            env=bare,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    machine = json.loads(run("info", "--json"))
    assert machine["backend"]["name"] == ("native" if kind == "native" else "reference")
    model = packages / "mpo_exporter" / "data" / "granite-nano"
    text = run("generate", str(model), "-p", "Once upon a time", "-n", "8", "--temperature", "0")
    assert text.startswith("Once upon a time") and len(text) > len("Once upon a time") + 8
