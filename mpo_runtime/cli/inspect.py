"""info and verify: what a file holds, what the machine is, and whether a file is undamaged."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_formats import Dense, LinearSpec, ModelSpec, MpoFile, Quantized, Term
from mpo_formats.errors import ConfigError
from mpo_formats.layout import content_tensors, linear_bytes
from mpo_runtime import __version__, native, residence
from mpo_runtime.cli.console import json_text, size_text
from mpo_runtime.loading import choose_backend, open_weights
from mpo_runtime.machine import cpu_name, cpu_quota, system_name, usable_cpus
from mpo_runtime.memory import available_memory
from mpo_runtime.weights import store


def term_text(term: Term) -> str:
    """A term in a few words, such as `int4/32` or `mpo χ=32 (64×64)·(64×64) f16`."""
    if isinstance(term, Dense):
        return term.dtype
    if isinstance(term, Quantized):
        return f"int{term.bits}/{term.group}"
    factors = "·".join(f"({o}×{i})" for o, i in zip(term.out_dims, term.in_dims, strict=True))
    return f"mpo χ={','.join(map(str, term.bonds))} {factors} {term.dtype}"


def layer_text(linear: LinearSpec) -> str:
    """A layer's terms, summed, and the transform of its input that they take."""
    return " + ".join(map(term_text, linear.terms)) + transform_text(linear)


def transform_text(linear: LinearSpec) -> str:
    """` of H128` for the Hadamard transform of blocks of 128 inputs, ` of T128` for a stored one; empty without."""
    if linear.transform is not None:
        return f" of T{linear.transform.block}"
    return f" of H{linear.hadamard}" if linear.hadamard else ""


def prefixes(spec: ModelSpec) -> list[tuple[int, int]]:
    """Useful values of --chi: powers of two up to the largest bond, with the bytes that are then read."""
    largest = spec.largest_bond()
    values = sorted(
        {*(1 << k for k in range(largest.bit_length()) if 1 << k < largest), *([largest] if largest else [])}
    )
    fixed = sum(tensor.size for tensor in content_tensors(spec)) - sum(map(linear_bytes, spec.linears))
    return [(chi, fixed + sum(linear_bytes(linear.truncated(chi)) for linear in spec.linears)) for chi in values]


def describe(file: Path) -> dict[str, Any]:
    """All that info prints, as plain data."""
    weights = open_weights(file)
    spec = weights.spec
    parameters = spec.architecture.parameters()
    size = weights.size if isinstance(weights, MpoFile) else sum(tensor.size for tensor in content_tensors(spec))
    measured = weights.certificates().entries if isinstance(weights, MpoFile) else ()
    return {
        "file": str(file),
        "bytes": size,
        "bits_per_weight": size * 8 / parameters,
        "parameters": parameters,
        "stored_parameters": spec.stored_parameters(),
        "architecture": asdict(spec.architecture),
        "layers": {linear.name: layer_text(linear) for linear in spec.linears},
        "prefixes": [{"chi": chi, "bytes": count} for chi, count in prefixes(spec)],
        "files": [embedded.name for embedded in spec.files],
        "provenance": asdict(spec.provenance),
        "quality": [asdict(entry) for entry in measured],
        "backend": {"name": choose_backend("auto", "cpu"), **native.active()},
        "load": asdict(residence.choose(weights, "auto")),
    }


def show_info(file: Path, layers: bool, as_json: bool) -> None:
    """Prints what a file holds."""
    facts = describe(file)
    if as_json:
        print(json_text(facts, indent=2))
        return
    model, origin = facts["architecture"], facts["provenance"]
    print(
        f"{facts['file']}: {model['model_type']}, {facts['parameters']:,} parameters of the dense model, "
        f"{facts['stored_parameters']:,} numbers stored"
    )
    print(f"size          {size_text(facts['bytes'])}, {facts['bits_per_weight']:.2f} bits per weight")
    print(
        f"architecture  {model['num_hidden_layers']} blocks, hidden {model['hidden_size']}, MLP {model['intermediate_size']}, "
        f"{model['num_attention_heads']} heads, {model['num_key_value_heads']} key-value heads, "
        f"vocabulary {model['vocab_size']}, context {model['max_position_embeddings']}"
    )
    for terms, count in Counter(facts["layers"].values()).most_common():
        print(f"layers        {count} × {terms}")
    if layers:
        for name, terms in facts["layers"].items():
            print(f"  {name}: {terms}")
    if facts["prefixes"]:
        row = ", ".join(f"{item['chi']} ({size_text(item['bytes'])})" for item in facts["prefixes"])
        print(f"--chi         {row} read")
    print(f"files         {', '.join(facts['files']) or 'none'}")
    options = " ".join(f"{key}={value}" for key, value in origin["options"].items())
    if origin["exporter"]:
        print(f"made from     {origin['source']} by {origin['exporter']} {options}")
    for entry in facts["quality"]:
        quality = entry["quality"]
        which = "whole file" if entry["chi"] is None else f"--chi {entry['chi']}"
        print(
            f"quality       {which}: perplexity {quality['perplexity']:.3f} ± {quality['perplexity_error']:.3f} "
            f"(dense {quality['dense_perplexity']:.3f}), KL {quality['kl_mean']:.5f}, "
            f"same top token {100 * quality['same_top1']:.1f} %, {quality['tokens']} tokens of {quality['text']}"
        )
    print(f"load auto     {facts['load']['load']}: {facts['load']['reason']}")
    print("runs on       " + ", ".join(f"{key} {value}" for key, value in facts["backend"].items()))


def describe_machine() -> dict[str, Any]:
    """All that info prints without a file, as plain data; memory in bytes."""
    try:
        place = str(store.models_folder())
    except ConfigError:  # a user without a home folder
        place = None
    return {
        "version": __version__,
        "system": system_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "usable_cpus": usable_cpus(),
        "cpu_quota": cpu_quota(),
        "memory_available": available_memory(),
        "backend": {"name": choose_backend("auto", "cpu"), **native.active()},
        "store": place,
    }


def show_machine(as_json: bool) -> None:
    """Prints the machine, and what runs models on it."""
    facts = describe_machine()
    if as_json:
        print(json_text(facts, indent=2))
        return
    quota = "" if facts["cpu_quota"] is None else f", a quota of {facts['cpu_quota']:g} CPUs"
    print(f"mpo-runtime   {facts['version']} on {facts['system']}")
    print(f"CPU           {facts['cpu']}, {facts['usable_cpus']} of {facts['cores']} cores usable{quota}")
    print(f"memory        {size_text(facts['memory_available'])} available")
    print("runs on       " + ", ".join(f"{key} {value}" for key, value in facts["backend"].items()))
    print(f"store         {facts['store'] or 'none: set MPO_HOME to a folder'}")


def verify_file(file: Path) -> None:
    """Checks structure, checksums and values of a `.mpo` file, and says how much was checked."""
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; verify takes a .mpo file")
    with MpoFile(file) as opened:
        count = opened.verify()
        print(f"{file}: whole ({count} tensors, {size_text(opened.size)}: structure, checksums and values are right)")
