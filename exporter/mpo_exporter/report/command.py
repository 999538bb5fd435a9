"""What `mpo-export report` does: find the models and the texts, measure, write."""

from __future__ import annotations

from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.plan.options import Options
from mpo_exporter.report.facts import Report
from mpo_exporter.report.folder import prepare
from mpo_exporter.report.gather import Job
from mpo_exporter.report.make import make_report
from mpo_exporter.request import Machine, MeasureRequest, check_folder
from mpo_exporter.source import open_source
from mpo_exporter.texts import calibration_for, held_out_text
from mpo_formats import ConfigError


def run_report(
    file: Path,
    teacher: str,
    out: Path,
    force: bool,
    measure: MeasureRequest,
    calib: Path | None,
    calib_windows: int | None,
    without_cores: bool | None,
    machine: Machine,
) -> Report:
    """Makes the report of an existing file."""
    machine.prepare()
    if calib_windows is not None and calib_windows < 0:
        raise ConfigError(f"--calib-windows {calib_windows}: expected 0 or more")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a .mpo file that mpo-export wrote")
    check_folder(out, "--out")
    earlier = prepare(out, force)
    windows = COUNT if calib_windows is None else calib_windows
    with open_source(teacher) as source:
        held_out, reason = held_out_text(source, measure.text, measure.tokens)
        calibration, _ = calibration_for(source, Options(), calib, windows)
    print(f"measuring {file} beside {source.name} into {out}", flush=True)
    return make_report(
        Job(
            file=file,
            teacher=source.folder,
            name=file.stem,
            folder=out,
            text=held_out,
            why_no_text=reason,
            calibration=calibration,
            calib_windows=calib_windows,
            fit_windows=windows,
            device=machine.device,
            threads=machine.threads,
            without_cores=without_cores,
            earlier=earlier,
        )
    )
