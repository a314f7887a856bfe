"""Fails if a test was skipped without naming what it needs, or if nothing ran: `check_skips.py REPORT.xml`.

Tests on a Slurm cluster or in a browser may be skipped on a developer's machine, but not here: .ci/run installs both.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree


def problems_of(report: Path) -> list[str]:
    """What is wrong with a JUnit report of pytest: skips without a need or of what .ci/run provides, or no test."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = [(case, mark) for case in cases for mark in case.iter("skipped")]
    problems = [
        f"skipped without a need: {case.get('classname')}.{case.get('name')}: {mark.get('message')}"
        for case, mark in skipped
        if not (mark.get("message") or "").startswith("needs ")
    ]
    problems += [
        f"must run where .ci/run does: {case.get('classname')}.{case.get('name')}: {mark.get('message')}"
        for case, mark in skipped
        if (case.get("classname") or "").startswith("tests.slurm.")
        or (mark.get("message") or "").startswith("needs Chromium")
    ]
    if len(cases) == len(skipped):
        problems.append(f"no test ran ({len(skipped)} skipped)")
    return problems


if __name__ == "__main__":
    found = problems_of(Path(sys.argv[1]))
    print("\n".join(found) or "no test was skipped without a reason")
    sys.exit(1 if found else 0)
