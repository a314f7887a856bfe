"""All cases."""

from tests.faults import damage, jobs, kills, places, saves, stops
from tests.faults.case import Case

CASES: tuple[Case, ...] = (
    *saves.CASES,
    *kills.CASES,
    *stops.CASES,
    *damage.CASES,
    *places.CASES,
    *jobs.CASES,
)
