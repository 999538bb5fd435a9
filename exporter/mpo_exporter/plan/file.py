"""Plan files, `--plan file:plan.json`: a named plan for most layers, and the user's own terms for some (docs/plans.md)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.plan.named import AUTO, DENSE, PLANS
from mpo_exporter.terms import GROUP, fitting_group, operator
from mpo_formats import (
    Dense,
    FormatError,
    LinearSpec,
    ModelSpec,
    Mpo,
    OutputError,
    PlanError,
    Quantized,
    Term,
    Transform,
)
from mpo_formats.codec import describe
from mpo_formats.spec import require_choice
from mpo_runtime.text.decode import decode_text

VERSION = 1
# The named plan of a file that names none, and that of a file that gives every layer.
DEFAULT, SAVED = AUTO.name, DENSE.name
PLAN_KEYS = ("version", "plan", "chi", "cores", "layers")
LAYER_KEYS = ("layer", "match", "terms", "hadamard", "transform")
SHAPES = ("low-rank", "balanced")
# The keys of a term by its kind. A term with `chi` is a short form, whose factors follow from the layer's size.
TERM_KEYS = {
    "dense": ("kind", "dtype"),
    "quantized": ("kind", "bits", "group", "zeros"),
    "mpo": ("kind", "out_dims", "in_dims", "bonds", "dtype", "group", "chi", "shape", "cores"),
}
# Bytes of a plan file at most.
LARGEST = 64 << 20


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan file as it was read: the named plan for most layers, and entries with the terms of some.

    Args:
        chi, cores: in the place of the command line's; None where the file does not say.
        rows: the entries, checked against a model by `layers`.
    """

    path: Path
    plan: str
    chi: int | None
    cores: int | None
    rows: tuple[Any, ...]

    def layers(self, source: ModelSpec) -> dict[str, LinearSpec]:
        """The layers that the file's entries name, stored as they say.

        Raises:
            PlanError: naming the file, the entry and what is wrong: an unknown or missing key, a layer that the model does
                not have or that is given twice, or terms that the layer cannot have.
        """
        found: dict[str, LinearSpec] = {}
        for index, row in enumerate(self.rows):
            where = f"{self.path}: layers[{index}]"
            for linear in named_layers(row, source, where):
                if linear.name in found:
                    raise PlanError(f"{where}: {linear.name} is given twice; keep one entry for each layer")
                found[linear.name] = planned_layer(row, linear, where)
        return found


def read_plan(path: Path) -> PlanFile:
    """Reads a plan file.

    Raises:
        PlanError: naming the file and what is wrong: not JSON, or an unknown, missing or duplicate key.
    """
    plan = parse(path)
    check_keys(plan, PLAN_KEYS, str(path))
    if plan.get("version") != VERSION:
        raise PlanError(f"{path}: version: expected {VERSION}, found {describe(plan.get('version'))}")
    name = plan.get("plan", DEFAULT)
    if name not in PLANS:
        raise PlanError(f"{path}: plan: expected one of {', '.join(PLANS)}, found {describe(name)}")
    chi, cores = (whole(plan[key], f"{path}: {key}") if key in plan else None for key in ("chi", "cores"))
    rows = plan.get("layers", [])
    if not isinstance(rows, list):
        raise PlanError(f"{path}: layers: expected a list of objects, found {describe(rows)}")
    return PlanFile(path, name, chi, cores, tuple(rows))


def parse(path: Path) -> dict[str, Any]:
    """The JSON object in a file; refuses duplicate keys, NaN and infinities."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise PlanError(f"{path}: the key {describe(repeated[0])} is given twice in one object; keep one of them")
        return dict(pairs)

    def refuse(name: str) -> Any:
        raise PlanError(f"{path}: {name} is not a JSON number")

    try:
        if path.stat().st_size > LARGEST:
            raise PlanError(f"{path}: larger than {LARGEST >> 20} MiB; this is no plan")
        text = decode_text(path.read_bytes(), path, PlanError)
        plan = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be read ({error.strerror}); give an existing file, as --plan file:PLAN.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not valid JSON ({error}); see docs/plans.md") from None
    if not isinstance(plan, dict):
        raise PlanError(f"{path}: expected a JSON object, found {describe(plan)}; see docs/plans.md")
    return plan


def check_keys(record: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises PlanError for a key that is not known."""
    for key in record:
        if key not in known:
            raise PlanError(f"{where}: unknown key {describe(key)}; expected {', '.join(known)}")


def whole(value: Any, where: str) -> int:
    """The value; raises PlanError unless it is an integer of at least 1."""
    if type(value) is not int or value < 1:
        raise PlanError(f"{where}: expected an integer of at least 1, found {describe(value)}")
    return value


def named_layers(row: Any, source: ModelSpec, where: str) -> list[LinearSpec]:
    """The layers of an entry: the one that it names, or all whose names its regular expression matches."""
    if not isinstance(row, dict):
        raise PlanError(f"{where}: expected an object with layer (or match) and terms, found {describe(row)}")
    check_keys(row, LAYER_KEYS, where)
    name, pattern = row.get("layer"), row.get("match")
    if (name is None) == (pattern is None) or not isinstance(name or pattern, str):
        raise PlanError(f"{where}: expected a string under one of layer and match")
    if name is not None:
        found = [linear for linear in source.linears if linear.name == name]
        if not found:
            raise PlanError(f"{where}: {describe(name)} is no layer of this model; mpo-run info lists them")
        return found
    try:
        found = [linear for linear in source.linears if re.search(str(pattern), linear.name)]
    except re.error as error:
        raise PlanError(f"{where}: match: not a regular expression ({error})") from None
    if not found:
        raise PlanError(f"{where}: match: {describe(pattern)} matches no layer of this model")
    return found


