"""The records of a manifest: what a published directory holds, and how it was made."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer

from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CheckpointError

__all__ = ["FileRecord", "Manifest", "WeightRecord"]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileRecord(_Closed):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class WeightRecord(_Closed):
    """One compressed parameter: its specification as a `CompressedWeight`, and how it sits in the model.

    `input` specifies the `InputFormat` of its input, and is left out where there is none. Of a stack that may be loaded in part, `errors` are the relative errors of its first 1, 2, ... terms; of others it is left out.
    `flat`, where experts lie below each other in a parameter of two axes, is left out of others too.
    """

    spec: dict[str, Any]
    transposed: bool
    experts: int = Field(ge=0, le=65536)
    errors: list[FiniteFloat] | None = None
    flat: bool = False
    input: dict[str, str] | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, make: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = make(self)
        absent = {"errors": None, "flat": False, "input": None}
        return {key: value for key, value in values.items() if key not in absent or value != absent[key]}

    def parameter(self, name: str) -> WeightParameter:
        rows, cols = self.spec["shape"]
        if self.experts and rows % self.experts:
            raise CheckpointError(f"{name}: {rows} rows do not divide among {self.experts} experts.")
        maps = [m for m in (self.spec.get("input_map"), self.spec.get("output_map")) if isinstance(m, dict)]
        if any(change.get("parts", self.experts) != self.experts for change in maps):
            raise CheckpointError(f"{name}: its maps are not those of {self.experts} experts.")
        if self.flat and not self.experts:
            raise CheckpointError(f"{name}: only experts can lie below each other (flat), and there are none.")
        return WeightParameter(name, (rows // max(self.experts, 1), cols), self.transposed, self.experts, self.flat)


class Manifest(_Closed):
    """What a directory holds and how it was made.

    `attention` specifies the `AttentionOperands` of modules by their names, and is left out where there are none.
    `prompt_cost` are the nats a token that 8-bit inputs cost in prompts of the native engine, left out where it is not much.
    """

    bitpress: int
    files: dict[str, FileRecord]
    weights: dict[str, WeightRecord]
    aliases: dict[str, str]
    left_out: list[str]
    recipe: dict[str, Any]
    job: dict[str, Any]
    prompt_cost: FiniteFloat | None = None
    attention: dict[str, dict[str, dict[str, str]]] = {}

    @model_serializer(mode="wrap")
    def _without_absent(self, make: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = make(self)
        absent: dict[str, Any] = {"prompt_cost": None, "attention": {}}
        return {key: value for key, value in values.items() if key not in absent or value != absent[key]}
