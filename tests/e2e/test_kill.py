"""A power cut or a kill while a file is written: the target is absent, the old file, or a complete new one."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mpo_formats import MpoFile
from mpo_formats.writer import TEMPORARY
from tests.e2e.kill_child import round_spec
from tests.formats import tiny

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "formats")])}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that forks writers of tmp_path/out/model.mpo."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "tests.e2e.kill_child", str(tmp_path / "out" / "model.mpo")]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.communicate()  # closes its input, which ends it


def kill_once(server: subprocess.Popen[str], number: int, delay: float) -> None:
    """Starts a writer at a round, kills it after `delay` seconds, waits until it is dead."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"go {number}\n")
    server.stdin.flush()
    child = int(server.stdout.readline())
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert server.stdout.readline() == "dead\n"


def state(target: Path, first: int, before: int | None) -> tuple[str, int | None]:
    """What the target is after a kill in rounds from `first`; fails when it is not a complete file."""
    if not target.exists():
        assert before is None, "the old file has gone"
        return "absent", None
    with MpoFile(target, verify=True) as file:
        number = int(file.spec.provenance.options["round"])
        assert file.spec == round_spec(number)
        assert file.certificates() == tiny.certificates()
    assert number == before or number >= first
    return ("old" if number == before else "new"), number


def kill_many(server: subprocess.Popen[str], folder: Path, kills: int) -> str:
    """Kills writers at random moments; every third time there is no old file. Returns the counts."""
    draw = random.Random(4)
    target = folder / "model.mpo"
    counts: Counter[str] = Counter()
    before: int | None = None
    for kill in range(kills):
        if kill % 3 == 0:
            target.unlink(missing_ok=True)
            before = None
        first = 1_000_000 * (kill + 1)
        # Most kills fall into the first file, the others between any two of many.
        kill_once(server, first, draw.uniform(0, 0.012) if draw.random() < 0.7 else draw.uniform(0, 0.1))
        found, before = state(target, first, before)
        counts[found] += 1
        leftovers = [path for path in folder.iterdir() if path != target]
        assert all(path.name.startswith(".model.mpo.") and path.name.endswith(TEMPORARY) for path in leftovers)
        counts["temporary files left over"] += len(leftovers)
        for path in leftovers:
            path.unlink()
    assert counts["absent"] + counts["old"] + counts["new"] == kills
    return f"{kills} kills: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def test_kills_at_random_moments(
    server: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = kill_many(server, tmp_path / "out", 15)
    with capsys.disabled():
        print(f"\n{report}")


@pytest.mark.long
def test_two_hundred_kills_at_random_moments(
    server: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = kill_many(server, tmp_path / "out", 200)
    with capsys.disabled():
        print(f"\n{report}")
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (absent|old|new|temporary)", report)}
    # Kills that all came before or after the writing would prove nothing.
    assert all(counts.get(name, 0) >= 5 for name in ("absent", "old", "new", "temporary"))


WRITE_ONE = """
import sys
from pathlib import Path
from tests.formats import tiny
tiny.write(Path(sys.argv[1]), tiny.model(), measure=lambda _: tiny.certificates())
"""


def test_the_order_is_write_sync_rename_sync_of_the_folder(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is absent; install it (apt-get install strace) to check the order of system calls")
    out = tmp_path.resolve() / "out"
    out.mkdir()
    log, target = tmp_path / "log", out / "model.mpo"
    calls = "trace=write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
    trace = [strace, "-f", "-y", "-s", "0", "-e", calls, "-o", str(log)]
    done = subprocess.run(
        [*trace, sys.executable, "-c", WRITE_ONE, str(target)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    events = list(system_calls(log.read_text(encoding="utf-8"), out, target))
    assert set(events[:-3]) == {"write temporary"}
    assert len(events) > 5
    assert events[-3:] == ["sync temporary", "rename temporary to target", "sync folder"]
    MpoFile(target, verify=True).close()


def system_calls(log: str, out: Path, target: Path) -> Iterator[str]:
    """The successful calls of a strace log that touch the folder, in plain words."""
    names = {str(out): "folder", str(target): "target"}
    for line in log.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += (\d+)", line)
        paths = re.findall(r'<([^<>]*)>|"([^"]*)"\.{0,3}', call[2]) if call else []
        touched = [path for pair in paths for path in pair if path.startswith(str(out))]
        if not call or not touched:
            continue
        words = [names.get(path, "temporary" if path.endswith(TEMPORARY) else path) for path in touched]
        kind = {"fsync": "sync", "fdatasync": "sync", "pwrite64": "write", "writev": "write"}.get(call[1], call[1])
        yield f"{'rename' if kind.startswith('rename') else kind} {' to '.join(words)}"


TERMINATED = """
import time
from mpo_runtime.cli import console

def app(prog_name):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

console.run(app, "program")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_terminated_cleans_up(number: signal.Signals) -> None:
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup
    with subprocess.Popen(
        [sys.executable, "-c", TERMINATED], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "begun\n"
        child.send_signal(number)
        assert child.stdout.read() == "cleaned up\n"
    assert child.returncode == 128 + number
