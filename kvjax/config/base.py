"""Defines the base class of config sections."""

from __future__ import annotations

import pydantic


class Section(pydantic.BaseModel):
    """A frozen part of a config."""

    model_config = pydantic.ConfigDict(frozen=True)
