"""Reports of a run or of a sweep: one HTML file that needs nothing else, and its figures as PNG files.

run_record.py and sweep_results.py read what is there, however little; comparisons.py and associations.py say what it
supports; run_figures.py and sweep_figures.py draw; run_report.py and sweep_report.py put the page together.
"""
