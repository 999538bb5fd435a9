"""The two programs as a user runs them: the main job on a trained model, and every bad input as one line."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mpo_exporter import export as export_module
from mpo_formats import CheckpointError, MpoFile, MpoWriter
from mpo_runtime.cli import main as runtime_cli
from mpo_runtime.measure import compare, perplexity
from tests.e2e.conftest import Outcome, Run
from tests.helpers import export_folder, granite_config, network, some_ids, write_folder, write_weights

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = {"mpo-run": "mpo_runtime.cli.main", "mpo-export": "mpo_exporter.cli.main"}
STORY = "Once upon a time, there was a little girl named Lily."


def spawn(program: str, *arguments: object, after: str = "") -> Outcome:
    """Runs a program as a process of its own, as its entry point does; `after` is a statement to run at its end."""
    code = f"import sys\nfrom {MODULES[program]} import main\ntry:\n    main()\nfinally:\n    {after or 'pass'}"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "formats", "exporter"))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(hidden_size=64, num_hidden_layers=1, tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("cli") / "little", config, shards=2)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The folder with one shard, to be damaged."""
    return write_folder(tmp_path / "source", json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mpo_exporter.plan.options import Options

    return export_folder(folder, tmp_path_factory.mktemp("file") / "little.mpo", Options("auto", chi=2)).path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A short text to measure on. " * 6)
    return path


# The main job


@pytest.mark.shared
def test_export_dense_and_generate_tell_the_story(shared: Path, tmp_path: Path) -> None:
    """Issue 2's own acceptance test, as two processes."""
    target = tmp_path / "stories.mpo"
    source = shared / "models" / "stories260K-granite"
    exporting = spawn("mpo-export", source, "--plan", "dense", "--out", target, "--measure-tokens", 60)
    assert exporting.code == 0, exporting
    assert exporting.err == ""
    with MpoFile(target) as file:
        assert file.verify() > 0
        assert file.certificates().entries[0].quality.same_top1 == 1
    telling = spawn("mpo-run", "generate", target, "-p", "Once upon a time", "--temperature", 0, "--max-tokens", 24)
    assert telling.code == 0, telling
    assert telling.out.startswith(f"{STORY} ")
    assert [line for line in telling.err.splitlines() if "native kernels" not in line] == []


def test_export_prints_what_was_won_and_lost(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    done = run("mpo-export", folder, "--chi", 2, "--eval-text", text, "--threads", 1)
    assert done.code == 0, done
    target = tmp_path / "little.mpo"
    for word in ("parameters", "file bytes", "bits per weight", "perplexity", "KL to dense, mean", "same top token"):
        assert word in done.out
    with MpoFile(target) as file:
        (entry,) = file.certificates().entries
        options = dict(file.spec.provenance.options)
        assert int(options.pop("target_bytes")) >= target.stat().st_size
        chosen = {"plan": "auto", "chi": "2", "cores": "2", "cored": "every matrix"}
        assert options == chosen | {"calibration": "calibration.jsonl", "effort": "normal"}
    assert f"{entry.quality.perplexity:.2f}" in done.out
    again = run("mpo-export", folder, "--chi", 2, "--measure-tokens", 0, "--force", "--cores", 3, "--plan", "paper")
    assert again.code == 0 and "quality was not measured: --measure-tokens 0" in again.out
    with MpoFile(target) as file:
        assert file.certificates().entries == ()


def test_generate_streams_a_reproducible_text(run: Run, exported: Path) -> None:
    arguments = ("generate", exported, "-p", "Hello", "--max-tokens", 12, "--ctx-size", 40, "--seed", 5)
    first, second = run("mpo-run", *arguments), run("mpo-run", *arguments)
    assert first.code == 0 and first.out == second.out
    assert first.out.startswith("Hello") and len(first.out) > len("Hello\n")
    greedy = {run("mpo-run", *arguments[:-2], "--temperature", 0, "--seed", seed).out for seed in (1, 2)}
    assert len(greedy) == 1


def test_ppl_prints_what_the_measure_says(run: Run, exported: Path, folder: Path, text: Path) -> None:
    ids = np.array([*text.read_bytes()], np.int64)
    np.save(text.with_name("ids.npy"), ids)
    for model in (exported, folder):
        expected = perplexity(network(model), ids, 20)
        done = run("mpo-run", "ppl", model, text.with_name("ids.npy"), "--window", 20, "--json")
        facts = json.loads(done.out)
        assert facts["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert facts["error"] == pytest.approx(expected.error, rel=1e-6)
        assert (facts["tokens"], facts["windows"], facts["window"]) == (ids.size, expected.windows, 20)
    words = run("mpo-run", "ppl", exported, text)
    assert words.code == 0 and "(standard error)" in words.out and "bits per byte" in words.out


def test_bits_per_byte_are_of_the_text(run: Run, exported: Path, text: Path) -> None:
    facts = json.loads(run("mpo-run", "ppl", exported, text, "--json").out)
    bits = facts["nats"] * facts["tokens"] / math.log(2)
    assert facts["bits_per_byte"] == pytest.approx(bits / len(text.read_bytes()))


def test_compare_prints_what_the_measure_says(run: Run, exported: Path, folder: Path, text: Path) -> None:
    np.save(text.with_name("ids.npy"), np.array(some_ids(90), np.int64))
    expected = compare(network(exported), network(folder), np.array(some_ids(90), np.int64), 16)
    ids = text.with_name("ids.npy")
    options = ("--window", 16, "--backend", "reference", "--json")
    done = run("mpo-run", "compare", exported, "--to", folder, "--text", ids, *options)
    facts = json.loads(done.out)
    for name in ("kl_mean", "kl_999", "same_top1", "cosine", "mse"):
        assert facts[name] == pytest.approx(getattr(expected, name), rel=1e-6)
    cut = json.loads(run("mpo-run", "compare", exported, "--to", exported, "--text", ids, "--chi", 1, "--json").out)
    assert cut["kl_mean"] > 0  # only the model is cut, not the reference
    words = run("mpo-run", "compare", exported, "--to", exported, "--text", ids)
    assert "same most likely token 100.00 %" in words.out


def test_info_and_verify(run: Run, exported: Path) -> None:
    facts = json.loads(run("mpo-run", "info", exported, "--json").out)
    assert facts["bytes"] == exported.stat().st_size
    assert facts["architecture"]["hidden_size"] == 64
    words = run("mpo-run", "info", exported, "--layers")
    assert words.code == 0 and "model.layers.0.mlp.down_proj" in words.out and "runs on" in words.out
    assert ": whole (" in run("mpo-run", "verify", exported).out


# Bad input

Damage = Callable[[Path], Any]


def change_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    write_weights(folder, tensors)


def cut_shard(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


SOURCES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ("source: has no config.json", "copy it from")),
    "truncated shard": (cut_shard, ("model.safetensors: truncated or damaged shard", "download it again")),
    "missing tensor": (drop_tensor, ("tensor model.norm.weight is missing", "download the folder again")),
    "unknown architecture": (
        change_config(model_type="mamba"),
        ("model_type 'mamba'", "expected one of granite, llama"),
    ),
    "longrope": (
        change_config(rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        ("RoPE scaling 'longrope' is not supported", "expected one of default, "),
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_damaged_source_is_one_line(run: Run, copied: Path, tmp_path: Path, case: str) -> None:
    damage, words = SOURCES[case]
    damage(copied)
    run("mpo-export", copied, "--out", tmp_path / "out.mpo").assert_error("mpo-export", *words)
    run("mpo-run", "generate", copied, "-p", "x").assert_error("mpo-run", *words)
    assert not list(tmp_path.glob("*.mpo")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--chi", 0), ("--chi 0: the bond dimension must be at least 1",)),
        (("--chi", -5), ("--chi -5",)),
        (("--cores", 1), ("--cores 1: expected 2 to 8",)),
        (("--threads", 0), ("--threads: expected at least 1, found 0",)),
        (("--measure-tokens", -1), ("--measure-tokens -1: expected 0 or more",)),
        (("--device", "abacus"), ("device abacus: expected cpu, cuda",)),
        (("--eval-text", "absent.txt"), ("absent.txt: cannot be read (No such file or directory)",)),
        (("--out", "absent/out.mpo"), ("absent/out.mpo: cannot write", "No such file or directory", "--out")),
        (("--out", "."), (".: is a folder; give the name of a file with --out",)),
    ],
    ids=str,
)
def test_export_options_that_cannot_be_honoured(
    run: Run, folder: Path, tmp_path: Path, arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    run("mpo-export", folder, *arguments).assert_error("mpo-export", *words)
    assert list(tmp_path.glob("**/*.mpo")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "absent.mpo", "-p", "x"), ("absent.mpo: no such file or folder", "give a .mpo file")),
        (("info", "absent.mpo"), ("absent.mpo: no such file or folder",)),
        (("generate", "FILE", "-p", "x", "--chi", 0), ("chi: expected at least 1, found 0",)),
        (("ppl", "FILE", "TEXT", "--chi", 0), ("chi: expected at least 1, found 0",)),
        (("ppl", "FILE", "absent.txt"), ("absent.txt: cannot be read",)),
        (("ppl", "FILE", "TEXT", "--window", 1), ("window: expected 2 to 64 tokens, found 1",)),
        (("generate", "FILE", "-p", "x" * 64), ("prompt: 65 tokens do not fit into a context of 64", "shorten it")),
        (("generate", "FILE", "-p", "x", "--ctx-size", 65), ("context of 65 tokens: the model was made for 64",)),
        (("generate", "FILE", "-p", "x", "--temperature", -1), ("temperature is -1.0, expected 0 or more",)),
        (("generate", "FILE", "-p", "x", "--device", "cuda:x"), ("device cuda:x: expected cpu",)),
        (("chat", "FILE", "-p", "x"), ("has no chat template",)),
        (("info", "TEXT"), ("text.txt: ",)),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_run_options_that_cannot_be_honoured(
    run: Run, exported: Path, text: Path, arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    places = {"FILE": exported, "TEXT": text}
    outcome = run("mpo-run", *(places.get(argument, argument) for argument in arguments))
    note = "note: running without native kernels"
    lines = [line for line in outcome.err.splitlines() if not line.startswith(note)]
    Outcome(outcome.code, outcome.out, "\n".join(lines)).assert_error("mpo-run", *words)
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no/such/folder", ("no/such/folder: no such folder", "or a hub id owner/name")),
        ("nothing", ("nothing: no such folder; give demo, granite, granite-2b",)),
        (
            "nobody/nothing",
            ("nobody/nothing: cannot be downloaded", "offline", "copy the model's folder here", "FOLDER"),
        ),
        (
            "granite-2b",
            (
                "ibm-granite/granite-3.3-2b-instruct@707f574c62054322f6b5b04b6d075f0a8f05e0f0: cannot be downloaded",
                "mpo-export FOLDER",
            ),
        ),
    ],
)
def test_models_that_are_not_here(run: Run, tmp_path: Path, model: str, words: tuple[str, ...]) -> None:
    """HF_HUB_OFFLINE=1 is set for all tests."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    run("mpo-export", model).assert_error("mpo-export", *words)
    assert list(tmp_path.glob("*.mpo")) == []


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that stands where an export would write: whatever fails, it must stay."""
    path = tmp_path / "little.mpo"
    path.write_bytes(b"an older file")
    yield path
    assert path.read_bytes() == b"an older file"
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".partial")] == []


def test_a_full_disk_is_known_before_the_work(run: Run, folder: Path, old: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(export_module, "build_linear", lambda *_: pytest.fail("the work began"))
    outcome = run("mpo-export", folder, "--force", "--measure-tokens", 0)
    outcome.assert_error("mpo-export", "little.mpo: cannot write", "No space left on device", "free some space")
    assert re.search(r"cannot write \d+\.\d MB", outcome.err)


def test_a_disk_that_fills_meanwhile(run: Run, folder: Path, old: Path, monkeypatch: Any) -> None:
    append, calls = MpoWriter._append, []

    def fails_later(writer: MpoWriter, content: bytes) -> None:
        calls.append(len(content))
        append(writer, content) if len(calls) < 9 else full()

    monkeypatch.setattr(MpoWriter, "_append", fails_later)
    outcome = run("mpo-export", folder, "--force", "--measure-tokens", 0)
    outcome.assert_error("mpo-export", "little.mpo: cannot write", "No space left on device", "--out")


def test_an_existing_file_is_kept_without_force(run: Run, folder: Path, old: Path) -> None:
    outcome = run("mpo-export", folder)
    outcome.assert_error("mpo-export", "little.mpo: exists already", "--out", "--force")
    assert outcome.out == ""


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_export_leaves_only_its_work(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    target = tmp_path / "little.mpo"
    if force:
        target.write_bytes(b"an older file")
    build, calls = export_module.build_linear, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return build(*arguments)

    monkeypatch.setattr(export_module, "build_linear", interrupted)
    outcome = run("mpo-export", folder, "--measure-tokens", 0, *(["--force"] if force else []))
    assert outcome.code != 0
    assert "Traceback" not in outcome.err
    assert "the work done so far is kept in" in outcome.out + outcome.err
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        ".little.mpo.export",
        *(["little.mpo"] if force else []),
    ]
    assert not force or target.read_bytes() == b"an older file"
    monkeypatch.setattr(export_module, "build_linear", build)
    assert run("mpo-export", folder, "--measure-tokens", 0, "--force").code == 0
    assert [item.name for item in tmp_path.iterdir()] == ["little.mpo"] and target.stat().st_size > 100


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("mpo-run", ("generate",)),
        ("mpo-run", ("generate", "FILE", "--heat", "1")),
        ("mpo-run", ("dance",)),
        ("mpo-run", ("generate", "FILE", "--chi", "many")),
        ("mpo-export", ()),
        ("mpo-export", ("demo", "--plan", "best")),
        ("mpo-export", ("demo", "--chi", "1.5")),
        ("mpo-run", ("compare", "FILE")),
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(run: Run, program: str, arguments: tuple[str, ...]) -> None:
    outcome = run(program, *arguments)
    assert outcome.code == 2
    assert outcome.out == "" and "Usage: " in outcome.err and "Traceback" not in outcome.err


def test_help_lists_the_options_of_an_export_and_the_commands() -> None:
    """And neither loads torch nor numpy, so that it comes at once."""
    for arguments, words in (
        (("--help",), ("Usage: mpo-export [OPTIONS]", "--target-size", "\n  heal ", "\n  profile ", "\n  report ")),
        (("-h",), ("Usage: mpo-export [OPTIONS]",)),
        (("heal", "--help"), ("Usage: mpo-export heal [OPTIONS]", "--heal-tokens")),
        (("profile", "--help"), ("Usage: mpo-export profile [OPTIONS]", "--level")),
        (("report", "--help"), ("Usage: mpo-export report [OPTIONS]", "--without-cores")),
    ):
        done = spawn("mpo-export", *arguments, after="print(sys.modules.keys() & {'torch', 'numpy', 'rich'})")
        assert done.code == 0 and all(word in done.out for word in words), done
        assert done.out.endswith("\nset()\n")


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, arguments in (("0", ["--debug"]), ("1", [])):
        monkeypatch.setenv("MPO_DEBUG", variable)
        monkeypatch.setattr(sys, "argv", ["mpo-run", "info", str(tmp_path / "absent.mpo"), *arguments])
        with pytest.raises(CheckpointError, match="no such file or folder"):
            runtime_cli.main()


def test_errors_of_a_real_process(tmp_path: Path) -> None:
    """One line and exit code 1; with --debug a traceback that ends in the same words."""
    absent = tmp_path / "absent.mpo"
    spawn("mpo-run", "info", absent).assert_error("mpo-run", f"{absent}: no such file or folder")
    debugged = spawn("mpo-run", "info", absent, "--debug")
    assert debugged.code == 1
    assert debugged.err.startswith("Traceback (most recent call last)")
    assert "no such file or folder" in debugged.err.splitlines()[-1]


def test_half_a_file_is_named(run: Run, exported: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.mpo"
    half.write_bytes(exported.read_bytes()[: exported.stat().st_size // 2])
    run("mpo-run", "info", half).assert_error("mpo-run", "half.mpo")
    changed = bytearray(exported.read_bytes())
    changed[len(changed) // 2] ^= 1
    half.write_bytes(changed)
    run("mpo-run", "verify", half).assert_error("mpo-run", "half.mpo", "checksum", "damaged")


def test_a_model_with_a_bad_value_names_its_layer(run: Run, copied: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"][0, 0] = torch.nan
    write_weights(copied, tensors)
    outcome = run("mpo-export", copied, "--plan", "int4", "--measure-tokens", 0)
    outcome.assert_error("mpo-export", name, "not finite", "check the source model")
    assert [item.name for item in tmp_path.iterdir()] == ["source"]
