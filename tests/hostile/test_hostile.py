"""Every handcrafted hostile file gives exactly its message, and every rule of SPEC.md has a file that breaks it."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import pytest

from mpo_formats import FormatError, MpoFile
from tests.hostile import cases
from tests.hostile.sample import Sample, valid_file

SPEC = (Path(__file__).resolve().parents[2] / "formats" / "SPEC.md").read_text(encoding="utf-8")
MEMORY = 200_000_000


def rules() -> dict[str, list[str]]:
    """The rules of SPEC.md, section 10, with their messages as regular expressions."""
    found = {}
    for number, messages in re.findall(r"^\| (R\d+) \|.*\| (`.*`) \|$", SPEC.split("\n## 10 ")[1], re.M):
        found[number] = [pattern(text) for text in re.findall(r"`([^`]+)`", messages.replace("\\|", "|"))]
    return found


def pattern(template: str) -> str:
    """A message of SPEC.md as a regular expression: … stands for anything, (a|b) for one of them."""
    escaped = re.escape(template).replace("…", ".+")
    alternatives = re.sub(
        r"\\\(([^()]*\\\|[^()]*)\\\)", lambda match: f"({match[1].replace(chr(92) + '|', '|')})", escaped
    )
    return alternatives.replace("\\ ", " ")


def test_the_valid_file_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "valid.mpo"
    path.write_bytes(valid_file())
    assert Sample().bytes() == valid_file()
    assert Sample().signed() == valid_file()
    with MpoFile(path, verify=True) as file:
        assert len(file.certificates().entries) == 1


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.rule}-{case.name}")
def test_a_hostile_file_gives_its_message(tmp_path: Path, case: cases.Case) -> None:
    path = tmp_path / "hostile.mpo"
    path.write_bytes(case.build(Sample()))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            if case in cases.VERIFIED:
                with MpoFile(path) as file:
                    file.verify()
            else:
                MpoFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message == f"hostile.mpo: {case.message}"
    assert message.isprintable()
    assert any(re.fullmatch(rule, case.message) for rule in rules()[case.rule]), rules()[case.rule]
    assert peak < MEMORY


def test_every_rule_has_a_case_and_every_case_a_name_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = list(rules())
    assert numbers == [f"R{number}" for number in range(1, len(numbers) + 1)]
    assert {case.rule for case in cases.CASES} == set(numbers)
    assert len({case.name for case in cases.CASES}) == len(cases.CASES) >= 60
    with capsys.disabled():
        print(f"\nhostile files: {len(cases.CASES)} cases for {len(numbers)} rules")


def test_the_script_writes_all_files(tmp_path: Path) -> None:
    cases.main(tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(cases.MESSAGES)
    assert [case.name for case in cases.CASES] == list(cases.MESSAGES)
