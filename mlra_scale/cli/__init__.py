"""The command line: `mlra-scale COMMAND ...`, one file per command; tools/*.py run the same commands."""
