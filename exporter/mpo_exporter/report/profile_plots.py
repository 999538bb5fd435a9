"""The two plots of mpo-export profile (PNG): a heat map by block and type of matrix, and the cost by depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mpo_exporter.measure.profile import TYPES, Profile
from mpo_formats import ConfigError, OutputError

HEAT, DEPTH = "profile-heat.png", "profile-depth.png"


def require_matplotlib() -> Any:
    """matplotlib.pyplot without a display; raises ConfigError, naming the extra, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib; pip install 'mpo-runtime[report]', or give --no-plots") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plots

    return plots


def write_plots(profile: Profile, folder: Path) -> list[Path]:
    """Writes both plots into an existing folder; returns their paths.

    Raises:
        ConfigError: where matplotlib is not installed.
        OutputError: where they cannot be written.
    """
    plots = require_matplotlib()
    made = ((HEAT, heat_map(plots, profile)), (DEPTH, depth_lines(plots, profile)))
    try:
        for name, figure in made:
            figure.savefig(folder / name, dpi=120, bbox_inches="tight")
    except OSError as error:
        raise OutputError(
            f"{folder}: plots cannot be written ({error.strerror}); give another folder with --out"
        ) from None
    finally:
        plots.close("all")
    return [folder / name for name, _ in made]


def heat_map(plots: Any, profile: Profile) -> Any:
    """The cost per million weights by block and type of matrix, for integers and for cores, logarithmic."""
    blocks = 1 + max((one.block for one in profile.layers if one.block is not None), default=0)
    figure, axes = plots.subplots(1, 2, figsize=(11, 3 + 0.28 * blocks), sharey=True, layout="constrained")
    for axis, part in zip(axes, ("integers", "cores"), strict=True):
        grid = np.full((blocks, len(TYPES)), np.nan)
        for one in profile.layers:
            if one.block is not None:
                grid[one.block, TYPES.index(one.kind)] = one.loss_per_million(part)
        shown = axis.imshow(np.log10(np.maximum(grid, 1e-12)), aspect="auto", cmap="viridis")
        axis.set_xticks(range(len(TYPES)), [kind.split(".")[1].removesuffix("_proj") for kind in TYPES], rotation=45)
        axis.set_yticks(range(blocks))
        axis.set_title(str(getattr(profile, part)), fontsize=10)
        figure.colorbar(shown, ax=axis, label="log10(nats / million weights)")
    axes[0].set_ylabel("block")
    figure.suptitle(f"{profile.model}: what compressing one matrix alone costs ({profile.level})")
    return figure


def depth_lines(plots: Any, profile: Profile) -> Any:
    """The cost of each block: all its attention and MLP matrices together."""
    figure, axis = plots.subplots(figsize=(8, 4.5))
    groups = profile.by_block()
    places = range(len(groups))
    axis.plot(places, [group.integers_each for group in groups], marker="o", label=profile.integers)
    if all(group.cores_each is not None for group in groups):
        axis.plot(places, [group.cores_each for group in groups], marker="s", label=profile.cores)
    axis.set_yscale("log")
    axis.set_xticks(places)
    axis.set_xlabel("block")
    axis.set_ylabel("nats per token and million weights")
    axis.set_title(f"{profile.model}: cost over depth ({profile.level})")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
