"""Heals on several devices: torchrun --nproc-per-node N -m mpo_exporter.heal FILE --teacher MODEL."""

from __future__ import annotations

from mpo_exporter.cli.heal import main

main()
