"""What a user asks for: each command line becomes one frozen record, checked before any work begins, and passed whole."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.effort import NORMAL, QUICK, find_effort
from mpo_exporter.measure.sensitivity import LEVELS
from mpo_exporter.plan.file import read_plan
from mpo_exporter.plan.options import Options
from mpo_formats import ConfigError, OutputError
from mpo_formats.spec import BITS
from mpo_runtime.loading import check_device, set_threads

# A plan file is given as --plan file:PLAN.json.
PLAN_FILE = "file:"
# More bytes than any disk has.
MOST_BYTES = 1e18
UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True, slots=True)
class Machine:
    """What to compute on.

    Args:
        device: `cpu`, or a torch device such as `cuda`.
        threads: CPU threads; None for torch's own choice.
    """

    device: str = "cpu"
    threads: int | None = None

    def prepare(self) -> None:
        """Sets the threads of this process.

        Raises:
            ConfigError: for a device that is not there, or less than one thread.
        """
        check_device(self.device)
        set_threads(self.threads)


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """What layers are fitted to, and layers are judged on.

    Args:
        text: a text file; None for the built-in one, where the plan needs any.
        windows: of 256 tokens, at most; 0 uses no text, None takes as many as the effort says.

    Raises:
        ConfigError: for less than 0 windows.
    """

    text: Path | None = None
    windows: int | None = None

    def __post_init__(self) -> None:
        if self.windows is not None and self.windows < 0:
            raise ConfigError(f"--calib-windows {self.windows}: expected 0 or more")


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """What the quality of a file is measured on.

    Args:
        text: a held-out text file; None for the built-in one.
        tokens: how many of its first tokens; 0 measures nothing, None takes as many as take about a minute.

    Raises:
        ConfigError: for less than 0 tokens.
    """

    text: Path | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 0:
            raise ConfigError(f"--measure-tokens {self.tokens}: expected 0 or more")


@dataclass(frozen=True, slots=True)
class HealingRequest:
    """Healing after the export: how long, and on what; at most one of tokens, epochs and minutes.

    Args:
        tokens: as the user writes them, such as `500k`.
        text: a text file; None for the built-in one.
    """

    tokens: str | None = None
    epochs: float | None = None
    minutes: float | None = None
    text: Path | None = None


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """One export, as `mpo-export MODEL` asks for it.

    Args:
        model: a name, folder or hub id, as `open_source` takes it.
        options: of the plan.
        out: the file to write; None for one named after the model, in the current folder.
        force: overwrites existing files.
        tasks: JSONL files of questions, on which accuracy is measured before and after.
        prefixes: values of χ; the file's prefixes of these bond dimensions are measured too.
        report: a folder for the report; None makes none.
        dry_run: prints the plan and its predictions, and writes no file.
        save_plan: a file to write the plan to.
        compare_cores: where cores were demanded, also fit and measure a file of the same size without cores.
        effort: how much care is taken, by a name in `EFFORTS`.
        keep_work: keeps the work folder beside the file when the export is finished.

    Raises:
        ConfigError: for a prefix that is not below χ, an unknown effort, or what `quick` cannot do.
    """

    model: str
    options: Options = field(default_factory=Options)
    out: Path | None = None
    force: bool = False
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    measure: MeasureRequest = field(default_factory=MeasureRequest)
    tasks: tuple[Path, ...] = ()
    prefixes: tuple[int, ...] = ()
    healing: HealingRequest | None = None
    report: Path | None = None
    dry_run: bool = False
    save_plan: Path | None = None
    compare_cores: bool = True
    effort: str = NORMAL.name
    keep_work: bool = False
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if find_effort(self.effort) == QUICK:
            self.check_quick()
        for prefix in self.prefixes:
            if not 1 <= prefix < self.options.largest_chi:
                raise ConfigError(f"--certify-chi {prefix}: expected 1 to {self.options.largest_chi - 1}, below --chi")

    def check_quick(self) -> None:
        """Raises ConfigError, naming the option, for what needs calibration text, which the effort `quick` does not use."""
        options = self.options
        given = {
            "--calib": self.calibration.text,
            "--calib-windows": self.calibration.windows,
            "--max-kl": options.target.max_kl,
            "--top-k": options.choice.top_k,
            "--compression-ratio": options.choice.share,
            "--sensitivity full": options.choice.sensitivity == "full",
        }
        for name, value in given.items():
            if value:
                raise ConfigError(
                    f"{name}: needs calibration text, which --effort quick does not use; give another effort"
                )

    def target(self, name: str) -> Path:
        """The file to write, for a model of that short name."""
        return self.out or Path(f"{name}.mpo")

    def check_paths(self, target: Path) -> None:
        """Raises OutputError, naming the option, for a path that could not be written when its turn comes."""
        if not self.dry_run:
            check_file(target, "--out", force=self.force)
            if self.report is not None:
                check_folder(self.report, "--report")
        if self.save_plan is not None:
            check_file(self.save_plan, "--save-plan", force=self.force)


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """One profile, as `mpo-export profile MODEL` asks for it.

    Args:
        level: `fast` or `full`.
        bits, chi: of the integers and of the cores that layers are judged with.
        out: a folder for JSON and plots; None writes nothing.
        plots: writes plots into `out` too.

    Raises:
        ConfigError: for a value out of range.
    """

    model: str
    level: str = LEVELS[0]
    bits: int = 2
    chi: int = 32
    out: Path | None = None
    plots: bool = True
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    machine: Machine = field(default_factory=Machine)

    @property
    def windows(self) -> int:
        """Windows of calibration text, at most."""
        return COUNT if self.calibration.windows is None else self.calibration.windows

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(f"--level {self.level}: expected one of {', '.join(LEVELS)}")
        if self.bits not in BITS:
            raise ConfigError(f"--bits {self.bits}: expected one of {', '.join(map(str, BITS))}")
        if self.chi < 1:
            raise ConfigError(f"--chi {self.chi}: the bond dimension must be at least 1")
        if self.calibration.windows is not None and self.calibration.windows < 1:
            raise ConfigError(
                f"--calib-windows {self.calibration.windows}: expected at least 1; a profile is made on text"
            )


def plan_options(plan: str, chi: int | None, cores: int, **others: Any) -> Options:
    """The options of a plan given by its name or as file:PLAN.json, whose χ and cores take the place of those given.

    Args:
        others: the other fields of `Options`, by name.

    Raises:
        PlanError: for a plan file that cannot be read, and as `Options` does.
    """
    if not plan.startswith(PLAN_FILE):
        return Options(plan, chi, cores, **others)
    file = read_plan(Path(plan.removeprefix(PLAN_FILE)))
    return Options(file.plan, file.chi or chi, file.cores or cores, file=file, **others)


def size_bytes(text: str) -> int:
    """The bytes that a size such as 2.1GB, 900 MB or 1200000 means; units are decimal.

    Raises:
        ConfigError: for text that is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"--target-size {text}: expected bytes such as 2.1GB, 900MB or 1200000")
    return int(min(float(found[1]) * UNITS[(found[2] or "B").upper()], MOST_BYTES))


def check_file(path: Path, option: str, *, force: bool) -> None:
    """Checks that a file can be written, before the work that leads to it.

    Raises:
        OutputError: naming the option, for a folder, an existing file without `force`, or a folder that is missing or
            that cannot be written to.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file with {option}")
    if not force and os.path.lexists(path):
        raise OutputError(f"{path}: exists already; give another name with {option} or overwrite it with --force")
    check_writable(path.parent, f"{path}: cannot write", f"give another folder with {option}")


def check_folder(path: Path, option: str) -> None:
    """Checks that files can be written into a folder, which is made if it is missing.

    Raises:
        OutputError: naming the option, for a file, or a folder that cannot be made or written to.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; give a folder with {option}")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    check_writable(nearest, f"{path}: cannot write", f"give another folder with {option}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made ({error.strerror}); give another folder with {option}") from None


def check_writable(folder: Path, problem: str, remedy: str) -> None:
    """Raises OutputError, saying `problem` and `remedy`, unless a file can be made in the folder: this makes one."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{problem} ({error.strerror}); {remedy}") from None
