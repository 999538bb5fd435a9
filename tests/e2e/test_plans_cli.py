"""mpo-export's plans, as a user gives them: dry runs, targets, named plans, files, and what cannot be had."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mpo_exporter.cli.options import PLAN_NAMES
from mpo_exporter.plan.file import read_plan
from mpo_exporter.plan.named import PLANS
from mpo_exporter.plan.options import Options, Target
from mpo_exporter.plan.planner import Planner
from mpo_formats import Mpo, MpoFile
from tests.e2e.conftest import Run
from tests.helpers import granite_config, write_folder

CONFIG = granite_config(hidden_size=64, intermediate_size=128, logits_scaling=16.0, embedding_multiplier=1.0)
WORDS = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
QUICK = ("--calib-windows", 8, "--measure-tokens", 0)
TEXT = ("--calib", "calib.txt")


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    (tmp_path / "calib.txt").write_text(20 * WORDS)
    return write_folder(tmp_path / "little", CONFIG)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return float(found[1].replace(",", ""))


def test_a_dry_run_predicts_and_writes_no_file(run: Run, folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run("mpo-export", folder, "--target-size", "100KB", *TEXT, *QUICK, "--dry-run")
    assert done.code == 0, done
    assert sorted(tmp_path.rglob("*")) == before
    for words in (
        "predicted bytes",
        "predicted memory",
        "predicted KL",
        "predicted speed",
        "predicted export with --effort best",
    ):
        assert words in done.out
    assert "0.self_attn.q_proj" in done.out
    size = number(r"predicted bytes: ([0-9,]+)", done.out)
    again = run("mpo-export", folder, "--target-size", "100KB", *TEXT, *QUICK)
    assert again.code == 0 and "measured before" in again.out
    assert Path("little.mpo").stat().st_size == size
    assert 99_000 <= size <= 100_000


def test_a_dry_run_of_a_plan_without_text(run: Run, folder: Path) -> None:
    done = run("mpo-export", folder, "--plan", "int4", "--measure-tokens", 0, "--dry-run")
    assert done.code == 0 and "predicted KL: unknown" in done.out and "give --calib" in done.out


Check = Callable[[list[str]], bool]
CASES: dict[str, tuple[tuple[object, ...], Check]] = {
    "a ratio": (("--target-ratio", 0.4, *TEXT), lambda cores: True),
    "a KL": (("--max-kl", 0.5, *TEXT), lambda cores: True),
    "key projections": (("--plan", "k-proj", "--rank", 4, "--min-dim", 16), lambda cores: cores == ["k_proj"] * 2),
    "one key projection": (
        ("--plan", "k-proj", "--min-dim", 16, "--layers", "layers.1", "--quant-bits", 16, "--no-norm-correction"),
        lambda cores: cores == ["k_proj"],
    ),
    "a share": (("--plan", "paper", "--compression-ratio", 0.3, *TEXT), lambda cores: len(cores) == 4),
    "the top": (("--plan", "paper", "--top-k", 2, "--layers", "mlp", *TEXT), lambda cores: len(cores) == 2),
    "measured": (
        ("--plan", "paper", "--top-k", 1, "--layers", "q_proj", "--sensitivity", "full", *TEXT),
        lambda cores: cores == ["q_proj"],
    ),
    "measured bits": (("--target-size", "90KB", "--sensitivity", "full", *TEXT), lambda cores: True),
    "corrected": (("--plan", "corrected", *TEXT), lambda cores: len(cores) == 14),
}


@pytest.mark.parametrize("case", CASES)
def test_plans_write_what_they_say(run: Run, folder: Path, case: str) -> None:
    arguments, check = CASES[case]
    done = run("mpo-export", folder, "--chi", 4, *arguments, *QUICK)
    assert done.code == 0, done
    with MpoFile("little.mpo") as file:
        file.verify()
        cores = [
            linear.name.rsplit(".")[-1]
            for linear in file.spec.linears
            if any(isinstance(term, Mpo) for term in linear.terms)
        ]
    assert check(cores), cores


def test_demanded_cores_are_compared_with_the_same_bytes_without(run: Run, folder: Path, tmp_path: Path) -> None:
    Path("held.txt").write_text(8 * WORDS)
    before = sorted(path.name for path in tmp_path.iterdir())
    asked = (folder, "--chi", 40, "--target-size", "160KB", *TEXT, "--calib-windows", 8, "--eval-text", "held.txt")
    done = run("mpo-export", *asked)
    assert done.code == 0, done
    assert "χ of 40 is above the full rank of 4 of 14 operators" in done.out
    [line] = [line for line in done.out.splitlines() if "the same bytes without cores" in line and "│" in line]
    assert number(r"KL ([0-9.]+)", line) >= 0 and re.search(r"1[56][0-9](\.[0-9]+)? kB", line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "little.mpo"])
    with MpoFile("little.mpo") as file:
        assert 155_000 < file.size <= 160_000
        assert file.spec.provenance.options["cored"] == "every matrix"
        for linear in file.spec.linears[1:]:
            assert [term.kind for term in linear.terms] == ["quantized", "mpo"]
    alone = run("mpo-export", *asked, "--no-compare-cores", "--force")
    assert alone.code == 0 and "without cores" not in alone.out
    small = run("mpo-export", folder, "--chi", 40, "--target-size", "130KB", *TEXT, *QUICK, "--out", "small.mpo")
    small.assert_error("mpo-export", "too few for cores of --chi 40", "the smallest such file takes", "or --chi ")


def test_the_default_size_is_said(run: Run, folder: Path) -> None:
    done = run("mpo-export", folder, *TEXT, *QUICK, "--dry-run")
    assert done.code == 0, done
    assert "no target was given: took " in done.out and "4.25 bits per weight" in done.out


def test_a_measured_kl_stays_below_the_one_that_was_asked_for(run: Run, folder: Path) -> None:
    Path("held.txt").write_text(8 * WORDS)
    done = run("mpo-export", folder, "--max-kl", 0.01, *TEXT, "--calib-windows", 8, "--eval-text", "held.txt")
    assert done.code == 0, done
    with MpoFile("little.mpo") as file:
        [entry] = file.certificates().entries
    assert entry.quality.kl_mean <= 0.01 or "above --max-kl" in done.out


def test_a_saved_plan_makes_the_same_layers(run: Run, folder: Path) -> None:
    first = run("mpo-export", folder, "--target-size", "90KB", "--save-plan", "plan.json", *TEXT, *QUICK)
    assert first.code == 0, first
    second = run("mpo-export", folder, "--plan", "file:plan.json", "--out", "second.mpo", *TEXT, *QUICK)
    assert second.code == 0, second
    with MpoFile("little.mpo") as one, MpoFile("second.mpo") as other:
        assert one.spec.linears == other.spec.linears
    assert json.loads(Path("plan.json").read_text())["version"] == 1


def test_the_saved_plan_is_the_one_that_was_carried_out(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first plan of --max-kl is taken as a miss, and the second one made smaller: that one is saved."""
    bounds = [0.01, 1.0]
    carried_out: list[Options] = []

    def bounded(planner: Planner, options: Options) -> Options:
        carried_out.append(replace(options, target=Target(max_kl=bounds[len(carried_out)])))
        return carried_out[-1]

    monkeypatch.setattr("mpo_exporter.export.within_kl", bounded)
    monkeypatch.setattr("mpo_exporter.cli.export.exceeds_kl", lambda result, options, *, again: len(carried_out) < 2)
    done = run("mpo-export", folder, "--max-kl", 0.01, "--save-plan", "plan.json", *TEXT, *QUICK)
    assert done.code == 0 and len(carried_out) == 2, done
    with MpoFile("little.mpo") as file:
        saved = read_plan(Path("plan.json")).layers(file.spec)
        assert {linear.name: linear for linear in file.spec.linears} == saved
    refused = run("mpo-export", folder, "--out", "other.mpo", "--save-plan", "plan.json", *TEXT, *QUICK)
    refused.assert_error("mpo-export", "plan.json: exists already", "--save-plan", "--force")
    assert not Path("other.mpo").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--plan", "file:none.json"), ("none.json: cannot be read",)),
        (("--plan", "file:bad.json"), ("bad.json", "the key 'layer' is given twice")),
        (("--target-size", "1KB"), ("too few", "the smallest file of this model takes")),
        (("--target-ratio", 2), ("--target-ratio 2: expected more than 0 and at most 1",)),
        (("--max-kl", 0), ("--max-kl 0: expected more than 0",)),
        (("--max-kl", 0.1, "--target-bpw", 3), ("--target-bpw and --max-kl: give one of them",)),
        (("--plan", "paper", "--target-bpw", 3), ("expected the plan auto, found paper",)),
        (("--top-k", 3), ("--top-k and --compression-ratio: expected the plan paper",)),
        (
            (
                "--plan",
                "k-proj",
            ),
            ("no key projection", "--min-dim 64"),
        ),
        (("--plan", "k-proj", "--quant-bits", 3), ("--quant-bits 3: expected one of 4, 8, 16",)),
        (("--layers", "nothing"), ("--layers nothing: matches no layer",)),
        (("--sensitivity", "best"), ("--sensitivity best: expected one of fast, full",)),
    ],
    ids=str,
)
def test_plans_that_cannot_be_had_are_one_line(
    run: Run, folder: Path, arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    Path("bad.json").write_text('{"version": 1, "layers": [{"layer": "a", "layer": "a", "terms": []}]}')
    done = run("mpo-export", folder, *arguments, *TEXT, *QUICK)
    assert done.code == 1 and "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err
    assert done.err.count("\n") == 1 and not Path("little.mpo").exists()


def test_the_names_of_plans_on_the_command_line() -> None:
    assert tuple(PLANS) == PLAN_NAMES


def test_profile_by_command(run: Run, folder: Path) -> None:
    done = run("mpo-export", "profile", folder, *TEXT, "--calib-windows", 8, "--out", "out", "--no-plots")
    assert done.code == 0, done
    assert "by type" in done.out and json.loads(Path("out/profile.json").read_text())["level"] == "fast"
    run("mpo-export", "profile", "absent").assert_error("mpo-export profile", "absent: no such folder")
