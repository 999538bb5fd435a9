"""`mpo-export to-hf`: transformers, the oracle, gives the logits of the file; what the format cannot hold is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_exporter.cli.main import main
from mpo_exporter.convert import folder as folder_module
from mpo_exporter.convert.families import block_windows, model_config
from mpo_exporter.convert.hf import HfRequest, write_hf
from mpo_exporter.plan.options import Options
from mpo_exporter.source import embedded_model
from mpo_formats import ConfigError, Dense, Mpo, MpoFile, Quantized, Rope, Term
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.reference import integer_tensor
from mpo_runtime.weights.checkpoint import Checkpoint
from mpo_runtime.weights.config import architecture_from_config
from tests.exporter.convert_cases import llama, write
from tests.formats.tiny import DOWN, GATE, KEY, QUERY, TERMS, UP, VALUE
from tests.helpers import export_folder, forward, network

pytest.importorskip("compressed_tensors")
IDS = [1, 3, 2, 7, 0, 5, 6, 4, 4, 1]
LLAMA3 = Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 32)
YARN = Rope(10000.0, "yarn", 4.0, 1.0, 8.0, 16, 1.25)


def integers(*bits: int, group: int = 32, zeros: bool = False) -> dict[str, tuple[Term, ...]]:
    """Terms for the seven matrices of the tiny model's block, of these widths in turn; down's sizes are larger."""
    names = (QUERY, KEY, VALUE, "model.layers.0.self_attn.o_proj", GATE, UP, DOWN)
    groups = [16 if name.endswith("o_proj") else group for name in names]
    return {name: (Quantized(bits[index % len(bits)], groups[index], zeros),) for index, name in enumerate(names)}


CASES: dict[str, tuple[dict[str, tuple[Term, ...]], dict[str, Any]]] = {
    "4 bits": (integers(4), {}),
    "4 bits, zeros": (integers(4, zeros=True), {}),
    "8 bits": (integers(8), {}),
    "2 bits as 3": (integers(2), {}),
    "all widths": (integers(2, 3, 4, 5, 6, 8), {}),
    "mixed zeros": (integers(4) | {KEY: (Quantized(3, 16, True),), DOWN: (Dense("f32"),)}, {}),
    "llama with yarn": (integers(5), llama(rope=YARN)),
    "llama with biases": (integers(5), llama(attention_bias=True, mlp_bias=True, rope=LLAMA3)),
    "head of its own": (integers(4) | {HEAD: (Quantized(8, 16, False),)}, {"tie_word_embeddings": False}),
}


def logits(folder: Path, dtype: torch.dtype, ids: list[int]) -> NDArray[np.float32]:
    """What transformers makes of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([ids])).logits[0].float().numpy()
    return found


@pytest.mark.parametrize("form", ["compressed-tensors", "dense"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_our_logits(tmp_path: Path, case: str, form: str) -> None:
    terms, changes = CASES[case]
    file = write(tmp_path / "model.mpo", terms, **changes)
    ours = forward(network(file), [IDS])[0]
    said = write_hf(HfRequest(file, tmp_path / "hf", form, "f32"))
    if any("layers have zeros" in line for line in said):
        return  # transformers does not load them; test_codes_and_scales_are_exact has the library read them
    np.testing.assert_allclose(logits(tmp_path / "hf", torch.float32, IDS), ours, atol=1e-4 * np.abs(ours).max())


@pytest.mark.parametrize("zeros", [False, True])
def test_codes_and_scales_are_exact(tmp_path: Path, zeros: bool) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    terms = integers(2, 3, 4, 5, 6, 8, zeros=zeros)
    file = write(tmp_path / "model.mpo", terms)
    write_hf(HfRequest(file, tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    schemes = QuantizationConfig.model_validate(config).config_groups
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    with MpoFile(file) as opened:
        for name, (term,) in terms.items():
            [scheme] = [scheme for scheme in schemes.values() if name in scheme.targets]
            parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(name)}
            parts["weight_scale"] = parts["weight_scale"].double()
            weight = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
            assert isinstance(term, Quantized)
            np.testing.assert_array_equal(weight, integer_tensor(opened, f"{name}.0", term.bits, term.zeros))


def test_matrices_that_servers_fuse_share_a_scheme(tmp_path: Path) -> None:
    file = write(tmp_path / "model.mpo", integers(2, 3, 4, 5, 6, 8) | {KEY: (Quantized(3, 16, False),)})
    said = write_hf(HfRequest(file, tmp_path / "hf", least_bits=4))
    groups = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]["config_groups"]
    found = {
        target: (group["weights"]["num_bits"], group["weights"]["group_size"])
        for group in groups.values()
        for target in group["targets"]
    }
    assert found[QUERY] == found[KEY] == found[VALUE] == (4, 16)
    assert found[GATE] == found[UP] == (8, 32) and found[DOWN] == (4, 32)
    assert any("5 layers take more bits or scales" in line and QUERY in line for line in said)


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        (TERMS, {}, f"{QUERY} has cores or several terms"),
        (integers(4) | {UP: (Mpo((128, 1), (1, 32), (4,), "f16", 0),)}, {}, f"{UP} has cores"),
        ({}, {}, "no layer has integers"),
        ({}, {"form": "gguf"}, "--as gguf: expected one of compressed-tensors, dense"),
        ({}, {"dtype": "int8"}, "--dtype int8: expected one of bf16, f16, f32"),
        ({}, {"least_bits": 9}, "--least-bits 9: expected 2 to 8"),
    ],
)
def test_what_compressed_tensors_cannot_hold_is_refused(
    tmp_path: Path, terms: dict[str, tuple[Term, ...]], options: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "model.mpo", terms) if terms is not TERMS else tmp_path / "model.mpo"
    if terms is TERMS:
        from tests.formats import tiny

        tiny.write(file, tiny.model())
    with pytest.raises(ConfigError, match=message):
        write_hf(HfRequest(file, tmp_path / "hf", **options))
    assert not (tmp_path / "hf").exists() and len(list(tmp_path.iterdir())) <= 1


