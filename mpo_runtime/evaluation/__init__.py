"""`mpo-run eval`: models asked the questions of standard tasks, through lm-eval."""
