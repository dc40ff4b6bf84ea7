"""Blocks compressed one after the other, for tests that look at what comes of them."""

from collections.abc import Sequence
from typing import Any

import torch

from bitpress.models.streaming import StreamedModel
from bitpress.models.walk import LoadedBlock, Visitor, walk
from bitpress.pipeline.blocks import BlockCompressor
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.plan import make_plan
from bitpress.pipeline.weights import CompressedBlock
from bitpress.recipes import Method


class Collected:
    """A visitor that keeps what every block became."""

    def __init__(self, compressor: BlockCompressor) -> None:
        self.compressor = compressor
        self.blocks: list[CompressedBlock] = []

    def visit_(self, block: LoadedBlock) -> None:
        self.blocks.append(self.compressor.made)


def make_compressor(model: StreamedModel, method: Method, tokens: torch.Tensor | None, **options: Any) -> BlockCompressor:
    """Make a compressor of a model whose outer parts are loaded, with its calibration text started."""
    follows = method.recipe.calibration.inputs == "original"
    stream = CalibrationStream(model, method.needs, batch=method.recipe.batch, follows_original=follows)
    stream.start_(tokens, None)
    return BlockCompressor(stream, method, make_plan(model, method, {}).weights, **options)


def compress_blocks(
    model: StreamedModel, method: Method, tokens: torch.Tensor | None, beside: Sequence[Visitor] = (), **options: Any
) -> list[CompressedBlock]:
    """Compress all blocks; visitors `beside` see each after it."""
    compressor = make_compressor(model, method, tokens, looked_at=bool(beside), **options)
    collected = Collected(compressor)
    walk(model, [compressor, collected, *beside])
    return collected.blocks
