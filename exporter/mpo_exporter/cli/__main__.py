"""`python -m mpo_exporter.cli` is `mpo-export`."""

from __future__ import annotations

from mpo_exporter.cli.main import main

main()
