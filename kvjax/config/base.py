"""Defines the base class of config sections: numbers are finite and of a size that arrays can have."""

from __future__ import annotations

from typing import Any

import pydantic

# Steps, sizes and positions become 32-bit integers on the devices.
_LARGEST = 2**31 - 1
_NUMBERS = (int, float, int | None, float | None)


class Section(pydantic.BaseModel):
    """A frozen part of a config.

    Its numbers are finite. None is `true` or `false`, which Python would count as 1 and 0. Whole numbers other than
    seeds fit into 32 bits.
    """

    model_config = pydantic.ConfigDict(frozen=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in _NUMBERS:
            raise ValueError("expected a number, not true or false")
        return value

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _fits_an_array(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if not info.field_name.endswith("seed"):
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) > _LARGEST:
                    raise ValueError(f"expected at most {_LARGEST}")
        return value

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _can_be_a_path(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("expected a text without the character NUL, which no path can have")
        return value