def planned_layer(row: dict[str, Any], linear: LinearSpec, where: str) -> LinearSpec:
    """A layer with the terms, and the transform of its input, that an entry gives it.

    Raises:
        PlanError: if the layer cannot have them.
    """
    terms = row.get("terms")
    if not isinstance(terms, list) or not terms:
        raise PlanError(f"{where}: terms: expected a list of at least one term, found {describe(terms)}")
    try:
        built = tuple(one_term(term, linear, f"{where}: terms[{index}]") for index, term in enumerate(terms))
        transform = (
            None if row.get("transform") is None else stored_transform(row["transform"], linear, f"{where}: transform")
        )
        return replace(linear, terms=built, hadamard=row.get("hadamard", 0), transform=transform)
    except FormatError as error:
        raise PlanError(f"{where}: {linear.name} [{linear.out_features}, {linear.in_features}]: {error}") from None


def stored_transform(record: Any, linear: LinearSpec, where: str) -> Transform:
    """A stored transform, as in the header of a `.mpo` file."""
    if not isinstance(record, dict) or record.keys() != {"name", "block", "count", "term"}:
        raise PlanError(f"{where}: expected an object with name, block, count and term, found {describe(record)}")
    term = one_term(record["term"], linear, f"{where}: term")
    if isinstance(term, Mpo):
        raise PlanError(f"{where}: term: expected a matrix, found cores")
    return Transform(record["name"], record["block"], record["count"], term)


def one_term(term: Any, linear: LinearSpec, where: str) -> Term:
    """One term; keys that are left out get values that suit the layer."""
    kind = term.get("kind") if isinstance(term, dict) else None
    if not isinstance(kind, str) or kind not in TERM_KEYS:
        raise PlanError(f"{where}: kind: expected one of {', '.join(TERM_KEYS)}, found {describe(kind)}")
    check_keys(term, TERM_KEYS[kind], where)
    if kind == "dense":
        stored = linear.terms[0]
        return Dense(term.get("dtype", stored.dtype if isinstance(stored, Dense) else "bf16"))
    if kind == "quantized":
        group = term.get("group", fitting_group(linear.in_features, GROUP))
        if group is None:
            raise PlanError(
                f"{where}: no group divides the {linear.in_features} inputs of {linear.name}; store it dense"
            )
        if "bits" not in term:
            raise PlanError(f"{where}: bits: missing")
        return Quantized(term["bits"], group, term.get("zeros", False))
    return short_operator(term, linear, where) if "chi" in term else full_operator(term, where)


def short_operator(term: dict[str, Any], linear: LinearSpec, where: str) -> Mpo:
    """Cores given by χ and a shape: (O,1)×(1,I), or balanced factors of some cores."""
    for key in ("out_dims", "in_dims", "bonds", "group"):
        if key in term:
            raise PlanError(f"{where}: {key}: left out where chi is given; give chi, or out_dims, in_dims and bonds")
    chi, cores = whole(term["chi"], f"{where}: chi"), whole(term.get("cores", 2), f"{where}: cores")
    shape, dtype = term.get("shape", "low-rank" if cores == 2 else "balanced"), term.get("dtype", "int8")
    require_choice("shape", shape, SHAPES)
    require_choice("dtype", dtype, ("f32", "f16", "bf16", "int8", "int4"))
    if not 2 <= cores <= 8 or (shape == "low-rank" and cores != 2):
        raise PlanError(f"{where}: cores: expected 2 to 8, and 2 of a low-rank shape, found {cores}")
    sizes = linear.out_features, linear.in_features
    return operator(*(low_rank_shape(*sizes) if shape == "low-rank" else balanced_shape(*sizes, cores)), chi, dtype)


def full_operator(term: dict[str, Any], where: str) -> Mpo:
    """Cores given by all their sizes, as in the header of a `.mpo` file."""
    missing = [key for key in ("out_dims", "in_dims", "bonds", "dtype") if key not in term]
    if missing:
        raise PlanError(f"{where}: {missing[0]}: missing; give chi, or out_dims, in_dims, bonds and dtype")
    out_dims, in_dims, bonds = (sizes(term[key], f"{where}: {key}") for key in ("out_dims", "in_dims", "bonds"))
    return Mpo(out_dims, in_dims, bonds, term["dtype"], term.get("group", 0))


def sizes(value: Any, where: str) -> tuple[int, ...]:
    """The value as a tuple; raises PlanError unless it is a list of integers of at least 1."""
    if not isinstance(value, list):
        raise PlanError(f"{where}: expected a list of integers, found {describe(value)}")
    return tuple(whole(one, where) for one in value)


def write_plan(path: Path, linears: tuple[LinearSpec, ...], *, force: bool = False) -> None:
    """Writes the terms of every layer as a plan file, to be edited and read again.

    Raises:
        OutputError: when it cannot be written, or exists and `force` is not given.
    """
    rows = [
        {
            "layer": linear.name,
            "terms": [asdict(term) for term in linear.terms],
            "hadamard": linear.hadamard,
            **({} if linear.transform is None else {"transform": asdict(linear.transform)}),
        }
        for linear in linears
    ]
    text = json.dumps({"version": VERSION, "plan": SAVED, "layers": rows}, indent=1)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror}); give another name with --save-plan") from None
