"""What is learned of a weight, told from made-up weights of its width: how many parameters, and how many bytes are held for them.

A made-up weight has the terms and the maps that the recipe gives one of this shape. Two heights tell what belongs to each row, and what to the
whole weight.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch

from bitpress.calibration import Stats
from bitpress.errors import BitpressError
from bitpress.formats import CompressedWeight, Format, Packed, Term
from bitpress.formats.grids.grid import StoredParam
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.quantizers.quantizer import is_served
from bitpress.recipes import LayerMethod, Named
from bitpress.transforms.basis import Maps, with_maps
from bitpress.tuning.learned import LearnedTerm, LearnedWeight, Start
from bitpress.tuning.learned_maps import MapTuning
from bitpress.tuning.tuner import Tuning, begin_weight

__all__ = ["Share", "begin_sample", "learned_share", "served_by"]

# Rows of the samples, for weights that have more; and more for a low-rank term that has no more than its rank.
ROWS = 64


@dataclass(frozen=True)
class Share:
    """What learning takes for a weight: learned parameters, bytes that are held as long as it lasts (the parameters too), and the values of the
    weight that is decoded in every step, 0 where nothing of it is learned."""

    learned: int
    held: int
    values: int


def served_by(named: Named[Tuning], weights: Sequence[PlannedWeight]) -> list[tuple[PlannedWeight, Format]]:
    """Return the weights whose codes a tuning learns, with their formats."""
    pairs = [(w, w.format) for w in weights]
    return [(w, fmt) for w, fmt in pairs if isinstance(fmt, Format) and is_served(named.part.serves, fmt)]


def learned_share(named: Named[Tuning], planned: PlannedWeight) -> Share:
    """Return what learning takes for a planned weight, all of its experts together."""
    fmt, experts = planned.format, max(planned.parameter.experts, 1)
    if not isinstance(fmt, Format) or not is_served(named.part.serves, fmt):
        return Share(0, 0, 0)
    one = _share(named.part, replace(planned.method, targets=(), inputs=None), planned.parameter.shape)
    return Share(one.learned * experts, one.held * experts, one.values * experts)


def begin_sample(tuning: Tuning, fmt: Format, rows: int, cols: int) -> LearnedTerm | None:
    """Return what is learned of the codes of a made-up weight; with its input's map, which others may share with it."""
    start = Start.of(_codes(fmt, rows, cols), _made_up(rows, cols))
    return tuning.begin_alone(start) if isinstance(tuning, MapTuning) else tuning.begin(start)


@functools.cache
def _share(tuning: Tuning, method: LayerMethod, shape: tuple[int, int]) -> Share:
    rows, cols = shape
    fmt = method.format
    assert isinstance(fmt, Format)
    unit = max(ROWS, *(getattr(part, "rank", 0) for part in method.corrections), 0) if method.corrections else ROWS
    if rows <= 4 * unit or fmt.block.rows == "all":
        return _of(tuning, method, rows, cols)
    few, more = (_of(tuning, method, height * unit, cols) for height in (2, 4))
    beyond = rows - 2 * unit

    def grown(a: int, b: int) -> int:
        return a + (b - a) * beyond // (2 * unit)

    return Share(grown(few.learned, more.learned), grown(few.held, more.held), grown(few.values, more.values))


def _of(tuning: Tuning, method: LayerMethod, rows: int, cols: int) -> Share:
    learned: LearnedTerm | LearnedWeight | None
    if isinstance(tuning, MapTuning):
        assert isinstance(method.format, Format)
        learned = begin_sample(tuning, method.format, rows, cols)
    else:
        w = _made_up(rows, cols)
        learned = begin_weight(tuning, _compressed(method, w), w)
    if learned is None:
        return Share(0, 0, 0)
    return Share(sum(leaf.tensor.numel() for leaf in learned.leaves()), held_bytes([learned]), rows * cols)


def _made_up(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02


def _codes(fmt: Format, rows: int, cols: int) -> Packed:
    """Return a term of codes that are all 0."""
    down, across = fmt.block_grid((rows, cols))

    def values(p: StoredParam) -> torch.Tensor:
        shape = (down, across, *p.shape) if p.scope == "block" else p.shape
        return torch.zeros(shape) if p.kind == "code" else torch.full(shape, 0.01)

    dtype = torch.uint8 if fmt.grid.code_bits <= 8 else torch.int32
    codes = torch.zeros(rows // fmt.rows_per_code, cols // fmt.grid.span, dtype=dtype)
    params = {p.name: values(p) for p in fmt.grid.params}
    return Packed.pack(fmt, codes, {**params, **fmt.stored(params)})


def _compressed(method: LayerMethod, w: torch.Tensor) -> CompressedWeight:
    """Return a weight with the terms and the maps that a recipe gives it, as far as they can be made without statistics."""
    fmt = method.format
    assert isinstance(fmt, Format)
    around = list[Maps]()
    for change in method.changes:
        try:
            around.append(change.plan(w, None, fmt))
        except BitpressError:  # its maps are of the calibration's making; whether they hold learned diagonals cannot be said
            continue
    before, after = list[Term](), list[Term]()
    weight = _quantized(method, w)
    for part in method.corrections:
        try:
            split = part.split(w, None, fmt)
            repair = part.repair(w, weight, None) if split is None else None
        except BitpressError:
            continue
        before += [] if split is None else [split]
        after += [] if repair is None else [repair]
    weight = replace(weight, terms=(*before, *weight.terms, *after))
    for maps in reversed(around):
        weight = with_maps(weight, maps)
    return weight


def _quantized(method: LayerMethod, w: torch.Tensor) -> CompressedWeight:
    """Return the codes of a made-up weight, by the quantizer itself where it makes more than one term of the format, or maps."""
    fmt, quantizer = method.format, method.quantizer.part
    assert isinstance(fmt, Format)
    shape = (w.shape[0], w.shape[1])
    try:
        if quantizer.keeps_map or not quantizer.keeps_format or quantizer.stored_bytes(fmt, shape) != fmt.nbytes(shape):
            alike = Stats(1, torch.eye(shape[1]), torch.ones(shape[1]))
            return quantizer.quantize(w, alike if quantizer.needs else None, fmt).weight
    except BitpressError:  # it needs statistics that are not made up here: its first term is what can be told
        pass
    return CompressedWeight((_codes(fmt, *shape),))


def held_bytes(parts: Iterable[object]) -> int:
    """Return the bytes of all tensors that objects refer to, each memory once."""
    seen, sizes = set[int](), dict[int, int]()
    left = list(parts)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (str, bytes, int, float, type(None))):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            memory = one.untyped_storage()
            sizes[memory.data_ptr()] = memory.nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
        elif is_dataclass(one) and not isinstance(one, type):
            left += [getattr(one, f.name) for f in fields(one)]
        elif hasattr(one, "__dict__") and not isinstance(one, type):
            left += vars(one).values()
    return sum(sizes.values())
