"""A step of generated text, one token for each of several texts, recorded once and replayed: a CUDA graph on a GPU.

Everything that differs between steps is in tensors that stay where they are (`StepInputs`): ids, positions, tables of pages.
So the same launches serve any texts of any lengths. The host waits once in a step, for the logits from which it draws tokens.
Where there is no GPU, in Triton's interpreter, the same function is called instead of being replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_runtime.backends.ops import PAGE, Span
from mpo_runtime.backends.triton.cache import StepInputs, TritonPages
from mpo_runtime.backends.triton.lazy import resolved

# Texts of a recorded step: the next larger number is run, and what the rest gives is left out.
ROWS = (1, 2, 4, 8, 16, 32, 64)
# The fewest pages of a text that a recorded step has room for.
FEWEST_PAGES = 32
# Passes before the recording, in which kernels are compiled and libraries allocate.
REHEARSALS = 2


class RecordedStep:
    """One step of `rows` texts with at most `width` pages each.

    Args:
        vocabulary: the number of logits.
        pool: of the memory of graphs, which they share since one runs at a time; None where nothing is recorded.
    """

    def __init__(self, pages: TritonPages, rows: int, width: int, vocabulary: int, pool: Any) -> None:
        self.inputs = StepInputs(pages, rows, width)
        self.logits = torch.empty((rows, vocabulary), dtype=torch.float32, device=pages.device)
        on_gpu = pages.device.type == "cuda"
        self.host = torch.empty_like(self.logits, device="cpu", pin_memory=on_gpu)
        self.pool = pool
        self.graph: torch.cuda.CUDAGraph | None = None

    def body(self, forward: Callable[[Any, Any], Any], logits: Callable[[Any], Any]) -> None:
        """The step itself: reads `inputs`, writes `logits`; nothing here may depend on the values of either."""
        hidden = forward(self.inputs.ids[None], self.inputs)
        self.logits.copy_(resolved(logits(resolved(hidden)[0][:, None])).flatten(0, 1))

    def launch(self, forward: Callable[[Any, Any], Any], logits: Callable[[Any], Any]) -> None:
        """Runs the step on what `inputs` holds; the first time it is recorded."""
        if self.pool is None:
            self.body(forward, logits)
            return
        if self.graph is None:
            self.graph = self.record(forward, logits)
        self.graph.replay()

    def record(self, forward: Callable[[Any, Any], Any], logits: Callable[[Any], Any]) -> torch.cuda.CUDAGraph:
        """Records the step as a CUDA graph."""
        stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            for _ in range(REHEARSALS):
                self.body(forward, logits)
        outer.wait_stream(stream)
        # Other threads may score texts meanwhile: their work is not recorded and does not disturb.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            self.body(forward, logits)
        return graph

    def results(self, count: int) -> NDArray[np.float32]:
        """The logits [count, vocabulary] of the first texts; waits for the step."""
        self.host[:count].copy_(self.logits[:count])
        return np.array(self.host[:count].numpy())


class Steps:
    """The recorded steps over one store of pages; they are recorded again when the store was exchanged for a larger one."""

    def __init__(self, pages: TritonPages, vocabulary: int) -> None:
        self.pages, self.vocabulary = pages, vocabulary
        self.pool = torch.cuda.graph_pool_handle() if pages.device.type == "cuda" else None
        self.generation = pages.generation
        self.held: dict[tuple[int, int], RecordedStep] = {}

    def find(self, texts: int, pages: int) -> RecordedStep:
        """The step for so many texts of at most so many pages each."""
        if self.generation != self.pages.generation:
            self.held.clear()
            self.generation = self.pages.generation
        rows = next(size for size in ROWS if size >= texts)
        width = FEWEST_PAGES
        while width < pages:
            width *= 2
        if (rows, width) not in self.held:
            self.held[rows, width] = RecordedStep(self.pages, rows, width, self.vocabulary, self.pool)
        return self.held[rows, width]

    def run(
        self,
        forward: Callable[[Any, Any], Any],
        logits: Callable[[Any], Any],
        ids: Sequence[int],
        spans: Sequence[Span],
    ) -> NDArray[np.float32]:
        """The logits [texts, vocabulary] after one new token of each text."""
        step = self.find(len(ids), max(span.start for span in spans) // PAGE + 1)
        step.inputs.fill(ids, spans)
        step.launch(forward, logits)
        return step.results(len(ids))


def recordable(ids: Sequence[int], spans: Sequence[Span]) -> bool:
    """Whether a step is one generated token of each of a few texts."""
    return len(ids) == len(spans) <= ROWS[-1] and all(span.few and span.count == 1 for span in spans)
