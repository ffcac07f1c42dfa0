"""Input files, which may change while they are read."""
