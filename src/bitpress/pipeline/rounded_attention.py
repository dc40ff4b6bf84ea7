"""The operands of a block's attentions that are rounded: their formats, the rotation of queries and keys before it, and the offsets of
probabilities after it.

An observer sees queries and keys as they will be rounded, behind their rotation. Offsets are known once the format of probabilities is: the
calibration text goes through the block once more for them.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from bitpress.calibration.observers import Seen
from bitpress.corrections.softmax_bias import ProbabilityErrors, SoftmaxBias
from bitpress.errors import BitpressError, FormatError
from bitpress.formats import ActivationFormat, AttentionOperands, Hadamard, ProbabilityOffset
from bitpress.models.attention import Watch, watching
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.recipes.method import Method
from bitpress.transforms.qk_hadamard import QKHadamard

__all__ = ["BlockAttention", "refused_operands", "rotation_operations"]

_TURNED = ("queries", "keys")


def refused_operands(model: StreamedModel, method: Method) -> dict[str, list[str]]:
    """Return the modules whose attention cannot round an operand as the method says, by the reason. Raises CheckpointError."""
    wrong: dict[str, list[str]] = {}
    rotation = method.only(QKHadamard)
    for operand, own in method.attention.items():
        for name, sizes in model.attentions.items():
            try:
                own.format.block_grid((1, sizes.rows.get(operand, own.format.grid.span)))
                if rotation is not None and operand in _TURNED:
                    rotation.plan(sizes.rows[operand])
            except FormatError as error:
                wrong.setdefault(f"{operand} {own.name}: {str(error).removesuffix('.')}.", []).append(name)
    return wrong


def rotation_operations(model: StreamedModel, method: Method) -> int:
    """Return the operations that rotations of queries and keys take a token, in all blocks."""
    rotation = method.only(QKHadamard)
    if rotation is None:
        return 0
    return sum(
        sizes.heads[operand] * rotation.operations(sizes.rows[operand])
        for sizes in model.attentions.values()
        for operand in _TURNED
    )


class BlockAttention:
    """The attentions of a loaded block. Show them the text through `watches` where these are not empty, then `choose`."""

    def __init__(self, stream: CalibrationStream, i: int, method: Method) -> None:
        self.stream, self.block, self.method = stream, i, method
        self.offset, rotation = method.only(SoftmaxBias), method.only(QKHadamard)
        prefix = f"{stream.model.block_name(i)}."
        sizes = stream.model.attentions if method.attention else {}
        self.modules = [name for name in sizes if name.startswith(prefix)]
        rows = {name: sizes[name].rows["queries"] for name in self.modules}
        self.rotations: dict[str, Hadamard] = (
            {} if rotation is None else {name: rotation.plan(row) for name, row in rows.items()}
        )
        observed = [operand for operand, own in method.attention.items() if own.observer is not None]
        self.seen = {(name, operand): Seen() for name in self.modules for operand in observed}

    def watches(self) -> dict[str, Watch]:
        """Return what is to be shown the operands of each module."""
        made: dict[str, dict[str, Callable[[torch.Tensor], None]]] = {}
        for (name, operand), seen in self.seen.items():
            turned = AttentionOperands(rotation=self.rotations.get(name)).turned if operand in _TURNED else None
            made.setdefault(name, {})[operand] = seen.add if turned is None else partial(_add_turned, seen, turned)
        return dict(made)

    def choose(self) -> dict[str, AttentionOperands]:
        """Return the operands by the names of modules. Raises CalibrationError, NumericsError."""
        formats = {name: self._formats(name) for name in self.modules}
        offsets = self._offsets({name: own["probabilities"] for name, own in formats.items() if "probabilities" in own})
        return {
            name: AttentionOperands(**own, rotation=self.rotations.get(name), offset=offsets.get(name))
            for name, own in formats.items()
        }

    def _formats(self, name: str) -> dict[str, ActivationFormat]:
        return {
            operand: own.made(self.seen.get((name, operand)), f"{name}: {operand}")
            for operand, own in self.method.attention.items()
        }

    def _offsets(self, probabilities: Mapping[str, ActivationFormat]) -> dict[str, ProbabilityOffset]:
        if self.offset is None:
            return {}
        errors = {name: ProbabilityErrors() for name in probabilities if self.offset.observes}
        if errors:

            def look(name: str, p: torch.Tensor) -> None:
                errors[name].add(p, probabilities[name].to(p.device).round(p))

            with watching(self.stream.model.model, {name: {"probabilities": partial(look, name)} for name in errors}):
                self.stream.look_(self.block)
        found = {}
        for name in probabilities:
            try:
                found[name] = self.offset.choose(errors.get(name))
            except BitpressError as error:
                raise type(error)(f"{name}: {error}") from error
        return found


def _add_turned(seen: Seen, turned: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    seen.add(turned(x))
