"""The loop: command line, schedule, record, run directory, resume, candidates."""
