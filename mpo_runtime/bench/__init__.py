"""`mpo-run bench`: models timed side by side, each in a process of its own."""
