"""What `mpo-export report` does: finds the model and the texts, measures, writes both files, prints the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.plan.named import Options
from mpo_exporter.report.facts import Report
from mpo_exporter.report.gather import gather
from mpo_exporter.report.job import Job, prepare, write
from mpo_exporter.report.page import page
from mpo_exporter.report.terminal import print_whole
from mpo_exporter.source import find_source
from mpo_formats import ConfigError
from mpo_runtime.cli import console
from mpo_runtime.model import check_device, set_threads


@dataclass(frozen=True, slots=True)
class ReportCommand:
    """The options of `mpo-export report`, as they were given."""

    file: Path
    teacher: str
    out: Path
    force: bool = False
    text: Path | None = None
    measure_tokens: int | None = None
    calib: Path | None = None
    calib_windows: int | None = None
    without_cores: bool | None = None
    device: str = "cpu"
    threads: int | None = None


def run_report(given: ReportCommand) -> Report:
    """Makes the report of an existing file.

    Raises:
        MpoError: as `make_report` does, and for options out of range.
    """
    from mpo_exporter.cli.export import calibration_for, held_out_text

    check_device(given.device)
    for name, value in (("--measure-tokens", given.measure_tokens), ("--calib-windows", given.calib_windows)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} {value}: expected 0 or more")
    set_threads(given.threads)
    if not given.file.is_file():
        raise ConfigError(f"{given.file}: no such file; give a .mpo file that mpo-export wrote")
    source = find_source(given.teacher)
    earlier = prepare(given.out, given.force)
    held_out, reason = held_out_text(source.folder, given.text, given.measure_tokens)
    windows = COUNT if given.calib_windows is None else given.calib_windows
    calibration, _ = calibration_for(source.folder, Options(), "auto", given.calib, windows)
    print(f"measuring {given.file} beside {source.name} into {given.out}", flush=True)
    return make_report(
        Job(
            file=given.file,
            teacher=source.folder,
            name=given.file.stem,
            folder=given.out,
            text=held_out,
            why_no_text=reason,
            calibration=calibration,
            calib_windows=given.calib_windows,
            fit_windows=windows,
            device=given.device,
            threads=given.threads,
            without_cores=given.without_cores,
            earlier=earlier,
        )
    )


def make_report(job: Job) -> Report:
    """Makes the report of a job: measures, writes the JSON and the page, prints the table.

    Raises:
        MpoError: as `gather` and `write` do.
    """
    with console.progress("report") as update:
        report = gather(job, update)
    write(job.folder, report, page(report))
    print_whole(report, job.folder)
    return report
