"""What the command line asks of a plan, and the options that this makes for one model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from mpo_exporter.plan.budget import default_bytes
from mpo_exporter.plan.file import PREFIX, read_plan
from mpo_exporter.plan.named import KeyOptions, Options
from mpo_formats import ConfigError, ModelSpec, PlanError
from mpo_formats.layout import content_tensors

# More bits than any weight has, and more bytes than any disk.
MOST_BITS, MOST_BYTES = 32, 1e18
UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of mpo-export that are about the plan, as they were given."""

    target_size: str | None = None
    target_bpw: float | None = None
    target_ratio: float | None = None
    max_kl: float | None = None
    for_speed: bool = False
    layers: str | None = None
    top_k: int | None = None
    compression_ratio: float | None = None
    sensitivity: str = "fast"
    rank: int = KeyOptions().rank
    quant_bits: int = KeyOptions().bits
    norm_correction: bool = True
    min_dim: int = KeyOptions().min_dim
    dry_run: bool = False
    save_plan: Path | None = None

    def options(self, plan: str, chi: int, cores: int) -> Options:
        """The options without what takes a model to tell.

        Raises:
            PlanError: for values that no model could have.
        """
        self.check_targets()
        return Options(
            "auto" if plan.startswith(PREFIX) else plan,
            chi,
            cores,
            max_kl=self.max_kl,
            for_speed=self.for_speed,
            pattern=self.layers,
            top_k=None if plan.startswith(PREFIX) else self.top_k,
            share=None if plan.startswith(PREFIX) else self.compression_ratio,
            sensitivity=self.sensitivity,
            keys=KeyOptions(self.rank, self.quant_bits, self.norm_correction, self.min_dim),
        )

    def check_targets(self) -> None:
        """Raises ConfigError for more than one target, or one that is out of range."""
        given = {
            "--target-size": self.target_size,
            "--target-bpw": self.target_bpw,
            "--target-ratio": self.target_ratio,
            "--max-kl": self.max_kl,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ConfigError(f"{' and '.join(names)}: give one of them")
        if self.target_bpw is not None and not 0 < self.target_bpw <= MOST_BITS:
            raise ConfigError(
                f"--target-bpw {self.target_bpw:g}: expected more than 0 and at most {MOST_BITS} bits per weight"
            )
        if self.target_ratio is not None and not 0 < self.target_ratio <= 1:
            raise ConfigError(f"--target-ratio {self.target_ratio:g}: expected more than 0 and at most 1")
        if self.target_size is not None:
            size_bytes(self.target_size)

    def resolved(self, plan: str, options: Options, source: ModelSpec, calibrated: bool) -> Options:
        """The options for a model: its plan file read, its target in bytes.

        Args:
            calibrated: there is calibration text; then `auto` has the default target where none was given.

        Raises:
            PlanError: for a plan file or a target that the model cannot have.
        """
        if plan.startswith(PREFIX):
            options = read_plan(Path(plan.removeprefix(PREFIX)), source, options)
            options = replace(options, top_k=self.top_k, share=self.compression_ratio)
        target = self.target_bytes(source)
        if target is not None and options.plan != "auto":
            raise PlanError(f"target {target}: expected the plan auto, found {options.plan}")
        if target is None and options.plan == "auto" and options.max_kl is None and calibrated:
            target = default_bytes(source)
        return options if target is None else replace(options, target_bytes=target)

    def target_bytes(self, source: ModelSpec) -> int | None:
        """The bytes of the whole file that were asked for, None where none were."""
        if self.target_size is not None:
            return size_bytes(self.target_size)
        if self.target_bpw is not None:
            return int(self.target_bpw * source.architecture.parameters() / 8)
        if self.target_ratio is not None:
            return int(self.target_ratio * sum(tensor.size for tensor in content_tensors(source)))
        return None


def size_bytes(text: str) -> int:
    """The bytes that a size such as 2.1GB, 900 MB or 1200000 means; units are decimal.

    Raises:
        ConfigError: for what is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"--target-size {text}: expected bytes such as 2.1GB, 900MB or 1200000")
    return int(min(float(found[1]) * UNITS[(found[2] or "B").upper()], MOST_BYTES))
