"""Sources to an ordered list of checkpoints."""
