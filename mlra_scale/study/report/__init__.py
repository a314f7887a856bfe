"""Reports of a run or of a sweep: one HTML file that needs nothing else, and its figures as PNG files.

records.py and sweep_record.py read what was recorded; statistics.py, comparisons.py and associations.py compute;
wording.py writes numbers; *_figures.py draw; run_report.py and sweep_report.py fill the templates.
"""
