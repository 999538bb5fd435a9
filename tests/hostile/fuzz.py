"""Mutation fuzz of the reader: whatever the bytes, it answers with a FormatError or with values, quickly and sparingly.

    python -m tests.hostile.fuzz --cases 100000 [--first 0] [--seed 0]

Case n of a seed is always the same file. Each is opened, read completely through the numpy reference, and verified. A
case may take a second of processor time; its process may allocate 200 MB (a limit that the system enforces) beyond
what it holds before the first case, so run() wants a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpo_formats import FormatError, Mpo, MpoFile, reference
from tests.hostile.sample import CERTIFICATE, Sample, frame, valid_file

SECONDS = 1.0
BYTES = 200_000_000
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
NUMBERS = ("0", "-1", "1", "2", "3", "7", "8", "63", "64", "255", "65536", "2147483647", "2147483648", "4294967297")
NUMBERS += (
    "9223372036854775807",
    "18446744073709551616",
    "1e308",
    "1e999",
    "-0.0",
    "0.5",
    "1E2",
    "NaN",
    "01",
    "9" * 400,
)
VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**40, 0.5, "", "x", "\ud800", "é\0", [], {})
VALUES += ([0], [-1], [[1]], {"kind": "mpo"}, {"a": 1}, "f32", "int8", [4, 4], [2**31 - 1] * 16, "0" * 64, 1e308)
Mutation = Callable[[random.Random, Sample], bytes]


def place(draw: random.Random) -> int:
    """A byte's index: of the length field, of the header, or anywhere."""
    start = 8 + int.from_bytes(valid_file()[:8], "little")
    return draw.randrange(draw.choice((8, start, start, len(valid_file()))))


def flip_bits(draw: random.Random, sample: Sample) -> bytes:
    """One to eight bits."""
    raw = bytearray(valid_file())
    for _ in range(draw.choice((1, 1, 2, 8))):
        raw[place(draw)] ^= 1 << draw.randrange(8)
    return bytes(raw)


def splice(draw: random.Random, sample: Sample) -> bytes:
    """Bytes of the file, or random ones, are copied elsewhere, over or between what is there; or bytes are deleted."""
    raw = bytearray(valid_file())
    size, source, target = draw.choice((1, 2, 4, 16, 64, 500)), place(draw), place(draw)
    part = raw[source : source + size] if draw.random() < 0.7 else draw.randbytes(size)
    kind = draw.randrange(3)
    if kind == 0:
        raw[target : target + len(part)] = part
    elif kind == 1:
        raw[target:target] = part
    else:
        del raw[target : target + size]
    return bytes(raw)


def cut_or_extend(draw: random.Random, sample: Sample) -> bytes:
    """Another length of the file, or of its header."""
    raw = valid_file()
    kind = draw.randrange(4)
    if kind == 0:
        return raw[: draw.randrange(len(raw))]
    if kind == 1:
        return raw + draw.randbytes(draw.choice((1, 63, 64, 4096)))
    length = draw.choice((0, 8, 56, 64, 120, len(raw), len(raw) - 8, 2**22, 2**32, 2**63, draw.randrange(10_000)))
    if kind == 2:
        return length.to_bytes(8, "little") + raw[8:]
    return frame(sample.text().encode()[: draw.randrange(7000)], bytes(sample.data))


def replace_number(draw: random.Random, sample: Sample) -> bytes:
    """Numbers of the header's text, in the metadata as well as in the rows."""
    text = sample.text().encode()
    for _ in range(draw.choice((1, 1, 2, 4))):
        match = draw.choice(list(NUMBER.finditer(text)))
        old = match[0].decode()
        near = str(int(float(old)) + draw.choice((-1, 1))) if len(old) < 15 else "0"
        new = draw.choice((*NUMBERS, near, near, old + "0", "-" + old))
        text = text[: match.start()] + new.encode() + text[match.end() :]
    return frame(text, bytes(sample.data))


def any_value(draw: random.Random) -> Any:
    """One of VALUES, as a copy: what a later mutation does to it must not reach the next case."""
    return copy.deepcopy(draw.choice(VALUES))


def edit_tree(draw: random.Random, tree: Any) -> Any:
    """Changes, deletes, adds or doubles one value somewhere in plain data."""
    spot: tuple[Any, Any] | None = None
    value = tree
    while isinstance(value, dict | list) and value and (spot is None or draw.random() < 0.8):
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        spot, value = (value, key), value[key]
    if spot is None:
        return any_value(draw)
    inner, key = spot
    kind = draw.randrange(5)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, list):
        inner.insert(key, copy.deepcopy(inner[key]) if draw.random() < 0.1 else any_value(draw))
    elif kind == 1:
        inner[draw.choice(("extra", "dtype", "__metadata__", "mpo.padding.0", "é"))] = any_value(draw)
    elif kind == 2 and isinstance(inner[key], int) and not isinstance(inner[key], bool):
        inner[key] += draw.choice((-64, -1, 1, 64, 2**32))
    else:
        inner[key] = any_value(draw)
    return tree


