"""The certificate from export to verify --quality: it holds, it is recomputed, and a false one is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpo_formats import Certificates, MpoFile, MpoWriter
from tests.e2e.conftest import Run
from tests.helpers import write_folder

TEXT = "It was a bright day, and the two of them walked along the river until the bridge. " * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


@pytest.fixture
def certified(run: Run, folder: Path, tmp_path: Path) -> Path:
    """A file whose certificate has the whole file and the prefix at χ = 2."""
    (tmp_path / "text.txt").write_text(TEXT)
    done = run(
        "mpo-export",
        folder,
        "--plan",
        "paper",
        "--chi",
        4,
        "--certify-chi",
        2,
        "--out",
        "m.mpo",
        "--eval-text",
        "text.txt",
    )
    assert done.code == 0, done.err
    return tmp_path / "m.mpo"


def rewritten(path: Path, target: Path, certificates: Certificates) -> Path:
    """The same file with other certificates."""
    with MpoFile(path) as file, MpoWriter(target, file.spec) as writer:
        for tensor in writer.pending():
            writer.write(tensor.name, file.array(tensor.name))
        writer.commit(lambda _: certificates)
    return target


def test_the_certificate_holds_for_the_file_and_its_prefix(run: Run, certified: Path, folder: Path) -> None:
    with MpoFile(certified) as file:
        assert [entry.chi for entry in file.certificates().entries] == [None, 2]
    done = run("mpo-run", "verify", certified, "--quality", "--text", "text.txt", "--to", folder)
    assert done.code == 0, done.err
    assert "whole file: KL mean: certified" in done.out
    assert "whole file: the certificate holds" in done.out
    assert "--chi 2: the certificate holds" in done.out


def test_info_names_the_prefixes_with_their_quality(run: Run, certified: Path) -> None:
    out = run("mpo-run", "info", certified).out
    assert "quality       --chi 2: perplexity" in out
    assert "--chi         1 (" in out
    assert "4 (" in out


@pytest.mark.parametrize("field", ["perplexity", "dense_perplexity", "kl_mean", "same_top1"])
def test_a_false_figure_is_found(run: Run, certified: Path, folder: Path, tmp_path: Path, field: str) -> None:
    with MpoFile(certified) as file:
        entry = file.certificates().entries[0]
    false = dataclasses.replace(entry.quality, **{field: getattr(entry.quality, field) * 0.9})
    lying = rewritten(certified, tmp_path / "lying.mpo", Certificates((dataclasses.replace(entry, quality=false),)))
    done = run("mpo-run", "verify", lying, "--quality", "--text", "text.txt", "--to", folder)
    assert done.code == 1
    assert "the certificate does not hold" in done.err


def test_another_text_is_refused(run: Run, certified: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT + "!")
    done = run("mpo-run", "verify", certified, "--quality", "--text", "other.txt")
    assert done.code == 1
    assert "is not the text of the certificate" in done.err


def test_a_file_without_a_certificate_says_so(run: Run, folder: Path) -> None:
    assert run("mpo-export", folder, "--plan", "int4", "--out", "bare.mpo", "--measure-tokens", 0).code == 0
    done = run("mpo-run", "verify", "bare.mpo", "--quality")
    done.assert_error("mpo-run", "has no certificate")
