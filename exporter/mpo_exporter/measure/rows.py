"""Candidates and losses of cores as plain data, for the cache and for what a killed run leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mpo_exporter.measure.candidates import Alone
from mpo_exporter.terms import Candidate
from mpo_formats import Dense, FormatError, Mpo, Quantized, Term, Transform


def row_data(row: Sequence[Candidate]) -> list[Any]:
    """Candidates as plain data."""
    return [
        [
            one.bytes,
            one.loss,
            [asdict(term) for term in one.terms],
            one.hadamard,
            None if one.transform is None else asdict(one.transform),
        ]
        for one in row
    ]


def row_of(data: list[Any]) -> list[Candidate]:
    """The candidates that `row_data` was given."""
    return [
        Candidate(size, loss, tuple(map(term_of, terms)), hadamard, transform_of(transform))
        for size, loss, terms, hadamard, transform in data
    ]


def transform_of(data: dict[str, Any] | None) -> Transform | None:
    """A stored transform from its fields as JSON has them; raises FormatError for values that none can have."""
    if data is None:
        return None
    term = term_of(data["term"])
    if isinstance(term, Mpo):
        raise FormatError("transform: expected a matrix, found cores")
    return Transform(**{**data, "term": term})


def alone_of(data: dict[str, Any]) -> Alone:
    """The record from its fields as JSON has them."""
    return Alone(*(tuple((chi, loss) for chi, loss in data[kind]) for kind in ("low_rank", "balanced")))


def term_of(data: dict[str, Any]) -> Term:
    """A term from its fields as JSON has them; raises FormatError for values that no term can have."""
    kind = {"dense": Dense, "quantized": Quantized, "mpo": Mpo}[data["kind"]]
    built: Term = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    return built
