"""Plans: which terms each layer gets."""
