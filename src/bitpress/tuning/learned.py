"""Tensors of a block while they are learned: the codes of a weight, and vectors (norms, biases).

The codes of a weight are learned in their own basis, and other terms beside them likewise; its maps stay as they are, but for a diagonal at
either end (`LearnedSides`). A forward computes with the very values that would be stored at that moment: parameters are rounded as their store
rounds them, and the gradient passes through; maps in native code differ by rounding (`kernels.native_maps`). Where a layer's input is rounded
its value is a `CompressedLayer` that holds tensors with gradients in the place of stored ones, so that one product computes both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import FormatError
from bitpress.formats import CompressedLayer, CompressedWeight, Format, InputFormat, Packed, Term
from bitpress.formats.fake_quantize import inside_range
from bitpress.formats.grids.grid import EvenlySpaced, Params, Streamed
from bitpress.transforms.basis import into_basis
from bitpress.tuning.leaf import Leaf
from bitpress.tuning.relaxation import pass_through, round_through
from bitpress.tuning.sides import LearnedSides, MapsAround

__all__ = [
    "Leaf",
    "Learned",
    "LearnedCodes",
    "LearnedTerm",
    "LearnedVector",
    "LearnedWeight",
    "Soft",
    "Start",
    "Value",
    "learned_term",
    "soft_weight",
]

# The share of codes that plain rounding would choose too, from which on a start counts as rounded.
ROUNDED = 0.97


# A parameter in float32, or for a weight whose input is rounded the layer that computes its product.
Value = torch.Tensor | CompressedLayer


@dataclass(frozen=True)
class Soft:
    """A term of a weight that is learned: its values, with their gradient."""

    value: Float[torch.Tensor, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape[0], self.value.shape[1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        return self.value


def soft_weight(whole: CompressedWeight, parts: Sequence[Float[torch.Tensor, "out in"]]) -> CompressedWeight:
    """Return a weight with values, and their gradients, in the place of its terms. Nothing of it can be stored."""
    soft: Any = tuple(Soft(part) for part in parts)
    return replace(whole, terms=soft)


class Learned(Protocol):
    """A parameter of the model while it is learned. `progress` goes from 0 at the first step to 1 behind the last one."""

    def leaves(self) -> list[Leaf]: ...

    def value(self, progress: float) -> Value:
        """Return the parameter, with a gradient by the leaves."""
        ...

    def hard_value(self) -> Value:
        """Return the parameter as it would be stored and loaded again."""
        ...

    def start_value(self) -> Value:
        """Return the parameter that learning started from."""
        ...

    def penalty(self, progress: float) -> torch.Tensor | None:
        """Return what is added to the loss, if anything."""
        ...

    def harden(self) -> CompressedWeight | torch.Tensor:
        """Return the parameter as it is stored."""
        ...


class LearnedTerm(Protocol):
    """A term of a weight while it is learned."""

    def leaves(self) -> list[Leaf]: ...

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        """Return the term in float32, with a gradient by the leaves."""
        ...

    def penalty(self, progress: float) -> torch.Tensor | None:
        """Return what is added to the loss, if anything."""
        ...

    def harden(self) -> Term:
        """Return the term as it is stored."""
        ...


@dataclass(frozen=True)
class Start:
    """A term of codes that a closed form chose. `target` is what the codes stand for, in their own basis, in float32; `shared` are the values
    that scales share, which stay: so the start's own scales are stored as they were."""

    target: Float[torch.Tensor, "out in"]
    fmt: Format
    codes: Int[torch.Tensor, "codes_down codes_across"]
    params: Params
    shared: Params

    @classmethod
    def of(cls, term: Packed, target: Float[torch.Tensor, "out in"]) -> "Start":
        codes, params = term.unpack()
        return cls(target, term.format, codes, params, term.unpack_shared())

    def settled(self) -> Float[torch.Tensor, "out in"]:
        """Return values whose codes are those of the start: the target itself where plain rounding chose nearly all of them.

        Codes of error feedback belong together, and a target beside the edge of its code's cell would leave it at the first step: there,
        and wherever the target has another code, the decoded value is returned.
        """
        fmt, decoded = self.fmt, self.fmt.decode(self.codes, self.params)
        if isinstance(fmt.grid, Streamed):
            return decoded
        same = fmt.encode(self.target, self.params) == self.codes
        if int(same.sum()) < ROUNDED * same.numel():
            return decoded
        return torch.where(same.repeat_interleave(fmt.grid.span, 1), self.target, decoded)