def test_fractional_zeros_are_refused(tmp_path: Path) -> None:
    from tests.formats import tiny

    file = tmp_path / "model.mpo"
    tiny.write(file, tiny.model(integers(4, zeros=True)))
    with pytest.raises(ConfigError, match=f"{QUERY} has zeros that are no whole numbers from 0 to 15"):
        write_hf(HfRequest(file, tmp_path / "hf"))


def test_a_llama_with_multipliers_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "model.mpo", {}, **llama(residual_multiplier=0.5))
    with pytest.raises(ConfigError, match=r"residual_multiplier is 0\.5: a llama in a Hugging Face folder has 1"):
        write_hf(HfRequest(file, tmp_path / "hf", "dense"))


NEO = {
    "model_type": "gpt_neo",
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "attention_bias": True,
    "mlp_bias": True,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (llama(windows=(5,)), r"windows are \[5\]: a llama in a Hugging Face folder has none"),
        ({"windows": (5,)}, r"windows are \[5\]: a granite in a Hugging Face folder has none"),
        (
            llama(model_type="mistral", windows=(5, 0), num_hidden_layers=2),
            r"windows are \[5, 0\]: a mistral in a Hugging Face folder has one window for all blocks",
        ),
        (
            llama(model_type="qwen3", windows=(5, 0, 6), num_hidden_layers=3),
            r"windows are \[5, 0, 6\]: a qwen3 in a Hugging Face folder has one size of them",
        ),
        (llama(model_type="mistral", attention_bias=True), "attention_bias is True: a mistral .* has False"),
        (llama(model_type="qwen2"), "attention_bias is False: a qwen2 .* has True"),
        (llama(model_type="qwen3", mlp_bias=True), "mlp_bias is True: a qwen3 .* has False"),
        (NEO | {"num_key_value_heads": 1}, "num_key_value_heads is 1: a gpt_neo .* has 2"),
        (NEO | {"head_dim": 8}, "head_dim is 8: a gpt_neo .* has 16"),
        (NEO | {"attention_multiplier": 0.25}, r"attention_multiplier is 0\.25: a gpt_neo .* has 1"),
    ],
    ids=str,
)
def test_what_a_family_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "model.mpo", {}, **changes)
    with pytest.raises(ConfigError, match=message):
        write_hf(HfRequest(file, tmp_path / "hf", "dense"))
    assert not (tmp_path / "hf").exists()


SAID: dict[str, dict[str, Any]] = {
    "granite": {"attention_bias": True, "mlp_bias": True, "pad_token_id": 3},
    "llama of llama3": llama(rope=LLAMA3),
    "mistral": llama(model_type="mistral", windows=(7,), rope=YARN, eos_token_ids=(3,)),
    "qwen2 with some windows": llama(
        model_type="qwen2", attention_bias=True, windows=(0, 9, 9, 0, 9), num_hidden_layers=5
    ),
    "qwen2 without": llama(model_type="qwen2", attention_bias=True, eos_token_ids=()),
    "qwen3": llama(model_type="qwen3", attention_bias=True, windows=(9,), tie_word_embeddings=False),
    "granitemoehybrid": {"model_type": "granitemoehybrid", "attention_bias": True, "rope": LLAMA3},
    "gpt_neo": NEO | {"windows": (0, 9), "num_hidden_layers": 3, "tie_word_embeddings": False},
    "gpt_neo without windows": NEO,
}


