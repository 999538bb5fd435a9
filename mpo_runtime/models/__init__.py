"""Model families: each architecture is written once, against the op set."""