class LearnedCodes:
    """One term of codes while it is learned. A parametrisation overrides what it learns: `values`, `params`, `weight` or `penalty`.

    base    values that encode to the codes of the start, in the basis of the codes
    """

    def __init__(self, start: Start) -> None:
        self.fmt, self.start = start.fmt, start
        self.base = start.settled()
        self.given = dict(start.params)

    def leaves(self) -> list[Leaf]:
        return []

    def values(self, params: Params) -> Float[torch.Tensor, "out in"]:
        """Return the values that are encoded; `params` are those of the codes, as stored."""
        return self.base

    def params(self) -> Params:
        """Return the parameters of the codes, `[block rows, block columns, *shape]`, before they are rounded as stored."""
        return self.given

    def penalty(self, progress: float) -> torch.Tensor | None:
        return None

    @cached_property
    def below_zero(self) -> dict[str, torch.Tensor | None]:
        """Return where scales begin below 0, None for those that nowhere do."""
        masks = {p.name: self.start.params[p.name] < 0 for p in self.fmt.grid.params if p.kind == "scale"}
        return {name: mask if bool(mask.any()) else None for name, mask in masks.items()}

    def stored_params(self) -> dict[str, torch.Tensor]:
        """Return the parameters as stored, with the gradient of `params`."""
        own = dict(self.params())
        for p in self.fmt.grid.params:
            if p.kind == "code":
                own[p.name] = round_through(own[p.name]).clamp(0, (1 << p.bits) - 1)
            elif p.kind == "scale":  # a scale keeps its sign: most stores have one only
                above, below = own[p.name].clamp(min=0), self.below_zero[p.name]
                own[p.name] = above if below is None else torch.where(below, own[p.name].clamp(max=0), above)
        kept = dict(self.fmt.stored({name: t.detach() for name, t in own.items()}, self.start.shared))
        for p in self.fmt.grid.params:
            if own[p.name].requires_grad:
                kept[p.name] = pass_through(own[p.name], kept[p.name])
        return kept

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        """Return the decoded values, with gradients by the leaves."""
        params = self.stored_params()
        values, grid = self.values(params), self.fmt.grid
        if isinstance(grid, EvenlySpaced) and not isinstance(grid, Streamed):
            across = self.fmt.per_block(params)
            scale, zero = across["scale"], grid.zero_of(across)
            steps = self.fmt.to_blocks(values) / torch.where(scale == 0, 1.0, scale)
            codes = (round_through(steps) + zero).clamp(0, grid.top)
            return self.fmt.from_blocks((codes - zero) * scale, values.shape[0])
        fixed = {name: t.detach() for name, t in params.items()}
        codes_now = self.fmt.encode(values.detach(), fixed)
        decoded = self.fmt.decode(codes_now, params)
        if values.requires_grad:
            decoded = decoded + pass_through(values, torch.zeros_like(values), inside_range(values.detach(), self.fmt, fixed))
        return decoded

    @torch.no_grad()
    def harden(self) -> Packed:
        """Return the codes as they are stored."""
        params = self.stored_params()
        return Packed.pack(self.fmt, self.fmt.encode(self.values(params), params), params)


def learned_term(weight: CompressedWeight) -> int | None:
    """Return the number of the term whose codes can be learned: the first packed one, of a weight that is not a stack with maps of parts."""
    packed = [at for at, term in enumerate(weight.terms) if isinstance(term, Packed) and term.parts == 1]
    return packed[0] if packed and weight.parts == 1 else None


