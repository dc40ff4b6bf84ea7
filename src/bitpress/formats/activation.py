"""ActivationFormat: how the input of a product is rounded before the product sees it.

    y = T_out (sum of terms) Q(T_in x)

`Q` comes after the input map, so that a product can run on codes on both sides: a rotation spreads outliers before they are rounded.
Any number format can be one. With `dynamic` parameters, those of every token, or of every group of channels in a token, are fitted to the
token alone: what is in a batch beside it changes nothing. With `static` parameters, one set is stored with the layer and serves all tokens.
With `local` ones the scale that all groups share is stored, and the small scales under it are fitted to every token, as NVFP4 has both.

    {"format": "int8-row", "parameters": "dynamic"}        a scale for every token
    {"format": "e4m3-g32-e8m0", "parameters": "dynamic"}   a scale for every 32 channels of a token, a power of two
    {"format": "int8-tensor", "parameters": "static"}      one stored scale, the tensor `input.scale`
    {"format": "e2m1-g16-fp8over", "parameters": "local"}  a scale for every 16 channels, under the stored one `input.scale_tensor`
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, unknown_name
from bitpress.formats.fake_quantize import fake_quantize
from bitpress.formats.format import Expected, Format
from bitpress.formats.grids.grid import Params, Streamed
from bitpress.formats.scale_store import shared_name
from bitpress.formats.table import stored_format
from bitpress.formats.terms.packed import Packed

__all__ = ["ActivationFormat", "ParameterSource"]

ParameterSource = Literal["dynamic", "static", "local"]


@dataclass(frozen=True)
class ActivationFormat:
    """A number format for inputs `[tokens, in]`.

    parameters   "dynamic": fitted to every token; the format's block is `row` or `gN`
                 "static": stored in `tensors`; the block is `tensor`
                 "local": the scale of the whole tensor is stored in `tensors`, those under it are fitted; the block is `row` or `gN`
    tensors      the stored parameters under the names that a packed term gives them; empty where they are dynamic
    """

    format: Format
    parameters: ParameterSource = "dynamic"
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fmt = self.format
        if fmt.layout != "dense":
            raise FormatError(f"{fmt.name}: the codes of inputs are not stored and have no layout; leave {fmt.layout} out.")
        if isinstance(fmt.grid, Streamed):
            raise FormatError(
                f"{fmt.name}: its codes run from row to row, so one token would change another; use another grid."
            )
        if self.parameters == "dynamic" and (fmt.block.rows != 1 or not fmt.rows_apart):
            other = "parameters: local, which stores what they share" if _has_local(fmt) else "a block of one row"
            raise FormatError(f"{fmt.name}: tokens would share dynamic parameters, and one would change another; use {other}.")
        if self.parameters == "static" and fmt.block.name != "tensor":
            raise FormatError(f"{fmt.name}: static parameters serve every token and channel; use the block tensor.")
        if self.parameters == "local" and not _has_local(fmt):
            raise FormatError(
                f"{fmt.name}: it has no scale of the whole tensor above those of groups; take one that has, such as e2m1-g16-fp8."
            )
        learned = [p.name for p in fmt.grid.params if p.name not in ("scale", "zero")]
        if self.parameters == "static" and (learned or fmt.grid.span > 1 or fmt.grid.num_codes <= 2):
            raise FormatError(
                f"{fmt.name}: a range does not say its static parameters; use integers or floats of one value a code."
            )

    @classmethod
    def static(cls, fmt: Format, params: Params) -> "ActivationFormat":
        """Return a format whose parameters are those that `fmt.fit` chose on a sample of inputs."""
        sample = torch.zeros(1, fmt.grid.span, device=params["scale"].device)
        stored = Packed.pack(fmt, fmt.encode(sample, params), params).tensors
        return cls(fmt, "static", {name: t for name, t in stored.items() if name != "codes"})

    @classmethod
    def local(cls, fmt: Format, params: Params) -> "ActivationFormat":
        """Return a format that keeps the scales of the whole tensor, and no others, of those that `fmt.fit` chose on a sample."""
        return cls(fmt, "local", {name: params[name].reshape(1).float() for name in _outer_names(fmt)})

    @property
    def name(self) -> str:
        """Words for a report: `int8-row dynamic`."""
        return f"{self.format.name} {self.parameters}"

    def round(self, x: Float[torch.Tensor, "*tokens in"]) -> Float[torch.Tensor, "*tokens in"]:
        """Return the values that the product sees, in the type of x. Raises NumericsError where x is not finite.

        The gradient is the straight-through one; fitted parameters have theirs, stored ones have none.
        """
        if self.parameters == "dynamic" or not x.numel():
            return fake_quantize(x, self.format, ranges=True)
        if self.parameters == "local":
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            shared = {name: t.reshape(1, 1) for name, t in self.tensors.items()}
            return fake_quantize(x, self.format, self.format.fit(flat, shared=shared), ranges=True)
        return fake_quantize(x, self.format, self.stored())

    def to(self, device: torch.device) -> "ActivationFormat":
        """Return the format with its stored parameters on another device."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def spec(self) -> dict[str, str]:
        """Return the JSON fields that, with the tensors, define the format."""
        return {"format": self.format.name, "parameters": self.parameters}

    @staticmethod
    def expected(spec: Mapping[str, Any], in_features: int | None = None) -> Expected:
        """Return dtype and shape of every tensor that a specification implies. Raises FormatError or UsageError for a bad one.

        `in_features` are the values of a token, where they are known; what is stored does not depend on them.
        """
        fmt, parameters = _read(spec)
        some = fmt.block.cols if isinstance(fmt.block.cols, int) else fmt.grid.span
        tensors = fmt.expected((1, some if in_features is None else in_features))
        ActivationFormat(fmt, parameters)
        kept = {"dynamic": [], "local": _outer_names(fmt), "static": [name for name in tensors if name != "codes"]}
        return {name: tensors[name] for name in kept[parameters]}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "ActivationFormat":
        """Put a format together from tensors that are the expected ones; `check` looks at what they hold."""
        return cls(*_read(spec), tensors)

    def check(self) -> None:
        """Raise FormatError where a stored parameter is not finite, or a scale not above 0."""
        for name, value in (self.stored() if self.parameters == "static" else self.tensors).items():
            if not bool(torch.isfinite(value).all()):
                raise FormatError(f"the input's {name} holds a NaN or an infinity.")
            if name.startswith("scale") and not bool((value > 0).all()):
                raise FormatError(f"the input's {name} is {float(value.min()):g}, and must be above 0.")

    def stored(self) -> Params:
        """Return static parameters as they are stored, in float32."""
        return Packed(self.format, (1, self.format.grid.span), self.tensors).unpack_params()


def _outer_names(fmt: Format) -> list[str]:
    """Return the names of the values that scales share."""
    shared = [part for part in fmt.store.expected(1, 1) if part]
    return [shared_name(p.name, part) for p in fmt.grid.params if p.kind == "scale" for part in shared]


def _has_local(fmt: Format) -> bool:
    """Whether a token's scales can be fitted alone once one value of the whole tensor is known."""
    alone = fmt.block.rows == 1 and all(p.scope == "block" for p in fmt.grid.params)
    return alone and set(fmt.store.expected(1, 1)) == {"", "tensor"} and bool(_outer_names(fmt))


def _read(spec: Mapping[str, Any]) -> tuple[Format, ParameterSource]:
    if not isinstance(spec, Mapping) or set(spec) != {"format", "parameters"}:
        raise FormatError("an input is specified by format and parameters, no more and no less.")
    name, parameters = spec["format"], spec["parameters"]
    if not isinstance(name, str) or not isinstance(parameters, str):
        raise FormatError("an input's format and its parameters are specified by names.")
    if parameters not in get_args(ParameterSource):
        raise unknown_name("kind of parameters", parameters, get_args(ParameterSource))
    return stored_format(name), cast(ParameterSource, parameters)
