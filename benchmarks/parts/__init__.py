"""What several benchmarks share; the scripts themselves lie in the folder above."""
