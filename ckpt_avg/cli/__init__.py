"""The command line: click, text and JSON, exit codes."""
