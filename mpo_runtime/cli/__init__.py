"""The command line of mpo-run."""
