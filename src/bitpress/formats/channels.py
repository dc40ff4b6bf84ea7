"""ChannelFormat: how an input is rounded whose channels are not alike.

    Q(x) = z + f * (Q_first, Q_rest)((x - z) / f)

z   `shift`, one number a channel: what lies far from 0 is rounded by its distance from z. As a product w z is a bias.
f   `copies`, a whole number a channel: the channel counts as f channels of an f-th of it, with the same column of the weight
    each. They round alike, so that f times one of them is their sum, and codes of all are those of one.
Q_first  a format of the leading channels, which a map may have put there; the other channels have `rest`
c   `clip`, two numbers: in every block of `rest`, values above c[0] times its largest and below c[1] times its smallest are taken to these
    ends before its parameters are fitted. They are not static ones then.

Before rounding, and without `clip`, this is the identity. `first` is dynamic. Beside the keys of an `ActivationFormat`, its specification
holds those that it has of

    {"first": "16 int8-row-fp32", "shift": "float32", "copies": "uint8", "clip": "float32"}
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8

from bitpress.errors import FormatError
from bitpress.formats.activation import ActivationFormat
from bitpress.formats.fake_quantize import clip_blocks
from bitpress.formats.format import Expected

__all__ = ["ChannelFormat", "InputFormat", "build_input", "expected_input"]

_KEYS = ("first", "shift", "copies", "clip")
_STORED = {"shift": torch.float32, "copies": torch.uint8, "clip": torch.float32}


@dataclass(frozen=True)
class ChannelFormat:
    """`rest` rounds all channels, or those after the `count` that `first` rounds; `shift`, `copies` and `clip` as at the head of this file."""

    rest: ActivationFormat
    first: ActivationFormat | None = None
    count: int = 0
    shift: Float[torch.Tensor, " in"] | None = None
    copies: UInt8[torch.Tensor, " in"] | None = None
    clip: Float[torch.Tensor, " ends"] | None = None

    def __post_init__(self) -> None:
        if (self.first is None) != (self.count == 0) or self.count < 0:
            raise FormatError(f"{self.count} leading channels and {'no' if self.first is None else 'a'} format for them.")
        if self.first is not None and (self.first.parameters != "dynamic" or self.rest.parameters != "dynamic"):
            raise FormatError("leading channels of a format of their own need dynamic parameters, as do the others.")
        if self.clip is not None and self.rest.parameters == "static":
            raise FormatError("static parameters are a range of their own; clip goes with those that are fitted to a token.")

    @property
    def name(self) -> str:
        """Words for a report: `int4-row-fp32 dynamic, first 16 int8-row-fp32, shifted`."""
        more = [] if self.first is None else [f"first {self.count} {self.first.format.name}"]
        more += [
            word
            for word, t in (("shifted", self.shift), ("outliers apart", self.copies), ("clipped", self.clip))
            if t is not None
        ]
        return ", ".join([self.rest.name, *more])

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        own = {"shift": self.shift, "copies": self.copies, "clip": self.clip}
        return {**self.rest.tensors, **{name: t for name, t in own.items() if t is not None}}

    def enter(self, x: Float[torch.Tensor, "*tokens in"]) -> Float[torch.Tensor, "*tokens in"]:
        """Return (x - z) / f, in float32 or the type of x if that is wider."""
        u = x if x.dtype == torch.float64 else x.float()
        u = u if self.shift is None else u - self.shift.to(u.dtype)
        return u if self.copies is None else u / self.copies.to(u.dtype)

    def leave(self, u: Float[torch.Tensor, "*tokens in"]) -> Float[torch.Tensor, "*tokens in"]:
        """Return z + f u."""
        u = u if self.copies is None else u * self.copies.to(u.dtype)
        return u if self.shift is None else u + self.shift.to(u.dtype)

    def round(self, x: Float[torch.Tensor, "*tokens in"]) -> Float[torch.Tensor, "*tokens in"]:
        """Return the values that the product sees, in the type of x. Raises NumericsError where x is not finite."""
        u = self.enter(x)
        if self.first is None:
            return self.leave(self.rest.round(self._clipped(u))).to(x.dtype)
        head, tail = u[..., : self.count], self._clipped(u[..., self.count :])
        return self.leave(torch.cat([self.first.round(head), self.rest.round(tail)], -1)).to(x.dtype)

    def _clipped(self, u: Float[torch.Tensor, "*tokens channels"]) -> Float[torch.Tensor, "*tokens channels"]:
        """Return values between the ends of every block's range. A NaN stays one."""
        return u if self.clip is None or not u.numel() else clip_blocks(u, self.rest.format, self.clip[0], self.clip[1])

    def to(self, device: torch.device) -> "ChannelFormat":
        """Return the format with its stored values on another device."""
        shift, copies, clip = (None if t is None else t.to(device) for t in (self.shift, self.copies, self.clip))
        return replace(self, rest=self.rest.to(device), shift=shift, copies=copies, clip=clip)

    def fits(self, in_features: int) -> None:
        """Raise FormatError unless the format takes inputs of a width."""
        if self.first is not None:
            if self.count >= in_features:
                raise FormatError(
                    f"{self.count} leading channels have a format of their own, and there are only {in_features}."
                )
            self.first.format.block_grid((1, self.count))
        self.rest.format.block_grid((1, in_features - self.count))

    def spec(self) -> dict[str, str]:
        own = {} if self.first is None else {"first": f"{self.count} {self.first.format.name}"}
        kept = {key: str(_STORED[key]).removeprefix("torch.") for key in _STORED if key in self.tensors}
        return {**self.rest.spec(), **own, **kept}

    def check(self) -> None:
        """Raise FormatError for stored values that are no shift or no number of copies."""
        self.rest.check()
        if self.shift is not None and not bool(torch.isfinite(self.shift).all()):
            raise FormatError("the input's shift holds a NaN or an infinity.")
        if self.copies is not None and not bool((self.copies > 0).all()):
            raise FormatError("the input's copies hold a 0: a channel is there once at least.")
        if self.clip is not None and not bool(((self.clip > 0) & (self.clip <= 1)).all()):
            raise FormatError("the input's clip is two factors above 0, of at most 1.")


