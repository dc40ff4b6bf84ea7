"""Compressing one weight: apply the method's parts to each of its matrices, measure the error, and return what is stored."""

import contextlib
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float

from bitpress.calibration import Stats
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.checkpoints.records import WeightRecord
from bitpress.errors import CalibrationError, FormatError, NumericsError
from bitpress.exchange.bitpress_directory import BitpressDirectory
from bitpress.finite import all_finite
from bitpress.formats import (
    AnyFormat,
    AttentionOperands,
    CompressedLayer,
    CompressedWeight,
    InputFormat,
    Lossless,
    Scale,
    chain,
)
from bitpress.formats.digest import digest
from bitpress.formats.reach import changed_rows, lost_rows, widened
from bitpress.pipeline.channel_scaling import Rescaled
from bitpress.pipeline.compose import compress_placed, needed_of
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.records import BlockRecord, LayerRow, TunedSpan
from bitpress.pipeline.token_errors import ClassEnergies, measure_classes, note_ordinary, token_errors
from bitpress.pipeline.weight_picture import MatrixPicture, draw_weight, look_at, with_utilization
from bitpress.quantizers.quantizer import Outcome, is_served, output_errors
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import LayerMethod, Method, Named
from bitpress.tuning.stack import parts_of

__all__ = ["CompressedBlock", "CompressedParameter", "WeightCompressor"]

# Said under calibration.gram=loss of a weight whose tokens it cannot weigh: of experts, and of inputs with other positions than the sample.
ALIKE = "its tokens count alike: the loss does not tell how much each of them matters here"
# Said of an input whose stored parameters nothing decided.
ZERO_INPUT = "its input was 0 on all calibration text, so nothing chose the range that it is rounded in"
# Statistics that no expert has; every quantizer that needs them has a way without.
UNKNOWN_OF_EXPERTS = frozenset({"cross", "attention_gram"})


@dataclass(frozen=True)
class CompressedParameter:
    """A compressed parameter, all of its experts stacked, with the hash of its decoded values and its entry in the report."""

    parameter: WeightParameter
    weight: CompressedWeight
    digest: str
    record: WeightRecord
    row: LayerRow
    input: InputFormat | None = None

    @property
    def layer(self) -> CompressedLayer:
        return CompressedLayer(self.weight, self.input)

    def with_note(self, note: str) -> "CompressedParameter":
        """Return the parameter with one more note in its row of the report."""
        return replace(self, row=self.row.model_copy(update={"notes": [*self.row.notes, note]}))

    def with_fallback(self, text: str) -> "CompressedParameter":
        """Return the parameter with one more fallback in its row of the report."""
        return replace(self, row=self.row.model_copy(update={"fallbacks": [*self.row.fallbacks, text], "calibrated": False}))

    def with_choice(self, told: str | None) -> "CompressedParameter":
        """Return the parameter with what its layer chose, and by what, in its row of the report."""
        return self if told is None else replace(self, row=self.row.model_copy(update={"choice": told}))

    def with_input(self, input: InputFormat, *, always_zero: bool = False) -> "CompressedParameter":
        """Return the parameter with a format for the input of its product, which may have been 0 on all calibration text."""
        record = self.record.model_copy(update={"input": input.spec()})
        row = self.row.model_copy(update={"inputs": input.name, "notes": [*self.row.notes, *[ZERO_INPUT] * always_zero]})
        return replace(self, input=input, record=record, row=row)


