"""What mpo-export profile does: measure, print, write."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_exporter.calibrate.windows import calibration_text
from mpo_exporter.export import planner_for
from mpo_exporter.fit.shapes import balanced_shape
from mpo_exporter.measure.expected import layer_loss
from mpo_exporter.measure.summary import Group, Judged, Profile
from mpo_exporter.plan.named import LEVELS
from mpo_exporter.plan.planner import Planner
from mpo_exporter.report.profile_plots import require_matplotlib, write_plots
from mpo_exporter.source import find_source
from mpo_exporter.terms import integers, operator
from mpo_formats import ConfigError, LinearSpec, OutputError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.spec import BITS
from mpo_runtime.cli import console
from mpo_runtime.loading import check_device, read_text_files, set_threads
from mpo_runtime.weights.checkpoint import Checkpoint

GROUP = 64


def run_profile(
    model: str,
    level: str,
    bits: int,
    chi: int,
    out: Path | None,
    plots: bool,
    calib: Path | None,
    windows: int,
    device: str,
    threads: int | None,
) -> Profile:
    """Profiles a model, prints the tables and writes JSON and plots where a folder was given.

    Raises:
        ConfigError: for options that cannot be honoured, or a model without a tokenizer to read the text with.
        OutputError: when the folder cannot be written to.
    """
    if level not in LEVELS:
        raise ConfigError(f"--level {level}: expected one of {', '.join(LEVELS)}")
    if bits not in BITS:
        raise ConfigError(f"--bits {bits}: expected one of {', '.join(map(str, BITS))}")
    if chi < 1:
        raise ConfigError(f"--chi {chi}: the bond dimension must be at least 1")
    if windows < 1:
        raise ConfigError(f"--calib-windows {windows}: expected at least 1; a profile is made on text")
    check_device(device)
    set_threads(threads)
    source = find_source(model)
    if out is not None:
        if plots:
            require_matplotlib()
        make_folder(out)
    checkpoint = Checkpoint(source.folder)
    try:
        tokenizer, template = read_text_files(checkpoint)
        text = calibration_text(calib, tokenizer, template)
        with tempfile.TemporaryDirectory(prefix="mpo-profile-") as work, console.progress("profile") as update:
            planner = planner_for(checkpoint, text, windows, Path(work), None, update, print)
            profile = profiled(planner, source.name, level, bits, chi)
    finally:
        checkpoint.close()
    print_profile(profile)
    if out is not None:
        write_profile(profile, out, plots)
    return profile


def profiled(planner: Planner, name: str, level: str, bits: int, chi: int) -> Profile:
    """Judges every layer in integers and, but for the tables, as balanced cores alone."""
    spec = planner.source.spec
    whole = {one.name: replace(one, terms=(integers(one.in_features, bits, GROUP),)) for one in spec.linears}
    cores = {
        one.name: replace(one, terms=(operator(*balanced_shape(one.out_features, one.in_features, 2), chi, "f16"),))
        for one in spec.linears
        if one.name not in (EMBEDDING, HEAD)
    }
    if level == "full":
        return full_profile(planner, name, whole, cores, (f"{bits} bits", f"χ = {chi}"))
    surveyed = planner.survey()
    judged = [
        Judged(
            one.name,
            one.out_features * one.in_features,
            layer_loss(surveyed, whole[one.name]) or 0.0,
            layer_loss(surveyed, cores[one.name]) if one.name in cores else None,
        )
        for one in spec.linears
    ]
    return Profile(name, level, f"{bits} bits", f"χ = {chi}", tuple(judged))


def full_profile(
    planner: Planner, name: str, whole: dict[str, LinearSpec], cores: dict[str, LinearSpec], words: tuple[str, str]
) -> Profile:
    """Every layer measured twice, in integers and as cores."""
    found = list(planner.measured([*whole.values(), *cores.values()]))
    by_integers = {one.layer: one for one in found[: len(whole)]}
    by_cores = {one.layer: one for one in found[len(whole) :]}
    judged = [
        Judged(
            layer,
            linear.out_features * linear.in_features,
            max(by_integers[layer].kl_mean, 0.0),
            max(by_cores[layer].kl_mean, 0.0) if layer in by_cores else None,
            tuple(part[layer] for part in (by_integers, by_cores) if layer in part),
        )
        for layer, linear in whole.items()
    ]
    return Profile(name, "full", *words, tuple(judged))


def print_profile(profile: Profile) -> None:
    """Prints the tables and the answers."""
    out = Console(highlight=False)
    expected = "expected" if profile.level == "fast" else "measured"
    for title, groups in (("by block", profile.by_block()), ("by type", profile.by_type())):
        out.print(
            group_table(
                f"{title}: KL {expected} of one matrix alone, summed",
                groups,
                profile,
            )
        )
    if profile.level == "full":
        out.print(measured_table(profile))
    for part in ("integers", "cores"):
        out.print(f"deeper blocks compress better ({getattr(profile, part)})? {profile.depth_answer(part)}")
    dear = profile.precious()
    typical = "none stands out" if not dear else ", ".join(short(one.layer) for one in dear[:8])
    out.print(f"better left alone (over 5 times the median cost for each weight, {profile.integers}): {typical}")


def group_table(title: str, groups: list[Group], profile: Profile) -> Table:
    """Groups of layers as a table."""
    table = Table("", "layers", "weights", profile.integers, "a million", profile.cores, "a million", title=title)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for group in groups:
        cores = ("", "") if group.cores is None else (f"{group.cores:.3g}", f"{group.cores_each:.3g}")
        table.add_row(
            group.name,
            str(group.layers),
            f"{group.weights:,}",
            f"{group.integers:.3g}",
            f"{group.integers_each:.3g}",
            *cores,
        )
    return table


def measured_table(profile: Profile) -> Table:
    """Every measured layer."""
    table = Table("layer", "as", "KL", "perplexity", "output cosine", "norm drift", "activation drift", "error")
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for one in (row for judged in profile.layers for row in judged.measured):
        table.add_row(
            short(one.layer),
            one.terms,
            f"{one.kl_mean:.3g}",
            f"{100 * one.perplexity_increase:+.2f} %",
            f"{one.output_cosine:.4f}",
            f"{100 * one.norm_drift:+.2f} %",
            f"{one.activation_drift:.4f}",
            f"{one.error:.4f}",
        )
    return table


def short(name: str) -> str:
    """A layer's name without what all have in common."""
    return name.removeprefix("model.").removeprefix("layers.")


def make_folder(folder: Path) -> None:
    """Makes the folder of the results; raises OutputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); give another folder with --out") from None


def write_profile(profile: Profile, folder: Path, plots: bool) -> None:
    """Writes profile.json and, where wanted, the plots."""
    target = folder / "profile.json"
    try:
        target.write_text(json.dumps(profile.plain(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); give another folder with --out") from None
    made = [target, *(write_plots(profile, folder) if plots else [])]
    print("wrote " + ", ".join(map(str, made)))
