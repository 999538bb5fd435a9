"""What mpo-export does: find the source, export, report."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from mpo_exporter.calibrate.windows import COUNT, calibration_text
from mpo_exporter.export import Result, export
from mpo_exporter.heal.exported import check_healing, heal_exported
from mpo_exporter.heal.settings import Settings
from mpo_exporter.plan import Options
from mpo_exporter.report import print_report
from mpo_exporter.sources import find_source
from mpo_formats import ConfigError, OutputError
from mpo_runtime.checkpoint import Checkpoint
from mpo_runtime.cli import console
from mpo_runtime.model import check_device, read_text_files, set_threads
from mpo_runtime.texts import BUILT_IN_TEXT, TokenText, read_tokens

# Plans that are fitted to the built-in calibration text where the user names none.
CALIBRATED_PLANS = ("auto",)
# Multiply-adds and tokens that measuring may take if the user says nothing: at most a minute on two slow cores.
MEASURE_BUDGET = 2e11
MOST_TOKENS = 20_000
LEAST_TOKENS = 512


def run_export(
    model: str,
    plan: str,
    chi: int,
    cores: int,
    out: Path | None,
    force: bool,
    text: Path | None,
    measure_tokens: int | None,
    prefixes: tuple[int, ...],
    device: str,
    threads: int | None,
    *,
    calib: Path | None = None,
    calib_windows: int = COUNT,
    target_size: str | None = None,
    target_bpw: float | None = None,
    heal: Settings | None = None,
    heal_text: Path | None = None,
) -> Result:
    """Exports a model, heals the file where `heal` is given, and prints the report."""
    options = Options(plan, chi, cores)
    check_device(device)
    if measure_tokens is not None and measure_tokens < 0:
        raise ConfigError(f"--measure-tokens {measure_tokens}: expected 0 or more")
    if calib_windows < 0:
        raise ConfigError(f"--calib-windows {calib_windows}: expected 0 or more")
    set_threads(threads)
    for prefix in prefixes:
        if not 1 <= prefix < chi:
            raise ConfigError(f"--certify-chi {prefix}: expected 1 to {chi - 1}, below --chi")
    source = find_source(model)
    target = out or Path(f"{source.name}.mpo")
    if not force and os.path.lexists(target) and not target.is_dir():
        # The writer asks too (and names a folder as one), but only after the whole source was read.
        raise OutputError(f"{target}: exists already; give another name with --out or overwrite it with --force")
    if heal:
        check_healing(source.folder, heal, heal_text)
    options = replace(options, target_bytes=target_bytes(source.folder, target_size, target_bpw))
    held_out, reason = held_out_text(source.folder, text, measure_tokens)
    calibration, told = calibration_for(source.folder, plan, calib, calib_windows)
    wanted = f"χ ≤ {chi}" if options.target_bytes is None else f"at most {options.target_bytes:,} bytes"
    print(f"exporting {source.name} to {target} (plan {plan}, {wanted}); {told}", flush=True)
    with console.progress("export") as update:
        result = export(
            source.folder,
            target,
            options,
            force=force,
            revision=source.revision,
            text=held_out,
            prefixes=prefixes,
            device=device,
            progress=update,
            calibration=calibration,
            windows=calib_windows,
        )
    healed = heal_exported(target, source.folder, heal, heal_text, held_out, device) if heal else None
    print_report(result, held_out, reason, healed)
    return result


def target_bytes(folder: Path, size: str | None, bits: float | None) -> int | None:
    """The bytes that `--target-size` (2.1GB, 900 MB, 1200000) or `--target-bpw` ask for, None where neither is given.

    Raises:
        ConfigError: for both at once, or what cannot be read.
    """
    if size is not None and bits is not None:
        raise ConfigError("--target-size and --target-bpw: give one of them")
    if bits is not None:
        if not bits > 0:
            raise ConfigError(f"--target-bpw {bits:g}: expected more than 0 bits per weight")
        source = Checkpoint(folder)
        source.close()
        return int(bits * source.architecture.parameters() / 8)
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", size.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"--target-size {size}: expected bytes such as 2.1GB, 900MB or 1200000")
    return int(float(found[1]) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[(found[2] or "B").upper()])


def calibration_for(folder: Path, plan: str, calib: Path | None, windows: int) -> tuple[TokenText | None, str]:
    """The text to calibrate on, or None, and what to tell about it: `auto` always calibrates, other plans when asked to."""
    if windows == 0 or plan == "dense" or (calib is None and plan not in CALIBRATED_PLANS):
        return None, "fitted to the weights alone, without calibration text"
    source = Checkpoint(folder)
    tokenizer, template = read_text_files(source)
    source.close()
    if tokenizer is None and calib is None:
        return None, "fitted to the weights alone: the model has no tokenizer.json to read calibration text with"
    text = calibration_text(calib, tokenizer, template)
    return text, f"fitted to the calibration text {text.name}"


def held_out_text(folder: Path, text: Path | None, tokens: int | None) -> tuple[TokenText | None, str]:
    """The tokens to measure on, or None and the reason why nothing is measured."""
    if tokens == 0:
        return None, "--measure-tokens 0"
    source = Checkpoint(folder)
    tokenizer, template = read_text_files(source)
    parameters = source.architecture.parameters()
    source.close()
    if tokenizer is None:
        return None, "the model has no tokenizer.json"
    whole = read_tokens(text or BUILT_IN_TEXT, tokenizer, template)
    budget = min(int(MEASURE_BUDGET / parameters), MOST_TOKENS) if tokens is None else tokens
    if tokens is None and budget < LEAST_TOKENS:
        return None, "the model is large for this machine; give --measure-tokens N to measure all the same"
    if budget >= whole.ids.size:
        return whole, ""
    return replace(whole, ids=whole.ids[:budget]), ""
