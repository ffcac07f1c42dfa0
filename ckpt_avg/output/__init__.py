"""The output file: complete or absent."""
