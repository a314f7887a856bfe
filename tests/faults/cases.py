"""All cases."""

from tests.faults import damage, jobs, kills, places, reading, saves, stops, writing
from tests.faults.case import Case

CASES: tuple[Case, ...] = (
    *saves.CASES,
    *kills.CASES,
    *stops.CASES,
    *damage.CASES,
    *reading.CASES,
    *places.CASES,
    *writing.CASES,
    *jobs.CASES,
)
