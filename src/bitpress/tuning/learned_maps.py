"""A change of basis of a layer's input while it is learned, with the weights that read that input.

    y = T_out Q(w T_in^-1) Q_x(T_in x)        T_in = K T_0 diag(1/s)

s    factors of the channels, divided out in front of everything else: so that a norm or the matrix before can take them (`Folded`)
T_0  the map that the recipe's transforms stored, which stays
K    a matrix: what a paper is mostly about (`LearnedMatrix`)
Q_x  the rounding of the input; its shift z, Q_x(u) = z + Q(u - z), and its clip, factors of a token's range, may be learned too

Weights that share an input share all of these. At every step each weight is rounded to nearest in the basis of that step, its range
multiplied by factors that may be learned; what is stored may be the codes that the recipe's quantizer chooses in that basis. A paper is a
`MapTuning`: which of these are learned, and K.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float

from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import (
    MAPS,
    ChannelFormat,
    CompressedLayer,
    CompressedWeight,
    Format,
    InputFormat,
    Map,
    Packed,
    Scale,
    chain,
    fake_quantize,
)
from bitpress.formats.fake_quantize import clip_blocks
from bitpress.transforms.basis import Maps, into_basis
from bitpress.tuning.folded import Folded
from bitpress.tuning.learned import Leaf, LearnedTerm, Start, Value, soft_weight
from bitpress.tuning.sides import joined_maps
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["SERVED", "Clip", "LearnedMatrix", "MapTuning", "MappedCodes", "MappedWeight", "Recode", "Recoded", "SharedInput"]

# Formats whose codes are found by rounding to nearest behind a fit of the range: it is done anew for every weight at every step.
SERVED = ("int*", "e?m?*", "mxfp*", "nf*")
# Where the sigmoids of clipping start: nearly open, as OmniQuant's.
OPEN = 4.0
# Advice where a learned map cannot be stored.
LOWER = "A lower rate moves it less."

# Puts the blocks of a weight, in the basis of its codes, into the ranges that were learned.
Clip = Callable[[Float[torch.Tensor, "out in"]], Float[torch.Tensor, "out in"]]
# A compressed weight, and what its quantizer fell back to.
Recoded = tuple[CompressedWeight, tuple[str, ...]]
# Compresses what a weight stands for between maps of its input and output; then factors of its columns that its input lost, and its ranges.
Recode = Callable[[Float[torch.Tensor, "out in"], Maps, Float[torch.Tensor, " in"] | None, Clip | None], Recoded]


class LearnedMatrix(Protocol):
    """The matrix K of an input while it is learned, the identity at first."""

    def leaves(self) -> list[Leaf]: ...

    def map(self, progress: float) -> Map:
        """Return K as a map whose tensors have gradients by the leaves. Its values are those that are stored."""
        ...


@dataclass(frozen=True, kw_only=True)
class MapTuning(Tuning):
    """`rate` is that of the matrix. Others are multiples of it, 0 for what is not learned: `scales` of the logarithms of channel factors,
    `shifts` of inputs that are rounded (in units of 1), `clip_weights` and `clip_inputs` of sigmoids, which are the factors of ranges.

    codes   quantizer: the recipe's quantizer chooses the stored codes, in the basis that was learned, where it does more than round;
            nearest: they are rounded as they were learned
    """

    rate: float | None = 5e-3
    schedule: ScheduleName = "cosine"
    scales: float = 0.0
    shifts: float = 0.0
    clip_weights: float = 0.0
    clip_inputs: float = 0.0
    codes: Literal["quantizer", "nearest"] = "quantizer"

    serves: ClassVar[tuple[str, ...]] = SERVED
    adds_maps: ClassVar[bool] = True
    moves_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span == "layer":
            raise UsageError("a map changes what several layers read, so it is learned by a block's output; use span=block.")
        for name in ("scales", "shifts", "clip_weights", "clip_inputs"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name):g}: it is a multiple of the learning rate, 0 or more.")

    @abstractmethod
    def matrix(self, width: int, device: torch.device) -> LearnedMatrix | None:
        """Return how the matrix of an input of so many channels is learned, None where it has none."""

    def begin(self, start: Start) -> LearnedTerm | None:
        return None  # codes are learned with the inputs that they share: `MappedWeight`

    def begin_alone(self, start: Start) -> "MappedCodes":
        """Return the codes of a weight whose input no other weight reads."""
        shared = SharedInput(self, start.target.shape[1], None, start.target.device)
        return MappedCodes(start.target, start.fmt, shared, clip=self.clip_weights, alone=True)


class SharedInput:
    """The input that some weights share, while its map is learned.

    base      the map that is stored of it, T_0
    folded    where the channel factors go; None: into the map
    rounded   the ways in which weights round it: what of these can be learned is
    """

    def __init__(
        self,
        tuning: MapTuning,
        width: int,
        base: Map | None,
        device: torch.device,
        *,
        folded: Folded | None = None,
        rounded: Sequence[InputFormat] = (),
    ) -> None:
        self.base, self.folded, self.matrix = base, folded, tuning.matrix(width, device)
        self.rates = {"scales": tuning.scales, "shift": tuning.shifts, "clip": tuning.clip_inputs}
        given = next((r.shift for r in rounded if isinstance(r, ChannelFormat) and r.shift is not None), None)
        open_ = {}
        if tuning.scales:
            open_["scales"] = torch.zeros(width if folded is None else folded.channels, device=device)
        if tuning.shifts and rounded:
            open_["shift"] = torch.zeros(width, device=device) if given is None else given.detach().clone()
        if tuning.clip_inputs and any(_is_clipped(r) for r in rounded):
            open_["clip"] = torch.full((2,), OPEN, device=device)
        self.own = {name: tensor.requires_grad_() for name, tensor in open_.items()}

    def leaves(self) -> list[Leaf]:
        own = [Leaf(tensor, self.rates[name]) for name, tensor in self.own.items()]
        return own if self.matrix is None else [*self.matrix.leaves(), *own]

    def factors(self) -> Float[torch.Tensor, " channels"] | None:
        """Return s, by the producer's channels where it is folded."""
        return self.own["scales"].exp() if "scales" in self.own else None

    def input_map(self, progress: float) -> Map | None:
        """Return T_in but for folded factors, with gradients by the leaves."""
        s = self.factors()
        online = None if s is None or self.folded is not None else Scale(1 / s)
        return chain(*joined_maps(online, self.base), None if self.matrix is None else self.matrix.map(progress))

    def hard_map(self) -> Map | None:
        """Return the map as it is stored. Raises NumericsError for one that a file must not hold."""
        with torch.no_grad():
            change = self.input_map(1.0)
        if change is None:
            return None
        stored = MAPS[change.kind].build(change.spec(), _stored(change.tensors()))
        try:
            stored.check()
        except FormatError as error:
            raise NumericsError(f"{error} {LOWER}") from error
        return stored

    def columns(self) -> Float[torch.Tensor, " in"] | None:
        """Return the factors of the weights' columns that the producer takes back, None where it does not."""
        s = self.factors()
        return None if s is None or self.folded is None else self.folded.columns(s)

    def into(self, w: Float[torch.Tensor, "out in"], progress: float) -> Float[torch.Tensor, "out in"]:
        """Return a weight, its folded factors with it, in the basis of the codes."""
        change = self.input_map(progress)
        try:
            return w if change is None else change.dual().apply(w)
        except FormatError as error:
            raise NumericsError(f"{error} {LOWER}") from error

    def rounding(self, given: InputFormat) -> InputFormat:
        """Return how an input that was rounded as `given` is rounded, with gradients by the leaves."""
        whole = given if isinstance(given, ChannelFormat) else ChannelFormat(given)
        if "shift" in self.own:
            whole = replace(whole, shift=self.own["shift"])
        if "clip" in self.own and _is_clipped(given):
            whole = replace(whole, clip=self.own["clip"].sigmoid())
        return given if whole.shift is None and whole.clip is None else whole

    def hard_rounding(self, given: InputFormat) -> InputFormat:
        with torch.no_grad():
            found = self.rounding(given)
        if not isinstance(found, ChannelFormat) or found is given:
            return found
        kept = _stored({name: t for name, t in (("shift", found.shift), ("clip", found.clip)) if t is not None})
        return replace(found, **kept)  # type: ignore[arg-type]


