"""Whole models on the native backend: the reference's tokens, at every plan; caches, batches, threads; no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpo_exporter.plan.options import Options
from mpo_exporter.source import embedded_model
from mpo_formats import ConfigError
from mpo_runtime import load, native
from mpo_runtime.engine import Scheduler
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.measure import compare
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.text.token_text import BUILT_IN_TEXT, read_tokens
from mpo_runtime.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.helpers import export_folder, forward, granite_config, network, some_ids, write_folder
from tests.runtime.native_cases import LEVELS, level, needs_native

pytestmark = needs_native
GREEDY = SamplingOptions(temperature=0)
EMBEDDED = embedded_model()
PLANS = {
    "dense": Options("dense"),
    "int4": Options("int4"),
    "auto": Options("auto", chi=12),
    "paper": Options("paper", chi=24),
    "paper of 3 cores": Options("paper", chi=24, cores=3),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("native")
    names = {name: folder / f"{index}.mpo" for index, name in enumerate(PLANS)}
    for name, options in PLANS.items():
        export_folder(EMBEDDED, names[name], options)
    return names


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    return [step.token for step in Scheduler(model).generate(prompt, GREEDY, max_tokens=count, stop_ids=())]


@pytest.mark.parametrize("plan", PLANS)
def test_float_activations_give_the_tokens_of_the_reference(files: dict[str, Path], plan: str) -> None:
    prompt = some_ids(20, 5, 4096)
    ours = network(files[plan], backend="native", activations="float")
    assert ours.ops.name == "native"
    expected = greedy(network(files[plan]), prompt, 200)
    assert len(expected) == 200
    for name in LEVELS:
        with level(name):
            assert greedy(ours, prompt, 200) == expected


def windows(path: Path, count: int) -> NDArray[np.int64]:
    content = (EMBEDDED / "tokenizer.json").read_bytes()
    ids = read_tokens(BUILT_IN_TEXT, Tokenizer.from_bytes(content, None), None).ids
    return np.resize(ids, count)


@pytest.mark.parametrize("plan", PLANS)
def test_int8_activations_stay_close(files: dict[str, Path], plan: str) -> None:
    ours = network(files[plan], backend="native", kv_type="auto")
    result = compare(ours, network(files[plan]), windows(files[plan], 1000), 250)
    assert -1e-6 < result.kl_mean < 1e-3
    assert result.same_top1 >= 0.98


@pytest.mark.long
@pytest.mark.parametrize("plan", PLANS)
def test_int8_activations_stay_close_over_ten_thousand_tokens(files: dict[str, Path], plan: str) -> None:
    ours = network(files[plan], backend="native", kv_type="auto")
    result = compare(ours, network(files[plan]), windows(files[plan], 10_000), 500)
    assert result.kl_mean < 1e-3
    assert result.same_top1 >= 0.99


@pytest.mark.parametrize(("plan", "chi"), [("auto", 1), ("auto", 5), ("paper", 7), ("paper of 3 cores", 3)])
def test_prefixes_of_the_bonds(files: dict[str, Path], plan: str, chi: int) -> None:
    ids = [some_ids(30, chi, 4096)]
    found = forward(network(files[plan], backend="native", activations="float", chi=chi), ids)
    expected = forward(network(files[plan], chi=chi), ids)
    assert np.abs(expected - forward(network(files[plan]), ids)).max() > 0.01  # the prefix is another model
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["granite", "llama"])
def test_small_trained_models(shared: Path, name: str) -> None:
    """Hidden size 64, MLP 172: no multiple of most groups."""
    folder = shared / "models" / f"stories260K-{name}"
    prompt = [1, 403, 407, 261]
    assert greedy(network(folder, backend="native"), prompt, 200) == greedy(network(folder), prompt, 200)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, an untied head, odd sizes."""
    changes = {
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
    return write_folder(tmp_path_factory.mktemp("odd") / "model", granite_config(**changes), seed=4)


def test_bias_untied_head_and_odd_sizes(odd: Path) -> None:
    ids = [some_ids(40, row) for row in range(3)]
    np.testing.assert_allclose(forward(network(odd, backend="native"), ids), forward(network(odd), ids), atol=2e-5)


def test_rows_of_unequal_length_in_two_steps_and_rewinding(odd: Path) -> None:
    ours = network(odd, backend="native")
    lengths = [5, 1, 3]
    rows = [some_ids(2 * length, index) for index, length in enumerate(lengths)]
    cache = ours.ops.new_cache(ours.architecture, 3, 10)
    for part in (0, 1, 1):  # the second part twice, after forgetting it
        if cache.lengths == [10, 2, 6]:
            cache.rewind(0)
            ours.hidden(
                ours.ops.ids([[*row[:length], *[0] * (5 - length)] for row, length in zip(rows, lengths, strict=True)]),
                cache,
                lengths,
            )
        new = [row[part * length : (part + 1) * length] for row, length in zip(rows, lengths, strict=True)]
        padded = [row + [7] * (5 - len(row)) for row in new]
        logits = ours.logits(ours.hidden(ours.ops.ids(padded), cache, lengths))
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            alone = forward(network(odd), [row])[0, part * length : (part + 1) * length]
            np.testing.assert_allclose(logits[index, :length], alone, atol=2e-5)
    assert cache.lengths == [10, 2, 6]


@pytest.mark.parametrize(("kv_type", "tolerance"), [("f16", 0.02), ("bf16", 0.15), ("int8", 0.15)])
def test_the_cache_is_stored_as_asked(odd: Path, kv_type: str, tolerance: float) -> None:
    ids = [some_ids(40)]
    ours, exact = network(odd, backend="native", kv_type=kv_type), network(odd, backend="native")
    difference = np.abs(forward(ours, ids) - forward(exact, ids)).max()
    assert 0 < difference < tolerance
    sizes: list[Any] = [model.ops.new_cache(model.architecture, 1, 32) for model in (ours, exact)]
    assert sizes[0].nbytes < sizes[1].nbytes


@pytest.mark.parametrize(
    ("plan", "options", "expected"),
    [
        ("auto", {"backend": "native"}, "f16"),
        ("auto", {"backend": "native", "activations": "float"}, "f32"),
        ("auto", {"backend": "reference"}, "f32"),
        ("dense", {"backend": "native"}, "f32"),
    ],
)
def test_what_the_cache_is_stored_in_where_nothing_is_said(
    files: dict[str, Path], plan: str, options: dict[str, Any], expected: str
) -> None:
    chosen, said = (load_network(open_weights(files[plan]), **options, **more) for more in ({}, {"kv_type": expected}))
    assert chosen.ops.kv_type == said.ops.kv_type


def test_any_number_of_threads_and_of_callers(files: dict[str, Path]) -> None:
    model = network(files["auto"], backend="native")
    ids = [some_ids(60, 1, 4096)]
    before = int(native.active()["threads"])
    try:
        native.set_threads(1)
        expected = forward(model, ids)
        native.set_threads(4)
        found: list[NDArray[np.float32]] = []
        callers = [threading.Thread(target=lambda: found.append(forward(model, ids))) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(120)
    finally:
        native.set_threads(before)
    assert len(found) == 4
    for logits in found:
        np.testing.assert_array_equal(logits, expected)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join(str(ROOT / part) for part in ("", "formats", "exporter"))
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": roots}, capture_output=True, text=True, check=False, timeout=120
    )


CLI = """
import sys
from mpo_runtime.cli.main import main
try:
    main()
except SystemExit as stopped:
    if stopped.code:
        raise
print("heavy:", *sorted({"torch", "transformers", "onnx"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "Hello", "-n", "4"),
        ("chat", "--prompt", "I want to book a table at a restaurant.", "-n", "4", "--seed", "1"),
        ("info",),
        ("ppl",),
    ],
)
def test_torch_is_never_imported(files: dict[str, Path], arguments: tuple[str, ...], tmp_path: Path) -> None:
    command, *options = arguments
    if command == "ppl":
        (tmp_path / "text.txt").write_text("a short text to measure")
        options = [str(tmp_path / "text.txt")]
    done = run_python(CLI, command, files["auto"], *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr.splitlines()[-1] == "heavy:"


FORK = """
import os, sys
import numpy as np
from mpo_runtime.loading import load_network
from mpo_runtime.loading import open_weights
model = load_network(open_weights(sys.argv[1]), threads=3, backend="native")
def logits():
    cache = model.ops.new_cache(model.architecture, 1, 40)
    return model.logits(model.hidden(model.ops.ids([list(range(40))]), cache, [40]))
expected = logits()
child = os.fork()
if child == 0:
    os._exit(0 if (logits() == expected).all() and (logits() == expected).all() else 3)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(code, (logits() == expected).all())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_starts_threads_of_its_own(files: dict[str, Path]) -> None:
    done = run_python(FORK, files["auto"])
    assert done.stdout.split() == ["0", "True"], done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fast"}, "backend fast: expected one of auto, native, triton, reference"),
        # The second where there is a CUDA device.
        ({"backend": "native", "device": "cuda"}, "finds no CUDA device|backend native: runs on the CPU, not on cuda"),
        ({"activations": "int4"}, "activations int4: expected one of int8, float"),
        ({"kv_type": "q8_0"}, "kv-type q8_0: expected one of f32, f16, bf16, int8"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
        ({"threads": 5000}, "threads: expected at most 1024, found 5000"),
    ],
)
def test_options_out_of_range(odd: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_network(open_weights(odd), **options)


def test_an_instruction_set_that_is_not_here(odd: Path) -> None:
    code = "import os; os.environ['MPO_ISA'] = 'mmx'\n" + CLI
    done = run_python(code, "generate", odd, "--prompt", "a")
    assert done.returncode == 1
    assert done.stderr.startswith("mpo-run: error: MPO_ISA is 'mmx', expected one of auto, ")


def test_native_is_what_a_cpu_gets(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(odd) as model:
        assert model.network.ops.name == "native"
    monkeypatch.setattr(native, "_HAS_NATIVE", False)
    with load(odd) as model:
        assert model.network.ops.name == "reference"
    with pytest.raises(ConfigError, match="its kernels were not built"):
        load(odd, backend="native")


FORK_WHILE_BUSY = """
import os, signal, sys, threading
from mpo_runtime import load
model = load(sys.argv[1], threads=3, context=64, backend="native")
begun, end = threading.Event(), threading.Event()
def generate():
    stream = model.generate([5, 6, 7], max_tokens=30, temperature=0)
    next(stream)
    begun.set()
    end.wait()
    stream.close()
thread = threading.Thread(target=generate)
thread.start()
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    found = []
    def run():
        found.append([piece.token for piece in model.generate([5, 6, 7], max_tokens=8, temperature=0)])
    threads = [threading.Thread(target=run) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    os._exit(0 if len(found) == 4 and all(one == found[0] for one in found) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
end.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_generates_although_a_thread_of_its_parent_was_at_it(files: dict[str, Path]) -> None:
    done = run_python(FORK_WHILE_BUSY, files["auto"])
    assert done.stdout.split() == ["0"], done.stderr
