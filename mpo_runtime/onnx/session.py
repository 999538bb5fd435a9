"""A folder of `export-onnx` in ONNX Runtime: token ids in, logits out, with a KV cache that stays where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import ConfigError
from mpo_runtime.machine import usable_cpus
from mpo_runtime.onnx.manifest import MODEL, read_manifest
from mpo_runtime.onnx.support import require_packages

Logits = NDArray[np.float32]
# Tokens of a prompt that are run at once.
CHUNK = 512


class Session:
    """One sequence in ONNX Runtime, through IOBinding.

    Where the graph allows it, past and present keys and values are one buffer of `capacity` tokens, which is bound once and
    written in place; otherwise every run makes a longer cache.

    Args:
        folder: what `export-onnx` wrote.
        capacity: tokens that the cache holds at most.
        threads: of the runtime; None for all usable cores.

    Raises:
        CheckpointError: where a file of the folder is missing or not whole; nothing of the runtime is started then.
        ConfigError: where the runtime is not installed or does not take the graph.
    """

    def __init__(self, folder: Path, *, capacity: int, threads: int | None = None) -> None:
        self.manifest = read_manifest(folder)
        require_packages("onnxruntime", what="--engine onnx")
        import onnxruntime

        self.architecture = self.manifest.architecture
        self.capacity, self.length = capacity, 0
        self._runtime = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cpus()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / MODEL), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            version = onnxruntime.__version__
            raise ConfigError(f"{folder}: onnxruntime {version} does not take the graph ({one_line(error)})") from None
        self._only_cache = onnxruntime.RunOptions()
        self._only_cache.only_execute_path_to_fetches = True  # leaves the head out where no logits are wanted
        parts = [f"{block}.{part}" for block in range(self.architecture.num_hidden_layers) for part in ("key", "value")]
        self._names = [(f"past_key_values.{part}", f"present.{part}") for part in parts]
        dtype = np.float32 if self.manifest.dtype == "fp32" else np.float16
        heads, size = self.architecture.num_key_value_heads, self.architecture.head_dim
        held = capacity if self.manifest.shares_buffer else 0
        self._cache = [self._value(np.zeros((1, heads, held, size), dtype)) for _ in parts]
        self._mask = np.ones((1, capacity), np.int64)
        # One binding for one token, whose logits have a place of their own, one for several, and one without logits.
        self._logits = self._value(np.zeros((1, 1, self.architecture.vocab_size), dtype))
        self._one, self._several, self._none = (self._bound() for _ in range(3))
        self._one.bind_ortvalue_output("logits", self._logits)

    def _bound(self) -> Any:
        """A binding of the cache; the logits come after it."""
        binding = self._session.io_binding()
        for (past, present), value in zip(self._names, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            if self.manifest.shares_buffer:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")
        return binding

    def rewind(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        if not self.manifest.shares_buffer and length < self.length:
            self._cache = [self._value(np.ascontiguousarray(value.numpy()[:, :, :length])) for value in self._cache]
        self.length = min(self.length, length)

    def run(self, ids: list[int]) -> Logits:
        """Runs tokens after those in the cache; returns the logits [vocabulary] after the last of them."""
        last = len(ids) - 1
        for start in range(0, last, CHUNK):
            self._step(ids[start : min(start + CHUNK, last)], logits=False)
        logits: Logits = self._step(ids[last:], logits=True)[0]
        return logits

    def run_all(self, ids: list[int]) -> Logits:
        """Runs tokens after those in the cache; returns the logits [S, vocabulary] after each of them."""
        parts = [self._step(ids[start : start + CHUNK], logits=True) for start in range(0, len(ids), CHUNK)]
        return np.concatenate(parts)

    def _value(self, array: NDArray[Any]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(array)

    def _step(self, ids: list[int], *, logits: bool) -> Logits:
        """Runs at most a chunk of tokens; returns their logits [S, vocabulary], or nothing where they are not wanted."""
        total = self.length + len(ids)
        if total > self.capacity:
            raise ConfigError(f"{total} tokens do not fit into a context of {self.capacity}")
        binding = (self._one if len(ids) == 1 else self._several) if logits else self._none
        binding.bind_ortvalue_input("input_ids", self._value(np.array([ids], np.int64)))
        binding.bind_ortvalue_input("attention_mask", self._value(self._mask[:, :total]))
        if not self.manifest.shares_buffer:  # an output keeps its place and shape until it is bound again
            for (past, present), value in zip(self._names, self._cache, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_output(present, "cpu")
        if logits and len(ids) > 1:
            binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding, None if logits else self._only_cache)
        self.length = total
        if not self.manifest.shares_buffer:
            self._cache = list(binding.get_outputs()[: len(self._names)])
        if not logits:
            return np.empty((0, self.architecture.vocab_size), np.float32)
        result = self._logits if len(ids) == 1 else binding.get_outputs()[-1]
        # A copy: the place of one token's logits is written again by the next run.
        found: Logits = result.numpy()[0].astype(np.float32)
        return found


def one_line(error: Exception) -> str:
    """An error of the runtime on one line, without the name of its class and source files."""
    return " ".join(str(error).split())[:300]
