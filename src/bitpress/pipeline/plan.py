"""The plan: a run's work layer by layer, its bytes, memory and time, before any work is done.

Late failures are found here: a shape that its format does not divide, too little disk space or memory. Bytes are exact (they follow
from shapes); memory and time (estimate.py) are estimates, and are called so.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bitpress.checkpoints.given import Given
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import BitpressError, DiskError, FormatError, MemoryLimitError, UsageError
from bitpress.formats import Format
from bitpress.limits import address_space_left
from bitpress.models.linears import list_kept_outside, list_weights, overlooked
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.gradients import gradient_bytes
from bitpress.pipeline.host_memory import BASE_BYTES, activation_bytes, block_memory, outer_memory
from bitpress.pipeline.learning_plan import Learning, plan_learning
from bitpress.pipeline.offer import Offer
from bitpress.pipeline.outer_weights import PlannedOuter, plan_outer
from bitpress.pipeline.patterns import check_patterns
from bitpress.pipeline.planned_weight import PlannedWeight, place_in_block
from bitpress.pipeline.rounded_attention import refused_operands, rotation_operations
from bitpress.pipeline.rounded_inputs import refused_inputs
from bitpress.quantizers.quantizer import check_served
from bitpress.recipes import Method

__all__ = [
    "Plan",
    "check_memory",
    "check_room",
    "make_plan",
    "overlooked_products",
    "unmeant_bits",
]

# Address space that libraries take beyond a job's memory: stacks of threads, arenas. Jobs of tiny models failed with 180 MiB left, not with 270.
SPACE_BYTES = 256 * 2**20
# Bytes that headers, index, manifest, report and card take for a compressed weight, for a block, and for the model.
_BESIDE_A_WEIGHT, _BESIDE_A_BLOCK, _BESIDE_ALL = 1950, 200, 9000


@dataclass(frozen=True)
class Plan:
    """Every weight with its format, the tensors that stay uncompressed, and totals.

    Bytes are exact but for entropy-coded weights, for single weights that a quantizer keeps apart as it finds them (`Quantizer.stored_bytes`), and for
    maps, which are small and not counted; `peak_memory` is an estimate, and so is what manifest, report and headers take.

    outer   the matrices outside the blocks that are compressed; the bits a weight are those of the blocks
    untied  parameters that shared a tensor with another one in the source and have their own in what is made
    given   the user's own file, if it was converted first
    learning  what the recipe's tuning takes
    rotation_operations  multiplications and additions a token that rotations of queries and keys take at run time, in all blocks; `rounds_attention`: operands of attention are rounded
    offer   the formats that a budget has not chosen yet: then the formats of the free weights are the recipe's, and the bytes are the budget's
    """

    weights: tuple[PlannedWeight, ...]
    kept: dict[str, str]
    kept_by_reason: dict[str, dict[str, int]]
    blocks: int
    compressed_bytes: int
    kept_bytes: int
    source_bytes: int
    disk: int
    peak_memory: int
    side_bytes: int = 0
    outer: tuple[PlannedOuter, ...] = ()
    given: Given | None = None
    offer: Offer | None = None
    untied: Mapping[str, str] = field(default_factory=dict)
    learning: Learning | None = None
    rotation_operations: int = 0
    rounds_attention: bool = False

    @property
    def rounds(self) -> bool:
        """Whether inputs of products or operands of attention are rounded when the model runs, which decoded weights would not do."""
        every = (*self.weights, *(found.planned for found in self.outer))
        return self.rounds_attention or any(w.method.every_input for w in every)

    @property
    def given_bytes(self) -> int:
        """Bytes of the user's model: of the file that was converted, or of the weights and the files beside them."""
        return self.source_bytes + self.side_bytes if self.given is None else self.given.nbytes

    @property
    def outer_bytes(self) -> int:
        """Bytes of the compressed matrices outside the blocks."""
        return sum(found.planned.nbytes for found in self.outer)

    @property
    def published_bytes(self) -> int:
        """Estimate: bytes of the whole directory that is published."""
        described = _BESIDE_A_WEIGHT * (len(self.weights) + len(self.outer)) + _BESIDE_A_BLOCK * (self.blocks + 1) + _BESIDE_ALL
        return self.compressed_bytes + self.outer_bytes + self.kept_bytes + self.side_bytes + described

    @property
    def bits_per_weight(self) -> float:
        return self.compressed_bytes * 8 / max(sum(w.weights for w in self.weights), 1)

    def by_block(self) -> list[list[WeightParameter]]:
        """Return the parameters to compress of every block."""
        return [[w.parameter for w in self.weights if w.block == i] for i in range(self.blocks)]

    def by_format(self) -> dict[str, int]:
        """Count the weights of the blocks by the names of their formats."""
        names = sorted(w.format.name for w in self.weights)
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def kinds(self) -> list[dict[str, Any]]:
        """Sum the weights that have the same place in a block, the same shape and the same format. It is None until it is chosen."""
        sums: dict[tuple[str, tuple[int, ...], str | None], list[PlannedWeight]] = {}
        for w in (*self.weights, *(found.planned for found in self.outer)):
            place, fmt = place_in_block(w.parameter.stem), None if self.is_open(w) else w.format.name
            sums.setdefault((place, w.parameter.parameter_shape, fmt), []).append(w)
        return [
            {
                "kind": place,
                "count": len(found),
                "shape": list(shape),
                "format": fmt,
                "bytes": None if fmt is None else sum(w.nbytes for w in found),
                "bits_per_weight": None if fmt is None else sum(w.nbytes for w in found) * 8 / sum(w.weights for w in found),
            }
            for (place, shape, fmt), found in sums.items()
        ]

    def is_open(self, planned: PlannedWeight) -> bool:
        """Whether the format of a weight is still to be chosen."""
        return self.offer is not None and planned.parameter.stem in self.offer.names

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for every weight of the blocks. Its format, bytes and bits are None until the format is chosen."""
        unknown = {"format": None, "bytes": None, "bits_per_weight": None}
        return [{**w.row(), **(unknown if self.is_open(w) else {})} for w in self.weights]

    def as_dict(self) -> dict[str, Any]:
        return {
            "weights": self.rows(),
            "outer": [{"key": found.key, **found.planned.row()} for found in self.outer],
            "kinds": self.kinds(),
            "kept": self.kept,
            "kept_by_reason": self.kept_by_reason,
            "blocks": self.blocks,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.compressed_bytes + self.outer_bytes + self.kept_bytes,
            "bytes_compressed_weights": self.compressed_bytes,
            "bytes_outer": self.outer_bytes,
            "bytes_kept": self.kept_bytes,
            "budget": None if self.offer is None else self.offer.summary(),
            "bytes_source": self.source_bytes,
            "bytes_given": self.given_bytes,
            "bytes_side_files": self.side_bytes,
            "bytes_published_estimate": self.published_bytes,
            "ratio": self.given_bytes / self.published_bytes,
            "given": None if self.given is None else self.given.as_dict(),
            "untied": dict(self.untied),
            "disk_bytes_needed": self.disk,
            "peak_memory_bytes_estimate": self.peak_memory,
            "rotation_operations": self.rotation_operations,
        }


def make_plan(model: StreamedModel, method: Method, stored: dict[str, int]) -> Plan:
    """Plan a run. `stored` gives the bytes of every parameter as the source stores it.

    Raises CheckpointError for a model that cannot be run block by block, and FormatError, which names every weight whose shape does not
    suit its format or a correction, or whose maps could not be stored.
    """
    recipe = method.recipe
    width = model.width  # raises if the model cannot be run block by block
    weights: list[PlannedWeight] = []
    kept = list_kept_outside(model, recipe.skip)
    for i in range(len(model.blocks)):
        found, others = list_weights(model, i, recipe.skip)
        weights += [PlannedWeight(p, method.for_layer(p.stem), i) for p in found]
        kept |= others
    narrow = {w.parameter.name: reason for w in weights if (reason := _too_narrow(w)) is not None}
    weights = [w for w in weights if w.parameter.name not in narrow]
    kept |= narrow
    if narrow and not weights:
        raise FormatError(f"every weight has {next(iter(narrow.values()))}; use smaller groups, or row.")
    if not weights:
        raise UsageError(f"nothing is left to compress: skip ({', '.join(recipe.skip)}) leaves every weight as it is.")
    experts = {name for w in weights for name in w.parameter.pattern_names[2:]}
    outer = plan_outer(model, method)
    check_patterns(recipe, {w.parameter.stem for w in weights}, kept, model.model.state_dict(), experts)
    every = [option for w in weights for option in (w, *w.under_settings)]
    _check_shapes(every)
    _check_parts(every, method)
    _check_sizes(weights)
    _refuse(refused_inputs(model, every), "Change the recipe's inputs, or keep those of these layers by an override.")
    _refuse(refused_operands(model, method), "Change the recipe's queries, keys, values or probabilities, or leave them out.")
    compressed = {w.parameter.name for w in (*weights, *(found.planned for found in outer))}
    ties = dict(model.model.all_tied_weights_keys)
    kept = {name: reason for name, reason in kept.items() if ties.get(name, name) not in compressed}
    kept_bytes = sum(size for name, size in stored.items() if name not in compressed)
    length = model.task.positions(model.model.config, recipe.calibration.length)
    hidden = activation_bytes(method, length * width * model.dtype.itemsize)
    compressed_bytes, outer_bytes = sum(w.nbytes for w in weights), sum(found.planned.nbytes for found in outer)
    gradients = gradient_bytes(method.needs, [w.parameter for w in weights])
    again = compressed_bytes if method.tunings_of("network") else 0  # blocks are written once more before the former files go
    held, of_block, peak = block_memory(model, method, weights, stored, hidden)
    peak = max(peak, outer_memory(model, outer, stored, hidden))
    learning = plan_learning(model, method, weights, held, of_block, peak)
    return Plan(
        weights=tuple(weights),
        kept=kept,
        kept_by_reason=_sum_kept({n: size for n, size in stored.items() if n not in compressed}, kept, f"{model.stack}."),
        blocks=len(model.blocks),
        compressed_bytes=compressed_bytes,
        kept_bytes=kept_bytes,
        source_bytes=sum(stored.values()),
        # Side files and headers are small. The activations count twice, since the new ones are written before the old ones are removed.
        disk=compressed_bytes + outer_bytes + kept_bytes + 2 * hidden + gradients + again + 32 * 2**20,
        peak_memory=peak if learning is None else max(peak, learning.peak),
        outer=outer,
        learning=learning,
        rotation_operations=rotation_operations(model, method),
        rounds_attention=bool(method.attention),
    )


def _sum_kept(stored: Mapping[str, int], kept: Mapping[str, str], stack: str) -> dict[str, dict[str, int]]:
    """Sum the uncompressed tensors by reason, the largest first."""
    sums: dict[str, dict[str, int]] = {}
    for name, nbytes in stored.items():
        usual = (
            "norms, biases and other vectors" if name.startswith(stack) else "outside the blocks (embeddings, head, last norm)"
        )
        entry = sums.setdefault(kept.get(name, usual), {"parameters": 0, "bytes": 0})
        entry["parameters"] += 1
        entry["bytes"] += nbytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))


def check_room(plan: Plan, out: Path, done_bytes: int = 0) -> None:
    """Raise DiskError or MemoryLimitError if the plan cannot be carried out here."""
    at = out
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    needed = plan.disk - done_bytes
    if free < needed:
        raise DiskError(f"{out}: {needed:,} bytes are needed and {free:,} are free; make room or choose another disk.")
    check_memory(plan)


def check_memory(plan: Plan) -> None:
    """Raise MemoryLimitError if the plan needs more memory than is free, or more address space than a limit leaves.

    Some libraries end the process when an allocation fails, so a limit (ulimit -v) is checked before they can meet it.
    """
    left, needed = address_space_left(), plan.peak_memory - BASE_BYTES
    if left is not None and left < needed + SPACE_BYTES:
        raise MemoryLimitError(
            f"out of memory: the limit on this process's address space (ulimit -v) is {needed + SPACE_BYTES - left:,} bytes too low; raise it, or "
            "use fewer or shorter samples, or a method without statistics such as rtn."
        )
    memory = psutil.virtual_memory().available
    if memory < needed:
        batch = None if plan.learning is None else plan.learning.advice(memory + BASE_BYTES)
        raise MemoryLimitError(
            f"about {plan.peak_memory:,} bytes of memory are needed and {memory:,} are free; "
            + (batch or "use fewer or shorter samples, or a method without statistics such as rtn.")
        )


def _too_narrow(planned: PlannedWeight) -> str | None:
    """Say why a weight is too small for its format, or None. It stays as it is: its bytes do not count."""
    if not isinstance(planned.format, Format):
        return None
    inputs, group, span = planned.parameter.shape[1], planned.format.block.cols, planned.format.grid.span
    if group != "all" and inputs < group:
        return f"fewer inputs ({inputs}) than the group ({group})"
    return f"fewer inputs ({inputs}) than one code holds ({span})" if inputs < span else None


def _check_shapes(weights: Sequence[PlannedWeight]) -> None:
    wrong: dict[str, list[str]] = {}
    for planned in weights:
        try:
            planned.format.block_grid(planned.parameter.shape)
        except BitpressError as error:
            wrong.setdefault(f"{planned.format.name}: {error}", []).append(planned.parameter.stem)
    _refuse(wrong, "Choose another block, override these layers or skip them.")


def _check_sizes(weights: Sequence[PlannedWeight]) -> None:
    """Raise FormatError where settings that a layer chooses among differ in size: what is stored is known before the run."""
    wrong: dict[str, list[str]] = {}
    for planned in weights:
        for other in planned.under_settings:
            if other.nbytes != planned.nbytes:
                told = f"choose: {other.format.name} takes {other.nbytes:,} bytes where {planned.format.name} takes {planned.nbytes:,}."
                wrong.setdefault(told, []).append(planned.parameter.stem)
    _refuse(wrong, "List formats of one size, or choose among sizes by a budget.")


def unmeant_bits(plan: Plan) -> list[str]:
    """Say which formats of a plan have more or fewer bits per weight than the quantizer that the user named is meant for."""
    found: dict[str, None] = {}
    for planned in plan.weights:
        if isinstance(planned.format, Format) and not planned.method.quantizer.usual:
            name, (least, most) = planned.method.quantizer.name, planned.method.quantizer.part.bits
            value = planned.format.code_bits_per_weight
            if not math.floor(least) <= value <= math.ceil(most):
                meant = f"{least:g}" if least == most else f"{least:g} to {most:g}"
                found[f"{name} is meant for codes of {meant} bits a weight, and {planned.format.name} has {value:g}"] = None
    return list(found)


def overlooked_products(plan: Plan) -> list[str]:
    """Say which matrix products of a plan stay uncompressed although the recipe does not skip them."""
    return [f"{_shorten(names)}: {reason}, left uncompressed" for reason, names in overlooked(plan.kept).items()]


def _check_parts(weights: Sequence[PlannedWeight], method: Method) -> None:
    wrong: dict[str, list[str]] = {}
    for planned in weights:
        parameter = planned.parameter
        name, quantizer = planned.method.quantizer.name, planned.method.quantizer.part
        if isinstance(planned.format, Format):
            try:
                check_served(name, quantizer.serves, planned.format)
            except FormatError as error:
                wrong.setdefault(str(error), []).append(parameter.stem)
            else:
                try:
                    quantizer.stored_bytes(planned.format, parameter.shape)
                except BitpressError as error:
                    wrong.setdefault(f"{name}: {error}", []).append(parameter.stem)
        for named in method.corrections:
            try:
                named.part.nbytes(parameter.shape)
            except BitpressError as error:
                wrong.setdefault(f"{named.name}: {error}", []).append(parameter.stem)
    _refuse(wrong, "Use other settings, leave it out or skip these layers.")


def _refuse(wrong: Mapping[str, Sequence[str]], advice: str) -> None:
    if wrong:
        parts = [f"{reason} Layers: {_shorten(names)}." for reason, names in wrong.items()]
        raise FormatError(" ".join([*parts[:2], *[f"{len(parts) - 2} more such reasons."] * (len(parts) > 2), advice]))


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
