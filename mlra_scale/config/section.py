"""What every section of the schema is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


def tuple_of_list(value: Any) -> Any:
    """Makes a tuple of a list: YAML and JSON know lists only; strict tuples would refuse them."""
    return tuple(value) if isinstance(value, list) else value


Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Quantile = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Text = Annotated[str, Field(min_length=1)]
Tag = Annotated[str, Field(min_length=1, max_length=64)]


class Section(BaseModel):
    """Base of all sections: immutable, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
