"""Real processes with standard streams, encodings, home folders and locales as services and other systems have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import byte_tokenizer, granite_config, write_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"mpo-run": "mpo_runtime.cli.main", "mpo-export": "mpo_exporter.cli.main"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose name, template and tokens are not ASCII."""
    path = write_folder(tmp_path_factory.mktemp("streams") / "größe", granite_config(max_position_embeddings=256))
    (path / "chat_template.jinja").write_text("{{ messages[-1].content }} — χ", encoding="utf-8")
    (path / "text.txt").write_text("Größe und Länge, χ ≥ 3.\n" * 8, encoding="utf-8")
    assert byte_tokenizer()  # one token a byte
    return path


def run(
    program: str, *arguments: object, close: str = "", stdin: bytes | None = None, **environment: str | None
) -> subprocess.CompletedProcess[bytes]:
    """Runs a program as a shell does: `close` are redirections such as `<&-`; a variable of None is unset."""
    code = f"from {PROGRAMS[program]} import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "formats", "exporter"))}
    given = {key: value for key, value in {**base, **environment}.items() if value is not None}
    shell = ["bash", "-c", f'"$@" {close}', "bash", *command]
    options = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(shell, capture_output=True, env=given, check=False, timeout=120, **options)


def commands(folder: Path) -> dict[str, tuple[object, ...]]:
    sampled = ("-n", 3, "--temperature", 0)
    return {
        "generate": ("mpo-run", "generate", folder, "-p", "Grüße χ", *sampled),
        "json": ("mpo-run", "generate", folder, "-p", "Grüße χ", "--json", *sampled),
        "chat": ("mpo-run", "chat", folder, "-p", "Grüße χ", *sampled),
        "info": ("mpo-run", "info", folder, "--layers"),
        "ppl": ("mpo-run", "ppl", folder, folder / "text.txt"),
        "help": ("mpo-run", "chat", "--help"),
    }


NAMES = ["generate", "json", "info", "ppl", "help"]


@pytest.mark.parametrize("name", ["chat", "json", "info"])
def test_closed_streams_change_nothing(folder: Path, name: str) -> None:
    command = commands(folder)[name]
    expected = run(*command)
    assert expected.returncode == 0, expected.stderr
    for close in ("<&-", ">&-", "<&- >&- 2>&-"):
        done = run(*command, close=close)
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), (close, done.stderr)
        if close == "<&-" and name != "json":  # which tells times
            assert done.stdout == expected.stdout


def test_no_file_takes_the_number_of_a_closed_stream(folder: Path, tmp_path: Path) -> None:
    """What is printed must not end in a file that was opened under the number of standard output."""
    exported = tmp_path / "model.mpo"
    command = ("mpo-export", folder, "--plan", "int4", "--calib-windows", 0, "--measure-tokens", 0, "--out", exported)
    assert run(*command, close="<&- >&- 2>&-").returncode == 0
    assert run("mpo-run", "verify", exported).returncode == 0


def test_closed_input_is_an_empty_message(folder: Path) -> None:
    for command in ("chat", "generate"):
        done = run("mpo-run", command, folder, "--temperature", 0, "-n", 2, close="<&-")
        assert done.returncode in (0, 1) and b"Traceback" not in done.stderr
    assert b"the message is empty; give one with --prompt" in run("mpo-run", "chat", folder, close="<&-").stderr


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        *((name, "ascii") for name in NAMES),
        ("generate", "latin-1"),
        *(("json", encoding) for encoding in ("cp1252", "utf-8", "ascii:surrogateescape", "utf-16")),
    ],
)
def test_output_in_another_encoding(folder: Path, name: str, encoding: str) -> None:
    done = run(*commands(folder)[name], PYTHONIOENCODING=encoding)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    if name == "json":
        assert json.loads(done.stdout.decode(encoding.partition(":")[0]))["prompt"] == "Grüße χ"
    if name == "generate" and encoding == "ascii":
        assert done.stdout.startswith(rb"Gr\xfc\xdfe \u03c7")
    if name == "generate" and encoding == "latin-1":
        assert done.stdout.startswith("Grüße ".encode("latin-1") + rb"\u03c7")


def test_text_that_no_encoding_has(folder: Path) -> None:
    """A lone surrogate, such as a byte of a file name, reaches the output as an escape."""
    done = run("mpo-run", "generate", folder, "-p", os.fsdecode(b"a\xff"))
    assert done.stderr.decode().startswith("mpo-run: error: --prompt: not UTF-8 at byte 1 (0xFF); convert it")
    done = run("mpo-run", "info", os.fsdecode(b"a\xff.mpo"))
    assert rb"a\udcff.mpo: no such file or folder" in done.stderr and done.returncode == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "xx_YY.UTF-8"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": None, "LANG": None, "LC_CTYPE": None},
    ],
    ids=["unknown", "C", "ASCII", "unset"],
)
def test_locales(folder: Path, tmp_path: Path, environment: dict[str, str | None]) -> None:
    plain = tmp_path / "plain"
    plain.symlink_to(folder)
    for name in ("json", "info"):
        done = run(*(plain if item == folder else item for item in commands(folder)[name]), **environment)
        assert done.returncode == 0, done.stderr
        if name == "json":
            assert json.loads(done.stdout)["prompt"] == "Grüße χ"


def test_a_reader_that_ends(folder: Path) -> None:
    for name in ("info", "generate", "json"):
        done = run(*commands(folder)[name], close="| head -c 1")
        assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
        assert b"Broken pipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("name", ["info", "generate", "json", "chat"])
def test_a_full_disk_under_the_output(folder: Path, name: str) -> None:
    done = run(*commands(folder)[name], close="> /dev/full")
    assert done.returncode == 1
    assert done.stderr.decode() == "mpo-run: error: standard output: No space left on device\n"


def test_a_user_without_a_home_folder(folder: Path, tmp_path: Path) -> None:
    homeless: dict[str, str | None] = dict.fromkeys(("HOME", "MPO_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"))
    assert run(*commands(folder)["chat"], **homeless).returncode == 0
    assert run("mpo-run", "list", **homeless, PYTHONWARNINGS="error").returncode == 0  # the list of users names a home


def test_notes_are_printed_once(folder: Path, tmp_path: Path) -> None:
    copied = write_folder(tmp_path / "model", granite_config(pad_token_id=-1))
    command = ("mpo-export", copied, "--plan", "int4", "--calib-windows", 0, "--measure-tokens", 20)
    done = run(*command, "--out", tmp_path / "model.mpo")
    assert done.returncode == 0
    assert done.stderr.decode().count("note: ") == 1
    assert f"note: {copied}/config.json: pad_token_id: -1 is ignored" in done.stderr.decode()