@pytest.mark.parametrize("case", SAID)
def test_config_json_says_what_the_file_says(case: str) -> None:
    from tests.formats import tiny

    architecture = tiny.model({}, **SAID[case]).architecture
    found = architecture_from_config(json.loads(json.dumps(model_config(architecture, "float32"))), {}, "config")
    assert block_windows(found) == block_windows(architecture)
    assert found == dataclasses.replace(architecture, windows=found.windows, rope=found.rope)
    assert architecture.learned_positions or found.rope == architecture.rope


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gate", [Quantized(2, 32, False), Quantized(3, 16, True), Dense("bf16")], ids=str)
def test_gate_and_up_that_a_checkpoint_keeps_as_one(tmp_path: Path, gate: Term) -> None:
    """In granitemoehybrid they stand one below the other: packed in the scheme that holds both, or both as floats."""
    file = write(tmp_path / "model.mpo", integers(4) | {GATE: (gate,)}, model_type="granitemoehybrid")
    write_hf(HfRequest(file, tmp_path / "hf", dtype="f32"))
    groups = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    joined = "model.layers.0.shared_mlp.input_linear"
    [weights] = [
        group["weights"] for group in groups["config_groups"].values() if {joined, "Linear"} & set(group["targets"])
    ] or [None]
    assert (joined in groups["ignore"]) == isinstance(gate, Dense)
    if isinstance(gate, Quantized):
        assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, gate.group, not gate.zeros)
    if not getattr(gate, "zeros", False):  # transformers does not load zeros
        ours = forward(network(file), [IDS])[0]
        np.testing.assert_allclose(logits(tmp_path / "hf", torch.float32, IDS), ours, atol=1e-4 * np.abs(ours).max())
        return
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    schemes = QuantizationConfig.model_validate(groups).config_groups.values()
    [scheme] = [scheme for scheme in schemes if joined in scheme.targets]
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(joined)}
    parts["weight_scale"] = parts["weight_scale"].double()
    weight = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    with MpoFile(file) as opened:
        expected = [
            integer_tensor(opened, f"{name}.0", bits, zeros) for name, bits, zeros in ((GATE, 3, True), (UP, 4, False))
        ]
    np.testing.assert_array_equal(weight, np.concatenate(expected))


@pytest.mark.filterwarnings("ignore")
def test_granite_nano_in_bf16_and_its_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "nano.mpo"
    export_folder(embedded_model(), file, Options("int4"))
    ids = [0, 50, 60, 100, 2000, 400, 300, 77]
    ours = forward(network(file), [ids])[0]
    for form in ("compressed-tensors", "dense"):
        write_hf(HfRequest(file, tmp_path / form, form))
        found = logits(tmp_path / form, torch.bfloat16, ids)
        assert np.sqrt(np.square(found - ours).mean() / np.square(ours).mean()) < 1e-2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer.decode(tokenizer.encode("I want to book a table.")).endswith("I want to book a table.")
    again = tmp_path / "again.mpo"
    export_folder(tmp_path / "dense", again, Options("dense"))  # what was written is a model to export from
    with MpoFile(again) as second, MpoFile(file) as first:
        assert second.spec.architecture == first.spec.architecture


def test_shards_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "model.mpo", {})
    write_hf(HfRequest(file, tmp_path / "one", "dense"))
    monkeypatch.setattr(folder_module, "SHARD", 4000)
    write_hf(HfRequest(file, tmp_path / "many", "dense"))
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    for name in (EMBEDDING, DOWN):
        np.testing.assert_array_equal(one.array(f"{name}.0.weight"), many.array(f"{name}.0.weight"))


def test_a_folder_that_holds_something_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "model.mpo", {}), tmp_path / "hf"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    command = ["to-hf", str(file), "--out", str(out), "--as", "dense"]
    assert run(command) == 1 and "is not empty; give another --out, or --force" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0 and "bytes of tensors" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "notes.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    shutil.rmtree(out)
    out.write_text("")
    assert run(command) == 1 and "is no folder" in capsys.readouterr().err


def run(arguments: list[str]) -> int:
    """Runs mpo-export; returns its exit code."""
    import sys
    from unittest.mock import patch

    with patch.object(sys, "argv", ["mpo-export", *arguments]), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
