"""What `mpo-export report` does: find the models and the texts, measure, write."""

from __future__ import annotations

from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.cli.export import calibration_for, held_out_text
from mpo_exporter.plan.named import Options
from mpo_exporter.report.facts import Report
from mpo_exporter.report.folder import prepare
from mpo_exporter.report.gather import Job
from mpo_exporter.report.make import make_report
from mpo_exporter.source import find_source
from mpo_formats import ConfigError
from mpo_runtime.loading import check_device, set_threads


def run_report(
    file: Path,
    teacher: str,
    out: Path,
    force: bool,
    text: Path | None,
    measure_tokens: int | None,
    calib: Path | None,
    calib_windows: int | None,
    without_cores: bool | None,
    device: str,
    threads: int | None,
) -> Report:
    """Makes the report of an existing file."""
    check_device(device)
    for name, value in (("--measure-tokens", measure_tokens), ("--calib-windows", calib_windows)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} {value}: expected 0 or more")
    set_threads(threads)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a .mpo file that mpo-export wrote")
    source = find_source(teacher)
    earlier = prepare(out, force)
    held_out, reason = held_out_text(source.folder, text, measure_tokens)
    windows = COUNT if calib_windows is None else calib_windows
    calibration, _ = calibration_for(source.folder, Options(), "auto", calib, windows)
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
            device=device,
            threads=threads,
            without_cores=without_cores,
            earlier=earlier,
        )
    )
