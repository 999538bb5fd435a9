"""Where weights come from: checkpoints, the configuration, the local store and the hub."""