class MappedCodes:
    """Codes of a weight in the basis of an input that is learned: rounded to nearest, with ranges multiplied by factors.

    target   what the weight stands for, [out, in], before any map of its input
    rows     where its own rows are folded channels of other inputs
    alone    whether the input's leaves are counted here
    recode   chooses the codes that are stored; None: rounding to nearest does
    """

    def __init__(
        self,
        target: Float[torch.Tensor, "out in"],
        fmt: Format,
        shared: SharedInput,
        *,
        clip: float | None = None,
        rows: "tuple[SharedInput, ...]" = (),
        output_map: Map | None = None,
        alone: bool = False,
        recode: Recode | None = None,
    ) -> None:
        self.target, self.fmt, self.shared, self.rows = target.float(), fmt, shared, rows
        self.output_map, self.alone, self.recode, self.rate = output_map, alone, recode, clip or 0.0
        down, across = fmt.block_grid((target.shape[0], target.shape[1]))
        self.ends = [
            torch.full((down * across,), OPEN, device=target.device, requires_grad=True) for _ in range(2 if clip else 0)
        ]

    def leaves(self) -> list[Leaf]:
        return [*(self.shared.leaves() if self.alone else []), *(Leaf(end, self.rate) for end in self.ends)]

    def penalty(self, progress: float) -> None:
        return None

    def fold(self, w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        """Return a matrix of the weight's shape with the factors that the weight gives and takes."""
        for other in self.rows:
            s = other.factors()
            if s is not None and other.folded is not None:
                w = other.folded.divide_rows(w, s)
        columns = self.shared.columns()
        return w if columns is None else w * columns

    def values(self, progress: float) -> Float[torch.Tensor, "out in"]:
        """Return what is rounded."""
        w = self.shared.into(into_basis(self.fold(self.target), (None, self.output_map)), progress)
        return self._clipped(w) if self.ends else w

    def _clipped(self, w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, "out in"]:
        high, low = (end.sigmoid() for end in self.ends)
        return clip_blocks(w, self.fmt, high, low)

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        return fake_quantize(self.values(progress), self.fmt, ranges=True)

    @torch.no_grad()
    def harden(self) -> Packed:
        values = self.values(1.0)
        params = self.fmt.fit(values)
        return Packed.pack(self.fmt, self.fmt.encode(values, params), params)

    @torch.no_grad()
    def compressed(self) -> Recoded:
        """Return the whole weight as it is stored."""
        maps = (self.shared.hard_map(), self.output_map)
        if self.recode is not None:
            return self.recode(self.fold(self.target), maps, self.shared.columns(), self._clipped if self.ends else None)
        return CompressedWeight((self.harden(),), *maps), ()


class MappedWeight:
    """A compressed weight whose input's map is learned. `leads`: it lists the leaves of that input, which others share.

    whole        the weight as it is stored at the start: one term of codes between its maps
    told         what is to be said of its codes where what is learned is kept
    fallbacks    what the quantizer fell back to when it chose the stored codes last
    transposed   whether the model's parameter is [in, out]
    """

    def __init__(
        self,
        whole: CompressedWeight,
        codes: MappedCodes,
        input: InputFormat | None,
        *,
        leads: bool,
        transposed: bool = False,
        told: str | None = None,
    ) -> None:
        self.whole, self.codes, self.shared, self.input = whole, codes, codes.shared, input
        self.leads, self.transposed, self.told = leads, transposed, told
        self.fallbacks: tuple[str, ...] = ()

    def leaves(self) -> list[Leaf]:
        return [*(self.shared.leaves() if self.leads else []), *self.codes.leaves()]

    def penalty(self, progress: float) -> None:
        return None

    def value(self, progress: float) -> Value:
        weight = replace(soft_weight(self.whole, [self.codes.weight(progress)]), input_map=self.shared.input_map(progress))
        return self._value(weight, None if self.input is None else self.shared.rounding(self.input))

    def harden(self) -> CompressedWeight:
        weight, self.fallbacks = self.codes.compressed()
        return weight

    def harden_input(self) -> InputFormat | None:
        return None if self.input is None else self.shared.hard_rounding(self.input)

    def hard_value(self) -> Value:
        return self._value(self.harden(), self.harden_input())

    def start_value(self) -> Value:
        return self._value(self.whole, self.input)

    def _value(self, weight: CompressedWeight, input: InputFormat | None) -> Value:
        if input is not None:
            return CompressedLayer(weight, input)
        decoded = weight.dequantize()
        return decoded.T if self.transposed else decoded


def _is_clipped(rounded: InputFormat) -> bool:
    """Whether the ends of a format's ranges are fitted to each token."""
    return (rounded.rest if isinstance(rounded, ChannelFormat) else rounded).parameters != "static"


def _stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
