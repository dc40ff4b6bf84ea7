"""Press one weight: compose the recipe's parts on each of its matrices, say what was lost, and note what is stored."""

import contextlib
import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float

from bitpress.calibration import Stats
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CalibrationError, FormatError, NumericsError
from bitpress.finite import all_finite
from bitpress.formats import AnyFormat, CompressedWeight, Lossless, Scale, chain
from bitpress.formats.digest import digest
from bitpress.formats.reach import changed_rows, lost_rows, widened
from bitpress.pipeline.channel_scaling import Rescaled
from bitpress.pipeline.compose import compress_matrix
from bitpress.pipeline.plan import PlannedWeight
from bitpress.quantizers.quantizer import Outcome, Quantizer, output_errors
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import Recipe

__all__ = ["PressedBlock", "WeightPresser"]


@dataclass
class PressedBlock:
    """What one block became: tensors to store, and facts for the journal."""

    tensors: dict[str, torch.Tensor]
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {"weights": self.weights, "digests": self.digests, "rows": self.rows}

    @property
    def error(self) -> float:
        """Mean relative error of the block's weights."""
        return math.fsum(row["error"] for row in self.rows) / max(len(self.rows), 1)


@dataclass(frozen=True)
class _Matrix:
    """What one matrix became.

    errors      relative squared errors, plainly rounded and as compressed; of the layer's output where `on_output`
    calibrated  whether what calibration saw decided, with nothing given up
    """

    outcome: Outcome
    errors: tuple[float, float] = (0.0, 0.0)
    on_output: bool = False
    calibrated: bool = False