class LearnedWeight:
    """A compressed weight some of whose terms are learned.

    codes        its term number `at`, the first one of codes, if that is learned
    beside       other terms that are learned, by their numbers
    sides        the diagonals around its maps that are learned
    transposed   whether the model's parameter is [in, out]
    input        how the input of its product is rounded, None where it is not
    """

    def __init__(
        self,
        weight: CompressedWeight,
        codes: LearnedTerm | None,
        at: int | None,
        *,
        beside: Mapping[int, LearnedTerm] | None = None,
        sides: LearnedSides | None = None,
        transposed: bool = False,
        input: InputFormat | None = None,
    ) -> None:
        self.input = input
        own = {} if codes is None or at is None else {at: codes}
        self.terms = dict(sorted({**own, **(beside or {})}.items()))
        self.whole, self.sides, self.transposed = weight, sides, transposed
        self.others = [None if k in self.terms else term.dequantize() for k, term in enumerate(weight.terms)]

    @staticmethod
    def start(weight: CompressedWeight, original: Float[torch.Tensor, "out in"]) -> tuple[Start, int]:
        """Return what is to be learned of a weight. Raises FormatError for one without codes that can be."""
        at = learned_term(weight)
        if at is None:
            raise FormatError("this weight has no term of codes that can be learned.")
        target = into_basis(original.float(), (weight.input_map, weight.output_map))
        for k, term in enumerate(weight.terms):
            if k != at:
                target = target - term.dequantize()
        term = weight.terms[at]
        assert isinstance(term, Packed)
        return Start.of(term, target), at

    @cached_property
    def maps(self) -> MapsAround:
        """The maps around the terms, made where a step first needs them: a layer with a rounded input applies its own."""
        return MapsAround(self.whole)

    def leaves(self) -> list[Leaf]:
        own = [leaf for term in self.terms.values() for leaf in term.leaves()]
        return own if self.sides is None else own + self.sides.leaves()

    def penalty(self, progress: float) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for term in self.terms.values():
            part = term.penalty(progress)
            total = part if total is None else total if part is None else total + part
        return total

    def value(self, progress: float) -> Value:
        parts = [self.terms[k].weight(progress) if other is None else other for k, other in enumerate(self.others)]
        if self.input is not None:
            soft = soft_weight(self.whole, parts)
            return CompressedLayer(soft if self.sides is None else self.sides.around(soft), self.input)
        total: torch.Tensor | None = None
        for part in parts:
            total = part if total is None else total + part
        assert total is not None
        mapped = self.maps.outputs(self.maps.inputs(total)) if self.sides is None else self.sides.apply(total, self.maps)
        return mapped.T if self.transposed else mapped

    def harden(self) -> CompressedWeight:
        terms = [self.terms[k].harden() if k in self.terms else term for k, term in enumerate(self.whole.terms)]
        weight = replace(self.whole, terms=tuple(terms))
        return weight if self.sides is None else self.sides.harden(weight)

    def hard_value(self) -> Value:
        return self._as_stored(self.harden())

    def start_value(self) -> Value:
        return self._as_stored(self.whole)

    def _as_stored(self, weight: CompressedWeight) -> Value:
        if self.input is not None:
            return CompressedLayer(weight, self.input)
        decoded = weight.dequantize()
        return decoded.T if self.transposed else decoded


class LearnedVector:
    """A norm's weight or a bias, rounded to the type in which it is stored."""

    def __init__(self, stored: torch.Tensor, rate: float) -> None:
        self.dtype, self.stored = stored.dtype, stored
        self.vector = stored.detach().float().clone().requires_grad_()
        self.rate = rate

    def leaves(self) -> list[Leaf]:
        return [Leaf(self.vector, self.rate)]

    def penalty(self, progress: float) -> torch.Tensor | None:
        return None

    def value(self, progress: float) -> torch.Tensor:
        return pass_through(self.vector, self.hard_value())

    def hard_value(self) -> torch.Tensor:
        return self.vector.detach().to(self.dtype).float()

    def start_value(self) -> torch.Tensor:
        return self.stored.float()

    def harden(self) -> torch.Tensor:
        return self.vector.detach().to(self.dtype)
