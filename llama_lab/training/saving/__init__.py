"""A run's state on disk: checkpoints, written whole or not at all, kept or removed, chosen among."""
