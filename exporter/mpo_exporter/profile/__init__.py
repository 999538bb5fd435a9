"""How much each layer matters: `mpo-export profile`, and what plans that choose layers ask."""