@dataclass
class CompressedBlock:
    """A block in work: its compressed parameters, which may be replaced until the block is committed, and tensors stored as they are;
    `notes` are rows of those of these that were to be compressed; `attention` says how modules round the operands of theirs, `tuned` are rows
    of what was learned by gradients."""

    parameters: dict[str, CompressedParameter] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[LayerRow] = field(default_factory=list)
    attention: dict[str, AttentionOperands] = field(default_factory=dict)
    tuned: list[TunedSpan] = field(default_factory=list)

    def put_(self, compressed: CompressedParameter) -> None:
        """Record a parameter, in place of an earlier result for it."""
        self.parameters[compressed.parameter.name] = compressed

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is stored, by the names in the file, on the host."""
        stored = {
            f"{made.parameter.stem}.{leaf}": tensor
            for made in self.parameters.values()
            for leaf, tensor in BitpressDirectory.write(made.layer).tensors.items()
        }
        own = {f"{name}.{leaf}": t for name, operands in self.attention.items() for leaf, t in operands.tensors().items()}
        return {name: tensor.cpu() for name, tensor in (stored | own | self.kept).items()}

    def record(self) -> BlockRecord:
        made = self.parameters
        return BlockRecord(
            weights={name: p.record for name, p in made.items()},
            digests={name: p.digest for name, p in made.items()},
            rows=[*(p.row for p in made.values()), *self.notes],
            attention={name: operands.spec() for name, operands in self.attention.items()},
            tuned=self.tuned,
        )


@dataclass(frozen=True)
class _Matrix:
    """The result of one matrix.

    decoded     its decoded values, if they are known already
    errors      relative squared errors of plain rounding and of the result; of the layer's output if `on_output`
    calibrated  whether calibration statistics decided the codes, without a fallback
    held_out    the energies of the same errors on held-out tokens, by class
    picture     what it looks like, for the report; None of a weight without loss
    """

    outcome: Outcome
    decoded: torch.Tensor | None = None
    errors: tuple[float, float] = (0.0, 0.0)
    on_output: bool = False
    calibrated: bool = False
    held_out: Mapping[str, ClassEnergies] = field(default_factory=dict)
    picture: MatrixPicture | None = None


class WeightCompressor:
    """Compress parameters by a method. Statistics that a weight's own parts do not need are used to measure its error."""

    def __init__(self, method: Method, *, strict: bool = False) -> None:
        self.method, self.strict = method, strict

    def compress(
        self,
        planned: PlannedWeight,
        original: torch.Tensor,
        stats: Mapping[str, Stats],
        scales: Rescaled | None,
    ) -> tuple[CompressedParameter, torch.Tensor]:
        """Compress a parameter, all of its experts one by one; return it and its decoded values in its own shape. Changes no argument.

        `stats` holds the calibration statistics by the names of its matrices, `scales` the results of scale searches.
        """
        started = time.perf_counter()
        parameter = planned.parameter
        named = list(zip(parameter.parts(), parameter.matrices(original), strict=True))
        fmt, lost = self._in_range(planned.method, [w for _, w in named])
        parts = replace(planned.method, format=fmt)
        matrices = [self._compress_matrix(name, parameter, w, stats.get(name), parts, scales) for name, w in named]
        outcomes = [m.outcome for m in matrices]
        weight = CompressedWeight.stack_rows([o.weight for o in outcomes]) if parameter.experts else outcomes[0].weight
        known = None if parameter.experts else matrices[0].decoded
        decoded = weight.dequantize() if known is None else known
        if not all_finite(decoded):
            raise NumericsError(f"{parameter.stem}: the compressed weight is not finite.")
        fallbacks = [*lost, *(text for o in outcomes for text in o.fallbacks)]
        if fallbacks and self.strict:
            raise NumericsError(f"{parameter.stem}: {fallbacks[0]} (an error because of --strict).")
        record = WeightRecord(
            **BitpressDirectory.write(CompressedLayer(weight)).entry,
            transposed=parameter.transposed,
            experts=parameter.experts,
            errors=_errors_by_terms(outcomes, len(weight.terms)),
            flat=parameter.flat,
        )
        pictures = [m.picture for m in matrices if m.picture is not None]
        tokens = [stats[name].tokens if name in stats else 0 for name, _ in named]
        by_class = token_errors([m.held_out for m in matrices])
        row = LayerRow(
            name=parameter.stem,
            shape=list(parameter.parameter_shape),
            format=fmt.name,
            bytes=weight.nbytes,
            bits_per_weight=weight.bits_per_weight,
            error_rounded=_mean([m.errors[0] for m in matrices]),
            error=_mean([m.errors[1] for m in matrices]),
            measured_on="output" if any(m.on_output for m in matrices) else "weight",
            calibrated=all(m.calibrated for m in matrices),
            tokens=tokens if parameter.experts else tokens[0],
            held_out=by_class,
            notes=[*_dead_inputs(stats[name] for name, _ in named if name in stats), *note_ordinary(by_class)],
            fallbacks=fallbacks,
            seconds=round(time.perf_counter() - started, 3),
            picture=draw_weight(pictures) if pictures else None,
        )
        return CompressedParameter(parameter, weight, digest(decoded), record, row), parameter.restore(decoded)

    def unscaled(self, planned: PlannedWeight, tensor: torch.Tensor, scales: Rescaled | None) -> Float[torch.Tensor, "rows in"]:
        """Return what a compressed parameter stands for, experts stacked: `tensor` without the factors that its input map takes back."""
        parameter = planned.parameter
        named = zip(parameter.parts(), parameter.matrices(tensor), strict=True)
        return torch.cat(
            [w if scales is None or name not in scales.unfolded else w / scales.factors[name] for name, w in named]
        )

    def replaced(
        self,
        made: CompressedParameter,
        weight: CompressedWeight,
        tensor: torch.Tensor,
        stats: Mapping[str, Stats],
        scales: Rescaled | None,
        folded: Float[torch.Tensor, "out in"] | None = None,
    ) -> CompressedParameter:
        """Return a parameter with another weight, measured as the one before; its entries hold `folded` factors. Raises NumericsError."""
        parameter = made.parameter
        if not all_finite(decoded := weight.dequantize()):
            raise NumericsError(f"{parameter.stem}: the learned weight is not finite.")
        errors, classes, pictures = list[float](), list[Mapping[str, ClassEnergies]](), list[MatrixPicture]()
        count = max(parameter.experts, 1)
        parts = zip((decoded if folded is None else decoded / folded).chunk(count), parts_of(weight, count), strict=True)
        for name, w, (part, own) in zip(parameter.parts(), parameter.matrices(tensor), parts, strict=True):
            factor = None if scales is None else scales.factors.get(name)
            divided = None if scales is None or name in scales.unfolded else factor
            unscaled, w_hat = w if factor is None else w / factor, part if divided is None else part / divided
            usable = stats.get(name)
            errors += output_errors(unscaled, (w_hat,), usable)
            if usable is not None and usable.held_out is not None:
                classes.append(measure_classes(unscaled, (w_hat, w_hat), usable.held_out))
            pictures.append(with_utilization(look_at(unscaled, w_hat, usable), unscaled, own, divided, usable))
        by_class, before = None, made.row.held_out
        if before is not None and classes:
            by_class = {
                key: e.model_copy(update={"error_rounded": before[key].error_rounded})
                for key, e in (token_errors(classes) or {}).items()
                if key in before
            }
        picture = None if made.row.picture is None else draw_weight(pictures)
        found = {"error": _mean(errors), "held_out": by_class, "picture": picture}
        row = made.row.model_copy(update={**found, "bytes": weight.nbytes, "bits_per_weight": weight.bits_per_weight})
        entry = BitpressDirectory.write(CompressedLayer(weight, made.input)).entry
        # The errors of some of its terms are no longer those: it is loaded as a whole.
        record = made.record.model_copy(update={"spec": entry["spec"], "errors": None})
        return replace(made, weight=weight, digest=digest(decoded), record=record, row=row)

    def _in_range(self, parts: LayerMethod, matrices: Sequence[torch.Tensor]) -> tuple[AnyFormat, tuple[str, ...]]:
        """Return a format that holds a weight of this size, the same for all experts, and the name of the fallback, if it is one."""
        fmt = parts.format
        if isinstance(fmt, Lossless):
            return fmt, ()
        lost = sum(int(lost_rows(w, fmt).sum()) for w in matrices)
        if not lost:
            return fmt, ()
        rows, wide = sum(w.shape[0] for w in matrices), widened(fmt)
        if wide is None:
            return fmt, (f"{lost} of {rows} rows are out of the range of {fmt.name} and lose their size",)
        if not is_served(parts.quantizer.part.serves, wide):
            return fmt, ()  # the quantizer may store the weight in a way of its own, so its result is checked instead
        return wide, (f"scales are stored as fp32, for {lost} of {rows} rows are out of the range of {fmt.scale}",)

    def _compress_matrix(
        self,
        name: str,
        parameter: WeightParameter,
        w: Float[torch.Tensor, "out in"],
        stats: Stats | None,
        parts: LayerMethod,
        scales: Rescaled | None,
    ) -> _Matrix:
        """Compress one matrix.

        The columns of a rescaled weight `w` are multiplied by their factors already; `stats` are those of the unscaled input.
        """
        fmt = parts.format
        if isinstance(fmt, Lossless):
            with _named(name):
                return _Matrix(Outcome(CompressedWeight((fmt.encode(w),))))
        needs = parts.quantizer.part.needs | self.method.shared_needs
        scarce = self._scarce(name, parameter, stats, needs)
        if scarce is not None:
            # Experts of one stack have the same kinds of terms and of maps, so this one is compressed in the same way, as if all its
            # channels were alike.
            alike = Stats(1, torch.eye(w.shape[1], device=w.device), torch.ones(w.shape[1], device=w.device))
            known = parts.quantizer.part.needs <= {"gram", "mean_abs"} | UNKNOWN_OF_EXPERTS
            quantizer = parts.quantizer if known else Named("quantizer", "rtn", RTN(clip="mse"))
            parts = LayerMethod(fmt, quantizer, parts.changes, corrections=parts.corrections)
            with _named(name):
                outcome = compress_placed(w, alike, parts)
            outcome, seen = replace(outcome, fallbacks=(scarce,)), None
        else:
            seen = stats if scales is None else scales.stats.get(name)
            with _named(name):
                outcome = compress_placed(w, needed_of(seen, needs), parts)
        calibrated = bool(needs) and not outcome.fallbacks
        if seen is not None and "gram" in needs and "loss_gram" in self.method.needs and seen.loss_gram is None:
            outcome = replace(outcome, fallbacks=(*outcome.fallbacks, ALIKE))
        decoded = outcome.weight.dequantize()
        changed = int(changed_rows(w, decoded, fmt).sum())
        if changed:
            text = f"{changed} of {w.shape[0]} rows lost their size: this recipe cannot hold them in {fmt.name}"
            outcome = replace(outcome, fallbacks=(*outcome.fallbacks, text))
        unscaled, w_hat, factor = w, decoded, None if scales is None else scales.factors.get(name)
        mapped = outcome.weight
        stored: torch.Tensor | None = decoded
        if factor is not None and scales is not None:
            unscaled, w_hat = w / factor, decoded / factor
            if name in scales.unfolded:
                outcome, stored = _divided(outcome, factor), None
        if outcome.fallbacks and self.strict:
            raise NumericsError(f"{name}: {outcome.fallbacks[0]} (an error because of --strict).")
        alone = parts.quantizer.part == RTN() and not (parts.changes or parts.corrections or self.method.of("target"))
        with _named(name):
            plain = w_hat if alone else RTN().quantize(unscaled, None, fmt).weight.dequantize()
        usable = None if scarce is not None else stats
        before, after = output_errors(unscaled, (plain, w_hat), usable)
        held_out = None if usable is None else usable.held_out
        by_class = {} if held_out is None else measure_classes(unscaled, (plain, w_hat), held_out)
        on_output, picture = usable is not None and usable.gram is not None, look_at(unscaled, w_hat, usable)
        picture = with_utilization(picture, unscaled, mapped, factor, usable)
        return _Matrix(outcome, stored, (before, after), on_output, calibrated, by_class, picture)

    def _scarce(self, name: str, parameter: WeightParameter, stats: Stats | None, needs: Collection[str]) -> str | None:
        """Say why a weight cannot be compressed by its statistics, or None. Only experts may have no tokens."""
        if not needs:
            return None
        tokens = stats.tokens if stats is not None else 0
        if parameter.experts and tokens < max(self.method.recipe.min_expert_tokens, 1):
            return f"{name} saw {tokens} calibration tokens, fewer than {self.method.recipe.min_expert_tokens}; rounded without statistics"
        if stats is None:
            raise CalibrationError(
                f"{name}: no calibration token reached this layer; skip it with --skip or quantize with rtn."
            )
        if stats.gram is not None and not all_finite(stats.gram):
            return "the squares of this layer's calibration inputs are beyond the range of float32; rounded without statistics"
        alive = _alive(stats)
        if alive is not None and not bool(alive.any()):
            return "every calibration input of this layer was zero; rounded without statistics"
        return None


