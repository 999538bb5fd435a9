"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from mpo_runtime.model import Model
    from mpo_server.generation import Answers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of this server alone; nothing of a request's content is in them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("mpo_requests", "Answered requests.", ("endpoint", "status"), registry=self.registry)
        self.refused = Counter("mpo_requests_refused", "Requests refused with 503.", registry=self.registry)
        self.departed = Counter("mpo_clients_departed", "Clients that left early.", registry=self.registry)
        self.prompt = Counter("mpo_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.cached = Counter("mpo_cached_tokens", "Tokens of prompts from the cache.", registry=self.registry)
        self.generated = Counter("mpo_generated_tokens", "Tokens that were generated.", registry=self.registry)
        self.seconds = Histogram(
            "mpo_request_seconds", "Time of a generation.", buckets=_SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "mpo_first_token_seconds", "Time until the first token.", buckets=_SECONDS, registry=self.registry
        )

    def watch(self, model: Model) -> None:
        """Shows the engine's state as gauges."""
        gauges = (
            ("mpo_running", "Texts that are generated.", "running"),
            ("mpo_waiting", "Texts that wait for a place.", "waiting"),
            ("mpo_kv_bytes", "Bytes of keys and values in use.", "kv_bytes"),
            ("mpo_prefix_bytes", "Bytes of kept prefixes.", "kept_bytes"),
        )
        for name, text, attribute in gauges:
            gauge = Gauge(name, text, registry=self.registry)
            gauge.set_function(partial(_figure, model, attribute))

    def generation(self, answers: Answers, now: float) -> None:
        """Counts the texts of one request that has ended, early or not."""
        self.seconds.observe(now - answers.started)
        self.prompt.inc(sum(map(len, answers.prompts)))
        for answer in answers.answers:
            self.generated.inc(answer.completion_tokens)
            self.cached.inc(answer.generation.cached_tokens)
            if answer.first_token is not None:
                self.first.observe(answer.first_token - answers.started)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)


def _figure(model: Model, attribute: str) -> float:
    return float(getattr(model.engine.stats(), attribute))
