"""Texts as token ids: the scheduler that makes many at a time, the KV cache in pages, speculation."""

from mpo_runtime.engine.generation import Figures, FinishReason, Generation, LogitsHook, Request, Step
from mpo_runtime.engine.job import SchedulerStats
from mpo_runtime.engine.pages import shared_prefix
from mpo_runtime.engine.scheduler import Scheduler
from mpo_runtime.engine.sequence import PREFILL_CHUNK, Engine, check_prompt, default_context
from mpo_runtime.engine.speculation import Speculation

__all__ = [
    "PREFILL_CHUNK",
    "Engine",
    "Figures",
    "FinishReason",
    "Generation",
    "LogitsHook",
    "Request",
    "Scheduler",
    "SchedulerStats",
    "Speculation",
    "Step",
    "check_prompt",
    "default_context",
    "shared_prefix",
]
