"""What every section of a job file is made of: one base class, numbers within bounds, text. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

LARGE = 2**31 - 1

Natural = Annotated[int, Field(ge=0, le=LARGE)]
Count = Annotated[int, Field(ge=1, le=LARGE)]
Width = Annotated[int, Field(ge=1, le=65536)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]


def words(text: str) -> str:
    if not text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise PydanticCustomError("words", "must be text, not empty, without control characters")
    return text


Words = Annotated[str, AfterValidator(words)]


class Section(BaseModel):
    """A mapping of a job file: unknown keys, other types, NaN and later changes are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
