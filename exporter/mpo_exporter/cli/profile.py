"""What mpo-export profile does: measure, print, write."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_exporter.measure.profile import Group, Profile, profile_model
from mpo_exporter.report.profile_plots import require_matplotlib, write_plots
from mpo_exporter.request import ProfileRequest, check_folder
from mpo_exporter.source import open_source
from mpo_exporter.texts import calibration_text, calibration_walk
from mpo_formats import OutputError
from mpo_runtime.cli import console


def run_profile(request: ProfileRequest) -> Profile:
    """Profiles a model, prints the tables, and writes JSON and plots if a folder is named.

    Raises:
        MpoError: for a model or text that cannot be read, a folder that cannot be written to, or missing matplotlib.
    """
    request.machine.prepare()
    if request.out is not None:
        if request.plots:
            require_matplotlib()
        check_folder(request.out, "--out")
    with open_source(request.model) as source:
        text = calibration_text(source, request.calibration.text)
        with tempfile.TemporaryDirectory(prefix="mpo-profile-") as work, console.progress("profile") as update:
            profile = profile_model(
                source.weights,
                source.name,
                text,
                calibration_walk(source, text, Path(work), request.windows),
                level=request.level,
                bits=request.bits,
                chi=request.chi,
                progress=update,
                log=print,
            )
    print_profile(profile)
    if request.out is not None:
        write_profile(profile, request.out, request.plots)
    return profile


def print_profile(profile: Profile) -> None:
    """Prints the tables and the answers."""
    out = Console(highlight=False)
    expected = "expected" if profile.level == "fast" else "measured"
    for title, groups in (("by block", profile.by_block()), ("by type", profile.by_type())):
        out.print(group_table(f"{title}: KL {expected} of one matrix alone, summed", groups, profile))
    if profile.level == "full":
        out.print(measured_table(profile))
    for part in ("integers", "cores"):
        out.print(f"deeper blocks compress better ({getattr(profile, part)})? {profile.depth_answer(part)}")
    found = profile.precious()
    named = ", ".join(short(one.layer) for one in found[:8]) or "none stands out"
    out.print(f"better left alone (over 5 times the median cost for each weight, {profile.integers}): {named}")


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
    """All measured layers as a table."""
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
    """A layer's name without the prefix that all share."""
    return name.removeprefix("model.").removeprefix("layers.")


def write_profile(profile: Profile, folder: Path, plots: bool) -> None:
    """Writes profile.json and, if asked for, the plots."""
    target = folder / "profile.json"
    try:
        target.write_text(json.dumps(profile.plain(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); give another folder with --out") from None
    made = [target, *(write_plots(profile, folder) if plots else [])]
    print("wrote " + ", ".join(map(str, made)))