def _divided(outcome: Outcome, factor: Float[torch.Tensor, " in"]) -> Outcome:
    """Put the division of the input before the weight, if no producer absorbs it."""
    weight = outcome.weight
    divide = Scale((1 / factor).contiguous())
    mapped = CompressedWeight(weight.terms, chain(divide, weight.input_map), weight.output_map)
    text = "no producer takes the input's scale; it is applied at run time"
    return replace(outcome, weight=mapped, fallbacks=(*outcome.fallbacks, text))


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a weight's name at the beginning of its errors."""
    try:
        yield
    except (CalibrationError, FormatError, NumericsError) as error:
        raise type(error)(f"{name}: {error}") from error


def _alive(stats: Stats) -> Bool[torch.Tensor, " in"] | None:
    """Return which input channels were not always zero; None if that was not measured."""
    if stats.mean_abs is not None:
        return stats.mean_abs > 0
    return None if stats.gram is None else stats.gram.diagonal() > 0


def _dead_inputs(stats: Iterable[Stats]) -> list[str]:
    """Return a note on input channels that were always zero, as a norm's weight may make them; experts are counted together."""
    measured = [alive for alive in map(_alive, stats) if alive is not None]
    dead, total = sum(int((~alive).sum()) for alive in measured), sum(alive.numel() for alive in measured)
    return [f"{dead} of {total} input channels were always zero"] if dead else []


def _errors_by_terms(outcomes: Sequence[Outcome], count: int) -> list[float] | None:
    """Return the errors of the first 1, 2, ... terms of a weight, averaged over experts, if its quantizer reports all of them."""
    wanted = [f"error_{k}" for k in range(1, count + 1)]
    if not all(set(wanted) == {name for name in o.figures if name.startswith("error_")} for o in outcomes):
        return None
    return [_mean([o.figures[name] for o in outcomes]) for name in wanted]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)