class WeightPresser:
    """Holds a recipe's parts. Statistics may be there that a weight's own do not need: they serve to say what its error is."""

    def __init__(self, recipe: Recipe, *, strict: bool = False) -> None:
        self.recipe, self.strict = recipe, strict
        self.quantizer = recipe.make_quantizer()
        self.changes = [change for _, change in recipe.make_changes()]
        self.targets = [target for _, target in recipe.make_targets()]
        self.corrections = [correction for _, correction in recipe.make_corrections()]
        parts: list[Any] = [part for _, part in (*recipe.make_transforms(), *recipe.make_corrections())]
        self.shared_needs: frozenset[str] = frozenset().union(*(part.needs for part in parts))

    def press_into(
        self,
        block: PressedBlock,
        planned: PlannedWeight,
        original: torch.Tensor,
        stats: Mapping[str, Stats],
        scales: Rescaled | None,
    ) -> torch.Tensor:
        """Compress a parameter, all of its experts one by one; note it in `block`; give it back decoded.

        `stats` holds what calibration saw, by the names of its matrices; `scales` what searches rescaled.
        """
        parameter = planned.parameter
        named = list(zip(parameter.parts(), parameter.matrices(original), strict=True))
        fmt, lost = self._in_range(parameter, [w for _, w in named], planned.format)
        pressed = [self._press_matrix(name, parameter, w, stats.get(name), fmt, scales) for name, w in named]
        outcomes = [p.outcome for p in pressed]
        weight = CompressedWeight.stack_rows([o.weight for o in outcomes]) if parameter.experts else outcomes[0].weight
        w_hat = weight.dequantize()
        if not all_finite(w_hat):
            raise NumericsError(f"{parameter.stem}: the compressed weight is not finite.")
        fallbacks = [*lost, *(text for o in outcomes for text in o.fallbacks)]
        if fallbacks and self.strict:
            raise NumericsError(f"{parameter.stem}: {fallbacks[0]} (an error because of --strict).")
        block.tensors |= {f"{parameter.stem}.{leaf}": t for leaf, t in weight.tensors().items()}
        record = {"spec": weight.spec(), "transposed": parameter.transposed, "experts": parameter.experts}
        if parameter.flat:
            record["flat"] = True
        if (by_terms := _errors_by_terms(outcomes, len(weight.terms))) is not None:
            record["errors"] = by_terms
        block.weights[parameter.name] = record
        block.digests[parameter.name] = digest(w_hat)
        tokens = [stats[name].tokens if name in stats else 0 for name, _ in named]
        block.rows.append(
            {
                **replace(planned, format=fmt).row(),
                "bytes": weight.nbytes,
                "bits_per_weight": weight.bits_per_weight,
                "error_rounded": _mean([p.errors[0] for p in pressed]),
                "error": _mean([p.errors[1] for p in pressed]),
                "measured_on": "output" if any(p.on_output for p in pressed) else "weight",
                "calibrated": all(p.calibrated for p in pressed),
                "tokens": tokens if parameter.experts else tokens[0],
                "notes": _dead_inputs(stats[name] for name, _ in named if name in stats),
                "fallbacks": fallbacks,
            }
        )
        return parameter.restore(w_hat)

    def _in_range(
        self, parameter: WeightParameter, matrices: Sequence[torch.Tensor], fmt: AnyFormat
    ) -> tuple[AnyFormat, tuple[str, ...]]:
        """Return a format that holds a weight of this size, the same for all experts, and the fallback that it is, if it is one."""
        if isinstance(fmt, Lossless):
            return fmt, ()
        lost = sum(int(lost_rows(w, fmt).sum()) for w in matrices)
        if not lost:
            return fmt, ()
        rows, wide = sum(w.shape[0] for w in matrices), widened(fmt)
        if wide is None:
            return fmt, (f"{lost} of {rows} rows are out of the range of {fmt.name} and lose their size",)
        served = getattr(self._quantizer_of(parameter), "serves", ("*",))
        if not any(fnmatch.fnmatchcase(wide.name, pattern) for pattern in served):
            return fmt, ()  # the quantizer may keep the weight in a way of its own: what comes out is looked at
        return wide, (f"scales are stored as fp32, for {lost} of {rows} rows are out of the range of {fmt.scale}",)

    def _press_matrix(
        self,
        name: str,
        parameter: WeightParameter,
        w: Float[torch.Tensor, "out in"],
        stats: Stats | None,
        fmt: AnyFormat,
        scales: Rescaled | None,
    ) -> _Matrix:
        """Compress one matrix.

        `w` has a rescaled weight's columns multiplied by their factor already; `stats` are of the input as it was.
        """
        if isinstance(fmt, Lossless):
            with _named(name):
                return _Matrix(Outcome(CompressedWeight((fmt.encode(w),))))
        quantizer = self._quantizer_of(parameter)
        factor = None if scales is None else scales.factors.get(name)
        needs = quantizer.needs | self.shared_needs
        scarce = self._scarce(name, parameter, stats, needs)
        if scarce is not None:
            # Experts of one stack have the same kinds of terms: this one goes the same way, as if its channels were all alike.
            alike = Stats(1, torch.eye(w.shape[1]), torch.ones(w.shape[1]))
            if not quantizer.needs <= {"gram", "mean_abs"}:
                quantizer = RTN(clip="mse")
            with _named(name):
                outcome = compress_matrix(w, alike, fmt, quantizer, corrections=self.corrections)
            outcome = replace(outcome, fallbacks=(scarce,))
        else:
            seen = stats if scales is None else scales.stats.get(name)
            with _named(name):
                outcome = compress_matrix(w, _needed(seen, needs), fmt, quantizer, self.changes, self.corrections, self.targets)
        calibrated = bool(needs) and not outcome.fallbacks
        unscaled, w_hat = w, outcome.weight.dequantize()
        changed = int(changed_rows(w, w_hat, fmt).sum())
        if changed:
            text = f"{changed} of {w.shape[0]} rows lost their size: this recipe cannot hold them in {fmt.name}"
            outcome = replace(outcome, fallbacks=(*outcome.fallbacks, text))
        if factor is not None and scales is not None:
            unscaled, w_hat = w / factor, w_hat / factor
            if name in scales.unfolded:
                weight = outcome.weight
                divide = Scale((1 / factor).contiguous())
                mapped = CompressedWeight(weight.terms, chain(divide, weight.input_map), weight.output_map)
                text = "no producer takes the input's scale; it is applied at run time"
                outcome = replace(outcome, weight=mapped, fallbacks=(*outcome.fallbacks, text))
        if outcome.fallbacks and self.strict:
            raise NumericsError(f"{name}: {outcome.fallbacks[0]} (an error because of --strict).")
        alone = quantizer == RTN() and not self.changes and not self.corrections and not self.targets
        with _named(name):
            plain = w_hat if alone else RTN().quantize(unscaled, None, fmt).weight.dequantize()
        usable = None if scarce is not None else stats
        before, after = output_errors(unscaled, (plain, w_hat), usable)
        return _Matrix(outcome, (before, after), usable is not None and usable.gram is not None, calibrated)

    def _quantizer_of(self, parameter: WeightParameter) -> Quantizer:
        other = self.recipe.quantizer_for(parameter.stem)
        return self.quantizer if other is None else other[1]

    def _scarce(self, name: str, parameter: WeightParameter, stats: Stats | None, needs: Collection[str]) -> str | None:
        """Say why a weight cannot be compressed by its statistics, or None. Only experts may go without a token."""
        if not needs:
            return None
        tokens = stats.tokens if stats is not None else 0
        if parameter.experts and tokens < max(self.recipe.min_expert_tokens, 1):
            return f"{name} saw {tokens} calibration tokens, fewer than {self.recipe.min_expert_tokens}; rounded without statistics"
        if stats is None:
            raise CalibrationError(f"{name}: calibration never reached this layer; skip it with --skip or quantize with rtn.")
        if stats.gram is not None and not all_finite(stats.gram):
            return "the squares of this layer's calibration inputs are beyond the range of float32; rounded without statistics"
        alive = _alive(stats)
        if alive is not None and not bool(alive.any()):
            return "every calibration input of this layer was zero; rounded without statistics"
        return None


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a weight's name before what goes wrong with it."""
    try:
        yield
    except (CalibrationError, FormatError, NumericsError) as error:
        raise type(error)(f"{name}: {error}") from error


def _alive(stats: Stats) -> Bool[torch.Tensor, " in"] | None:
    """Say which input channels were ever not zero; None where that was not measured."""
    if stats.mean_abs is not None:
        return stats.mean_abs > 0
    return None if stats.gram is None else stats.gram.diagonal() > 0


def _dead_inputs(stats: Iterable[Stats]) -> list[str]:
    """Note the input channels that were always zero, as a norm's weight may make them; experts' are counted together."""
    measured = [alive for alive in map(_alive, stats) if alive is not None]
    dead, total = sum(int((~alive).sum()) for alive in measured), sum(alive.numel() for alive in measured)
    return [f"{dead} of {total} input channels were always zero"] if dead else []


def _needed(stats: Stats | None, needs: Collection[str]) -> Stats | None:
    """Leave out what is there only to say what the error is."""
    if stats is None or not needs:
        return None
    return stats if "gram" in needs else replace(stats, gram=None)


def _errors_by_terms(outcomes: Sequence[Outcome], count: int) -> list[float] | None:
    """Return the errors of the first 1, 2, ... of a weight's terms, experts' on average, where its quantizer says them all."""
    wanted = [f"error_{k}" for k in range(1, count + 1)]
    if not all(set(wanted) == {name for name in o.figures if name.startswith("error_")} for o in outcomes):
        return None
    return [_mean([o.figures[name] for o in outcomes]) for name in wanted]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)
