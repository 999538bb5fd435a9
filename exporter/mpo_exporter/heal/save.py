"""Writes the healed file: the spec it had, the trained values, and where they came from; measured as an export is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mpo_exporter.export import measure_file, quality
from mpo_exporter.heal.trainable import Arrays, Trainables
from mpo_formats import Certificate, Certificates, ModelSpec, MpoFile, MpoWriter
from mpo_formats.provenance import MOST_OPTIONS
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.measure import Comparison
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import Weights


class Worse(Exception):
    """Healing raised the divergence: `comparison` is what it came to."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(f"healing raised the KL to {comparison.kl_mean:.4g}")
        self.comparison = comparison


def healed_spec(spec: ModelSpec, facts: dict[str, str]) -> ModelSpec:
    """The spec with `facts` beside the options of the export; a second healing replaces the facts of the first."""
    options = {**spec.provenance.options, **facts}
    if len(options) > MOST_OPTIONS:
        options = facts
    return replace(spec, provenance=replace(spec.provenance, options=options))


@dataclass(frozen=True, slots=True)
class Output:
    """The healed file to write: what its provenance says of the healing, and what it is measured on, if anything.

    `most_kl` is the KL above which nothing is written.
    """

    target: Path
    facts: dict[str, str]
    text: TokenText | None
    force: bool
    device: str
    most_kl: float | None


def write_healed(file: MpoFile, trainables: Trainables, teacher: Weights, out: Output) -> Comparison | None:
    """Writes the file and measures it against the teacher on held-out text; returns what was measured.

    The prefixes that the file's own certificate names are measured again too.

    Raises:
        Worse: when its KL is above `most_kl`; nothing is written then.
        OutputError: when the target exists and `force` is not given, or the disk refuses the bytes.
    """
    found: list[Comparison] = []

    def measure(path: Path) -> Certificates:
        if out.text is None:
            return Certificates(())
        dense = decoder_for(teacher.spec.architecture, ReferenceOps(teacher, device=out.device))
        entries = []
        prefixes = sorted({entry.chi for entry in file.certificates().entries if entry.chi is not None}, reverse=True)
        for chi in (None, *prefixes):
            found.append(measure_file(path, chi, dense, out.text, out.device, lambda stage, done, total: None))
            if out.most_kl is not None and found[0].kl_mean > out.most_kl:
                raise Worse(found[0])
            entries.append(Certificate(chi, quality(found[-1], out.text)))
        return Certificates(tuple(entries))

    spec = healed_spec(file.spec, out.facts)
    built: Arrays = {}
    layers = dict(trainables.layers)
    vectors = {f"{name}.weight": vector for name, vector in trainables.vectors.items()}
    with MpoWriter(out.target, spec, force=out.force) as writer:
        for tensor in writer.pending():
            name = tensor.name
            if name in vectors:
                writer.write(name, vectors[name].arrays()[name])
            elif name.startswith("file."):
                writer.write(name, file.array(name))
            else:
                if name not in built:
                    layer = next(layer for layer in layers if name.startswith(f"{layer}."))
                    built = layers.pop(layer).arrays()
                writer.write(name, built[name])
        writer.commit(measure)
    return found[0] if found else None
