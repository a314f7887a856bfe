"""The command line: names, help, shared options, what tools/*.py run."""
