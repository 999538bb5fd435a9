"""GGUF files as what an export starts from: the same file as from a Hugging Face folder of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from mpo_exporter import source as source_module
from mpo_exporter.cli.main import main
from mpo_exporter.plan.options import Options
from mpo_exporter.source import find_source, open_source
from mpo_formats import CheckpointError, Dense, MpoFile
from mpo_runtime.weights.gguf import Gguf
from tests.gguf_files import byte_level, write_gguf
from tests.helpers import export_folder, granite_config, random_tensors, write_folder

CONFIG = granite_config(hidden_size=64, intermediate_size=96, vocab_size=258, bos_token_id=1, eos_token_id=257)


def write(path: Path, kind: Kind = Kind.F16, **changes: Any) -> Path:
    config = CONFIG | changes
    tensors = {name: tensor.numpy() for name, tensor in random_tensors(config, 0, torch.float32).items()}
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    letters = byte_level(tokens, [("h", "e")], "gpt-2", ["<|end|>"])

    def tokenizer(writer: Any) -> None:
        letters(writer)
        writer.add_bos_token_id(1)

    return write_gguf(path, config, tensors, kinds=kind, tokenizer=tokenizer)


def content(path: Path) -> dict[str, bytes]:
    """All tensors of a file, without those about where it came from."""
    return {name: array.tobytes() for name, array in load_file(path).items() if not name.startswith(("mpo.", "file."))}


@pytest.mark.parametrize("plan", ["int4", "dense"])
def test_an_export_holds_the_same_tensors_as_one_from_the_folder(tmp_path: Path, plan: str) -> None:
    folder = write_folder(tmp_path / "folder", CONFIG, dtype=torch.float16)
    path = write(tmp_path / "model.gguf")
    files = [tmp_path / "a.mpo", tmp_path / "b.mpo"]
    for source, target in zip((folder, path), files, strict=True):
        export_folder(source, target, Options(plan))
    with MpoFile(files[1]) as ours, MpoFile(files[0]) as theirs:
        assert ours.spec.linears == theirs.spec.linears and ours.spec.architecture == theirs.spec.architecture
        assert ours.spec.provenance.source == "model.gguf"
        assert [file.name for file in ours.spec.files] == ["tokenizer.json", "tokenizer_config.json"]
        vectors = {vector.dtype for vector in ours.spec.vectors}
    assert vectors == {"f32"}  # as llama.cpp stores norms
    first, second = map(content, files)
    norms = {name for name in first if name.endswith("norm.weight")}
    assert {name: first[name] for name in first.keys() - norms} == {
        name: second[name] for name in second.keys() - norms
    }


def test_integers_are_dequantised_to_two_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", Kind.Q8_0)
    export_folder(path, tmp_path / "model.mpo", Options("dense"))
    with MpoFile(tmp_path / "model.mpo") as file, open_source(path) as source:
        name = "model.layers.1.self_attn.k_proj"
        assert file.spec.linear(name).terms == (Dense("f16"),)
        exact = Gguf(path).array(f"{name}.0.weight")
        np.testing.assert_array_equal(file.array(f"{name}.0.weight"), exact.astype(np.float16))
        assert source.weights.array(f"{name}.0.weight") is source.weights.array(f"{name}.0.weight")


def test_the_command_exports_heals_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "small.Q8_0.gguf", Kind.Q8_0, max_position_embeddings=128)
    text = tmp_path / "text.txt"
    text.write_text("he said the hen heard the other hero here\n" * 400)
    on = f"--eval-text {text}"
    calls = [
        f"export {path} --chi 4 --calib {text} --calib-windows 8 {on}",
        f"heal small.Q8_0.mpo --teacher {path} --text {text} --heal-tokens 2000 {on}",
        f"report small.Q8_0.mpo --teacher {path} --out report --calib {text} {on}",
    ]
    for arguments in calls:
        monkeypatch.setattr("sys.argv", ["mpo-export", *arguments.split(), "--threads", "1"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "report").is_dir() and "KL to dense" in capsys.readouterr().out


def test_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model-7b.Q4_1.gguf")
    found = find_source(str(path))
    assert (found.folder, found.name, found.revision) == (path, "model-7b.Q4_1", None)
    bare = path.rename(tmp_path / "bare")
    assert find_source(str(bare)).name == "bare"
    monkeypatch.setattr(source_module, "find_known", lambda model, say: (tmp_path / model.name, "abc"))
    found = find_source("smollm2")
    assert (found.folder, found.name, found.revision) == (tmp_path / "smollm2", "smollm2", "abc")
    for name in ("owner/absent.gguf", "absent.gguf"):
        with pytest.raises(
            CheckpointError,
            match=r"absent\.gguf: no such file; give demo, granite, granite-2b, granite-4-micro, smollm2, a Hugging",
        ):
            find_source(name)
    other = tmp_path / "other"
    other.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="other: is no GGUF file; give demo"):
        find_source(str(other))
