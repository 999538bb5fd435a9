"""`python -m mpo_exporter.heal FILE …` is `mpo-export heal FILE …`; torchrun starts it so on several devices."""

from __future__ import annotations

import runpy
import sys

sys.argv.insert(1, "heal")
runpy.run_module("mpo_exporter.cli", run_name="__main__")
