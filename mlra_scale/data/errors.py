"""Until all rooms take DataError from mlra_scale.data."""

from mlra_scale.data import DataError as DataError