InputFormat = ActivationFormat | ChannelFormat


def expected_input(spec: Mapping[str, Any], in_features: int) -> Expected:
    """Return dtype and shape of every tensor that the specification of an input implies. Raises FormatError or UsageError for a bad one."""
    plain, own = _split(spec)
    made = ActivationFormat.expected(plain, in_features)
    for key in _STORED:
        if key in own:
            made[key] = (_STORED[key], (2,) if key == "clip" else (in_features,))
    _first(plain, own)
    return made


def build_input(spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> InputFormat:
    """Put the format of an input together from tensors that are the expected ones; `check` looks at what they hold."""
    plain, own = _split(spec)
    rest = ActivationFormat.build(plain, {name: t for name, t in tensors.items() if name not in _STORED})
    if not own:
        return rest
    return ChannelFormat(rest, *_first(plain, own), *(tensors[key] if key in own else None for key in _STORED))


def _split(spec: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the keys of an `ActivationFormat` from the others. Raises FormatError for stored values of another type."""
    if not isinstance(spec, Mapping):
        raise FormatError("an input is specified by format and parameters.")
    own = {key: spec[key] for key in _KEYS if key in spec}
    for key, dtype in _STORED.items():
        if key in own and own[key] != str(dtype).removeprefix("torch."):
            raise FormatError(f"an input's {key} is {own[key]!r} where {dtype} is stored.")
    return {key: value for key, value in spec.items() if key not in own}, own


def _first(plain: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[ActivationFormat | None, int]:
    if "first" not in own:
        return None, 0
    count, _, name = own["first"].partition(" ") if isinstance(own["first"], str) else ("", "", "")
    if not (count.isascii() and count.isdigit() and len(count) < 10 and int(count) > 0 and name):
        raise FormatError(
            f"first is {own['first']!r} where a number of channels and their format are needed: '16 int8-row-fp32'."
        )
    first = ActivationFormat.build({"format": name, "parameters": "dynamic"}, {})
    ChannelFormat(ActivationFormat.build(plain, {}), first, int(count))  # raises
    return first, int(count)
