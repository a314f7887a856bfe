"""The start of a run: what is requested, what it resolves to, where it resumes, and on what all ranks agree."""
