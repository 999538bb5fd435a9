"""What `mpo-export report` does: finds the model and the texts, measures, writes both files, prints the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.plan.options import Options
from mpo_exporter.report.facts import Report
from mpo_exporter.report.gather import gather
from mpo_exporter.report.job import Job, prepare, write
from mpo_exporter.report.page import page
from mpo_exporter.report.terminal import print_whole
from mpo_exporter.request import Machine, MeasureRequest, check_folder
from mpo_exporter.source import Source, open_source
from mpo_exporter.texts import calibration_for, held_out_text, read_tasks
from mpo_formats import ConfigError
from mpo_runtime.cli import console


@dataclass(frozen=True, slots=True)
class ReportCommand:
    """One report, as `mpo-export report FILE` asks for it.

    Args:
        file: a `.mpo` file.
        teacher: the dense model that it was made from, as `open_source` takes it.
        out: the folder to write into.
        force: write into a folder that has other contents.
        tasks: JSONL files of questions, on which accuracy is measured.
        calib: the calibration text; None: the built-in one.
        calib_windows: windows of it on which layers are measured; None: as many as take about half a minute.
        without_cores: make and measure a file of the same size without cores; None: where the model is small.

    Raises:
        ConfigError: for less than 0 windows.
    """

    file: Path
    teacher: str
    out: Path
    force: bool = False
    measure: MeasureRequest = field(default_factory=MeasureRequest)
    tasks: tuple[Path, ...] = ()
    calib: Path | None = None
    calib_windows: int | None = None
    without_cores: bool | None = None
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        if self.calib_windows is not None and self.calib_windows < 0:
            raise ConfigError(f"--calib-windows {self.calib_windows}: expected 0 or more")


def run_report(command: ReportCommand) -> Report:
    """Makes the report of an existing file.

    Raises:
        MpoError: as `make_report` does.
    """
    command.machine.prepare()
    if not command.file.is_file():
        raise ConfigError(f"{command.file}: no such file; give a .mpo file that mpo-export wrote")
    check_folder(command.out, "--out")
    earlier = prepare(command.out, command.force)
    windows = COUNT if command.calib_windows is None else command.calib_windows
    with open_source(command.teacher) as source:
        held_out, reason = held_out_text(source, command.measure.text, command.measure.tokens)
        tasks = read_tasks(source, command.tasks)
        calibration, _ = calibration_for(source, Options(), command.calib, windows)
        print(f"measuring {command.file} beside {source.name} into {command.out}", flush=True)
        job = Job(
            file=command.file,
            name=command.file.stem,
            folder=command.out,
            text=held_out,
            why_no_text=reason,
            calibration=calibration,
            calib_windows=command.calib_windows,
            fit_windows=windows,
            device=command.machine.device,
            threads=command.machine.threads,
            without_cores=command.without_cores,
            tasks=tasks,
            earlier=earlier,
        )
        return make_report(source, job)


def make_report(source: Source, job: Job) -> Report:
    """Makes the report of a job: measures, writes the JSON and the page, prints the table.

    Raises:
        MpoError: as `gather` and `write` do.
    """
    with console.progress("report") as update:
        report = gather(source, job, update)
    write(job.folder, report, page(report))
    print_whole(report, job.folder)
    return report
