"""Readers: each turns one format's header into a `CheckpointSpec`."""
