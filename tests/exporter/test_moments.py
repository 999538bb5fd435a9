"""Second moments against transformers' own activations, dense and compressed, and what is left behind on disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from mpo_exporter.calibrate import hessian, moments, precision, sums
from mpo_exporter.calibrate.moments import Calibration, Moment
from mpo_exporter.calibrate.spill import mapped_file
from mpo_exporter.calibrate.sums import Sums
from mpo_exporter.calibrate.upstream import WindowOps
from mpo_formats import ConfigError, OutputError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.measure import window_logits
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import VOCABULARY, granite_config, random_tensors, write_folder, write_weights

Array = NDArray[np.float64]
WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 24))


def inputs_in_transformers(folder: Path, windows: NDArray[np.int64] = WINDOWS) -> dict[str, Array]:
    """Every linear's inputs [T, I] as transformers' hooks see them; the head under its own name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, Array] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, given, __, name=name: seen.update({name: given[0].detach().double().flatten(0, 1).numpy()})
            )
    with torch.no_grad():
        model(torch.from_numpy(windows))
    return seen


def close(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_fast_products_hardly_change_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model")
    found = []
    for units in (True, False):
        monkeypatch.setattr(precision, "has_units", lambda units=units: units)
        found.append(list(Calibration(Checkpoint(folder), WINDOWS, tmp_path).dense()))
    for (_, fast), (_, slow) in zip(*found, strict=True):
        assert np.abs(fast.second - slow.second).max() < 0.02 * np.abs(slow.second).max()
        assert np.linalg.norm(fast.second - slow.second) < 0.01 * np.linalg.norm(slow.second)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("tied", [True, False])
def test_dense_moments_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    folder = write_folder(tmp_path / "model", granite_config(tie_word_embeddings=tied, attention_bias=not tied))
    seen = inputs_in_transformers(folder)
    found = list(Calibration(Checkpoint(folder), WINDOWS, tmp_path / "work", batch=2).dense())
    layers = [name for names, _ in found for name in names]
    assert layers[-1] == (EMBEDDING if tied else HEAD)
    assert [name if name != EMBEDDING else HEAD for name in layers] == list(seen)
    assert [len(names) for names, _ in found] == [3, 1, 2, 1] * 2 + [1]
    for names, moment in found:
        for name in names:
            x = seen[HEAD if name == EMBEDDING else name]
            close(moment.second, x.T @ x / len(x))
        assert moment.cross is None
        assert moment.tokens == WINDOWS.size
        np.testing.assert_array_equal(moment.second, moment.second.T)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.usefixtures("exact_products")
def test_compressed_moments_are_those_of_the_compressed_model(tmp_path: Path) -> None:
    """The walk's moments, of matrices and a table that it was given, are those of a model that has them throughout."""
    config = granite_config()
    tensors = random_tensors(config, 0, torch.float32)
    dense = write_folder(tmp_path / "dense", config)
    noise = {
        name: value + 0.1 * value.std() * torch.randn_like(value) for name, value in tensors.items() if value.dim() == 2
    }
    other = write_folder(tmp_path / "other", config)
    write_weights(other, tensors | noise)
    found: dict[str, Moment] = {}

    def build(name: str, matrix: Array, moment: Moment) -> NDArray[np.float32]:
        np.testing.assert_array_equal(matrix, tensors[f"{name}.weight"].double().numpy())
        found[name] = moment
        return noise[f"{name}.weight"].numpy()

    table = noise[f"{EMBEDDING}.weight"].numpy()
    Calibration(Checkpoint(dense), WINDOWS, tmp_path / "work", batch=3).compress(build, embedding=table)
    before, after = inputs_in_transformers(dense), inputs_in_transformers(other)
    assert [HEAD if name == EMBEDDING else name for name in found] == list(after)
    for name, moment in found.items():
        x, ours = (seen[HEAD if name == EMBEDDING else name] for seen in (before, after))
        close(moment.second, ours.T @ ours / len(ours))
        assert moment.cross is not None
        close(moment.cross, x.T @ ours / len(x))
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.usefixtures("exact_products")
def test_parts_make_up_for_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and shortfalls of the parts of wide inputs, by transformers' activations of both models."""
    for name, value in {"WIDE": 40, "PART": 32, "UNIT": 16}.items():
        monkeypatch.setattr(hessian, name, value)
    monkeypatch.setattr(moments, "WIDE", 40)
    config = granite_config()
    tensors = random_tensors(config, 0, torch.float32)
    dense, other = write_folder(tmp_path / "dense", config), write_folder(tmp_path / "other", config)
    write_weights(dense, tensors)
    noise = {name: 1.1 * value if "layers" in name else value for name, value in tensors.items() if value.dim() == 2}
    write_weights(other, tensors | noise)
    found: list[tuple[str, slice, Moment]] = []

    def part(name: str, columns: slice, matrix: Array, moment: Moment) -> NDArray[np.float32]:
        np.testing.assert_array_equal(matrix, tensors[f"{name}.weight"].double().numpy()[:, columns])
        found.append((name, columns, moment))
        return noise[f"{name}.weight"].numpy()[:, columns]

    def whole(name: str, matrix: Array, moment: Moment) -> NDArray[np.float32]:
        assert not name.endswith("down_proj")
        return noise[f"{name}.weight"].numpy()

    Calibration(Checkpoint(dense), WINDOWS, tmp_path / "work", batch=3).compress(
        whole, parts=moments.Parts(lambda name: True, part)
    )
    downs = [f"model.layers.{block}.mlp.down_proj" for block in (0, 1)]
    assert [(name, columns) for name, columns, _ in found] == [
        (name, columns) for name in downs for columns in (slice(0, 32), slice(32, 48))
    ]
    after = inputs_in_transformers(other)
    for name, columns, moment in found:
        matrix, changed = (one[f"{name}.weight"].double().numpy() for one in (tensors, noise))
        ours = after[name][:, columns]
        short = shortfall(matrix, name, dense, other)
        earlier = slice(0, columns.start)
        short -= after[name][:, earlier] @ (changed - matrix)[:, earlier].T
        close(moment.second, ours.T @ ours / len(ours))
        assert moment.cross is None and moment.drift is not None
        close(moment.drift, short.T @ ours / len(ours))


def shortfall(matrix: Array, name: str, dense: Path, other: Path) -> Array:
    """W (x − x̂) + (h − ĥ) / m [T, O] of an MLP's last layer, by transformers."""
    inputs = [inputs_in_transformers(folder)[name] for folder in (dense, other)]
    streams = [streams_in_transformers(folder)[name.removesuffix("mlp.down_proj")] for folder in (dense, other)]
    scale = Checkpoint(dense).architecture.residual_multiplier
    result: Array = (inputs[0] - inputs[1]) @ matrix.T + (streams[0] - streams[1]) / scale
    return result


def streams_in_transformers(folder: Path) -> dict[str, Array]:
    """The residual stream [T, E] before the MLP of every block, by the block's prefix."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, Array] = {}
    for name, module in model.named_modules():
        if name.endswith("post_attention_layernorm"):
            prefix = name.removesuffix("post_attention_layernorm")
            module.register_forward_hook(
                lambda _, given, __, prefix=prefix: seen.update(
                    {prefix: given[0].detach().double().flatten(0, 1).numpy()}
                )
            )
    with torch.no_grad():
        model(torch.from_numpy(WINDOWS))
    return seen


@pytest.mark.parametrize(("columns", "sizes"), [(8192, [2048] * 4), (12800, [2560] * 5), (11008, [2304] * 4 + [1792])])
def test_parts_of_wide_inputs(columns: int, sizes: list[int]) -> None:
    parts = hessian.parts_of(columns)
    assert [part.stop - part.start for part in parts] == sizes
    assert [part.start for part in parts] == [sum(sizes[:at]) for at in range(len(sizes))]


@pytest.mark.usefixtures("exact_products")
def test_an_unchanged_model_has_one_moment(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    dense = {
        name: moment for names, moment in Calibration(Checkpoint(folder), WINDOWS, tmp_path).dense() for name in names
    }

    def build(name: str, matrix: Array, moment: Moment) -> NDArray[np.float32]:
        np.testing.assert_allclose(moment.second, dense[name].second, rtol=0, atol=1e-6)
        np.testing.assert_allclose(moment.cross, dense[name].second, rtol=0, atol=1e-6)
        built.append(name)
        return matrix.astype(np.float32)

    built: list[str] = []
    Calibration(Checkpoint(folder), WINDOWS, tmp_path).compress(build)
    assert built == list(dense)


def test_sums_over_panels_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PANEL", 5)
    monkeypatch.setattr(sums, "HALF_PANEL", 5)
    source = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 4, 13, generator=source) for _ in range(2))
    second, cross = Sums(), Sums()
    for part in (slice(0, 2), slice(2, 3)):
        second.add(left[part])
        cross.add(left[part], right[part])
    x, y = (part.double().reshape(-1, 13).numpy() for part in (left, right))
    np.testing.assert_allclose(second.mean(symmetric=True), x.T @ x / 12, atol=1e-6)
    np.testing.assert_allclose(cross.mean(symmetric=False), x.T @ y / 12, atol=1e-6)


def test_inputs_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    config = granite_config()
    tensors = random_tensors(config, 0, torch.float32)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 4] = float("nan")
    folder = write_folder(tmp_path / "model", config)
    write_weights(folder, tensors)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.o_proj: its input is not finite"):
        list(Calibration(Checkpoint(folder), WINDOWS, tmp_path / "work").dense())
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("windows", [np.zeros((0, 8), np.int64), np.zeros(8, np.int64)])
def test_windows_of_another_shape(tmp_path: Path, windows: NDArray[np.int64]) -> None:
    with pytest.raises(ConfigError, match="expected windows"):
        Calibration(Checkpoint(write_folder(tmp_path / "model")), windows, tmp_path)


def test_a_built_matrix_of_another_shape(tmp_path: Path) -> None:
    calibration = Calibration(Checkpoint(write_folder(tmp_path / "model")), WINDOWS, tmp_path / "work")
    with pytest.raises(ConfigError, match=r"q_proj: expected a compressed matrix of 32 x 32, found \[2, 2\]"):
        calibration.compress(lambda *_: np.zeros((2, 2), np.float32))


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("mpo_exporter.calibrate.spill.shutil.disk_usage", lambda _: usage)

    def refuse(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutputError, match=r"spills 15,360 bytes, the disk has 100 left \(No space left on device\)"):
        list(Calibration(Checkpoint(write_folder(tmp_path / "model")), WINDOWS, tmp_path / "work").dense())
    assert not list((tmp_path / "work").rglob("*"))


def test_a_spilled_file_has_all_its_bytes_before_it_is_written(tmp_path: Path) -> None:
    """A hole that the disk has no room for would end the process when it is written to."""
    mapped = mapped_file(tmp_path / "spilled", (1000, 100))
    assert (tmp_path / "spilled").stat().st_blocks * 512 >= 400_000
    mapped[-1] = 1
    assert not mapped[:-1].any()


LARGE_RUN = """
import sys
import os
import subprocess
import sys
from pathlib import Path
import numpy as np
import torch
from mpo_exporter.calibrate.moments import Calibration
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.measure import window_logits
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.checkpoint import Checkpoint
from mpo_runtime.memory import peak_memory

torch.set_num_threads(2)
source = Checkpoint(Path(sys.argv[1]))
windows = np.random.default_rng(0).integers(0, 258, (8, 256))
calibration = Calibration(source, windows, Path(sys.argv[2]), batch=8)
if sys.argv[3] == "dense":
    for _ in calibration.dense():
        pass
else:
    calibration.compress(lambda name, matrix, moment: matrix.astype(np.float32))
print(peak_memory())
"""


@pytest.mark.long
@pytest.mark.parametrize("walk", ["dense", "compress"])
def test_a_block_of_eight_billion_parameters_takes_less_than_8_gb(tmp_path: Path, walk: str) -> None:
    """The peak of the process on one block of Granite 3.3 8B's geometry; more blocks take disk, not memory."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 512}
    write_folder(tmp_path / "model", granite_config(**sizes, **heads), dtype=torch.bfloat16)
    command = [sys.executable, "-c", LARGE_RUN, str(tmp_path / "model"), str(tmp_path / "work"), walk]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 8e9


def test_attention_of_whole_windows_is_that_of_the_reference(tmp_path: Path) -> None:
    weights = Checkpoint(write_folder(tmp_path / "model"))
    found = []
    for ops in (WindowOps(weights), ReferenceOps(weights)):
        model = decoder_for(weights.spec.architecture, ops)
        found.append(window_logits(model, WINDOWS[0]))
    np.testing.assert_allclose(*found, atol=1e-5 * np.abs(found[0]).max())
