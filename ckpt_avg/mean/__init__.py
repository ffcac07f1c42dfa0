"""The bytes of the mean."""
