"""What layers and this machine measure: surveys, sensitivity, latency, and where they are kept."""
