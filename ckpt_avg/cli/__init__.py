"""The command line: click, progress bars, text and JSON, exit codes."""
