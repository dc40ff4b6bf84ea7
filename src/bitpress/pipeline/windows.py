"""Compress a model block by block, or where the method learns windows of blocks, window by window.

    a window      its blocks are loaded and compressed one after the other, each on what the one before gives, then learned together by their
                  outputs and those of the uncompressed blocks ahead. The first of them are handed on and committed as one; the text goes on
                  behind these, and the next window begins there (`tuning.span`)

The states of the text at a window's beginning are held beside those that move on, and where windows overlap, the original's states behind
the committed blocks too.
"""

from collections.abc import Callable, Sequence

import torch

from bitpress.memory import release
from bitpress.models.walk import LoadedBlock, Visitor, walk
from bitpress.pipeline.blocks import BlockCompressor, OpenBlock, packed_weights
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.tuning import SpanTuner
from bitpress.recipes import Method
from bitpress.tuning.span import Window, cut_windows

__all__ = ["capacities_of", "compress_blocks", "windows_of"]


def capacities_of(planned: Sequence[PlannedWeight], blocks: int) -> list[float]:
    """Return the bits that the codes of each block's weights hold, terms of corrections included."""
    sizes = [0.0] * blocks
    for p in planned:
        sizes[p.block] += 8.0 * p.nbytes
    return sizes


def windows_of(method: Method, planned: Sequence[PlannedWeight], blocks: int) -> list[Window]:
    """Return the windows that a method learns, which all its tunings of windows share; none where it has no such tuning."""
    tunings = method.tunings_of("windows")
    return cut_windows(tunings[0].part, blocks, capacities_of(planned, blocks)) if tunings else []


def compress_blocks(
    compressor: BlockCompressor,
    visitors: Sequence[Visitor],
    *,
    first: int = 0,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Compress the blocks from `first` on, which begins a window where there are any, and hand each to the visitors when it is final."""
    model = compressor.stream.model
    windows = windows_of(compressor.method, compressor.planned, len(model.blocks))
    if not windows:
        walk(model, [compressor, *visitors], first=first, check_stop=check_stop)
    for window in windows:
        if window.first >= first:
            try:
                _compress_window(compressor, window, visitors, check_stop)
            finally:
                compressor.joined, compressor.beside_same = False, None
                for i in window.through:
                    model.drop_block_(i)
            release()


def _compress_window(
    compressor: BlockCompressor, window: Window, visitors: Sequence[Visitor], check_stop: Callable[[], None]
) -> None:
    stream, model = compressor.stream, compressor.stream.model
    tunings = compressor.method.tunings_of("windows")
    inputs, beside = _copy(stream.hidden), None
    compressor.beside_same = inputs if any(named.part.targets == "same" for named in tunings) else None
    opened = list[OpenBlock]()
    for i in window.blocks:
        check_stop()
        loaded = LoadedBlock(i, model.block_name(i), i == len(model.blocks) - 1, model.load_block_(i))
        opened.append(compressor.open_(loaded))
        if i == window.first + window.final - 1 and window.final < window.learned:
            beside = _copy(stream.beside)
        if i < window.blocks[-1]:
            stream.advance_(i)
    targets = _targets(compressor, window)
    held = compressor.held(opened)
    if held.planned:
        tuner = SpanTuner(stream, window.through, held, inputs, targets, window.learned)
        compressor.take_(opened, tuner.tune(tunings, packed_weights(opened), compressor.heard))
    del targets, held
    for i in window.through[window.learned :]:
        model.drop_block_(i)
    stream.return_to_(inputs, beside)
    del inputs, beside
    for at, one in enumerate(opened[: window.final]):
        compressor.close_(one)
        if stream.goes_on(one.block):
            stream.advance_(one.block.index)
        compressor.made, compressor.joined = one.made, at < window.final - 1
        for visitor in visitors:
            visitor.visit_(one.block)


def _targets(compressor: BlockCompressor, window: Window) -> dict[str, dict[int, torch.Tensor]]:
    """Return what is wanted behind the last learned block and behind each block ahead, which are loaded here and stay as they are."""
    stream, last = compressor.stream, window.learned - 1
    found: dict[str, dict[int, torch.Tensor]] = {}
    if stream.beside is not None:
        found["original"] = {last: stream.beside}
    if compressor.beside_same is not None:
        found["same"] = {last: compressor.beside_same}
    for at in range(window.learned, len(window.through)):
        stream.model.load_block_(window.through[at])
        for behind in found.values():
            behind[at] = stream.run_all(window.through[at], behind[at - 1])
    return found


def _copy(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None else states.clone()