def edit_rows(draw: random.Random, sample: Sample) -> bytes:
    """Fields of the tensors' rows."""
    for _ in range(draw.choice((1, 1, 3))):
        sample.table = edit_tree(draw, sample.table)
        if not isinstance(sample.table, dict):
            break
    return sample.bytes()


def edit_metadata(draw: random.Random, sample: Sample) -> bytes:
    """Fields of the metadata's records; sometimes of several, so that changes may agree with each other."""
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice(("layouts", "architecture", "layers", "layers", "vectors", "files", "provenance"))
        sample.metadata[key] = json.dumps(edit_tree(draw, json.loads(sample.metadata[key])))
    return sample.signed() if draw.random() < 0.5 else sample.bytes()


def edit_certificate(draw: random.Random, sample: Sample) -> bytes:
    """Fields of the certificate, signed; or bits of it."""
    begin, _ = sample.span(CERTIFICATE)
    if draw.random() < 0.3:
        sample.data[begin + draw.randrange(400)] ^= 1 << draw.randrange(8)
        return sample.signed()
    return sample.certificate(lambda record: edit_tree(draw, record))


def change_values(draw: random.Random, sample: Sample) -> bytes:
    """Bytes of the tensors, signed: the values change, and may be NaN or infinite."""
    for _ in range(draw.choice((1, 4, 64))):
        index = draw.randrange(len(sample.data))
        part = draw.choice((b"\xff", b"\xff\xff", b"\x7f\x80", b"\x00\x7c", draw.randbytes(4)))
        sample.data[index : index + len(part)] = part[: len(sample.data) - index]
    return sample.signed()


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    splice,
    cut_or_extend,
    replace_number,
    replace_number,
    edit_rows,
    edit_metadata,
    edit_metadata,
    edit_certificate,
    change_values,
)


def build(seed: int, number: int) -> bytes:
    """The file of case `number` of a seed."""
    draw = random.Random(f"{seed} {number}")
    return draw.choice(MUTATIONS)(draw, Sample())


def read_all(path: Path) -> str:
    """Opens, reads everything, verifies; returns where it was refused, or `valid`."""
    try:
        file = MpoFile(path)
    except FormatError:
        return "refused at opening"
    with file, np.errstate(all="ignore"):
        for linear in file.spec.linears:
            reference.matrix(file, linear)
            if any(isinstance(term, Mpo) for term in linear.terms):
                reference.matrix(file, linear, chi=2)
        for vector in file.spec.vectors:
            reference.float_tensor(file, f"{vector.name}.weight")
        for embedded in file.spec.files:
            file.file(embedded.name)
        try:
            file.certificates()
            file.verify()
        except FormatError:
            return "refused at verification"
    return "valid"


@dataclasses.dataclass(slots=True)
class Report:
    """What a run of the fuzz found."""

    cases: int
    outcomes: Counter[str]
    failures: list[str]
    slowest: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"fuzz: {self.cases} cases in {self.seconds:.0f} s: {counts}; {len(self.failures)} failures; "
            f"at most {self.slowest:.3f} s each, no allocation beyond {BYTES / 1e6:.0f} MB"
        )


def limit_memory() -> None:
    """Lets the process allocate 200 MB more than it has: beyond them an allocation is a MemoryError."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def run(cases: int, first: int = 0, seed: int = 0) -> Report:
    """Runs cases first … first + cases − 1; a failure is any other exception, or a bound that is exceeded."""
    report = Report(cases, Counter(), [])
    begin = time.perf_counter()
    valid_file()
    limit_memory()
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        path = Path(folder) / "fuzz.mpo"
        for number in range(first, first + cases):
            path.write_bytes(build(seed, number))
            start = time.process_time()
            try:
                report.outcomes[read_all(path)] += 1
            except Exception as error:  # whatever it is, it is a finding
                report.failures.append(f"case {number} of seed {seed}: {type(error).__name__}: {error}")
            used = time.process_time() - start
            report.slowest = max(report.slowest, used)
            if used > SECONDS:
                report.failures.append(f"case {number} of seed {seed}: {used:.2f} s")
    report.seconds = time.perf_counter() - begin
    return report


def main() -> None:
    """Runs the fuzz and prints its report; exits with 1 when there were failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = run(options.cases, options.first, options.seed)
    print("\n".join([*report.failures[:20], str(report)]))
    raise SystemExit(bool(report.failures))


if __name__ == "__main__":
    main()
