"""Press one weight: compose the recipe's parts on each of its matrices, say what was lost, and note what is stored."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CalibrationError, FormatError, NumericsError
from bitpress.finite import all_finite
from bitpress.formats import AnyFormat, CompressedWeight, Format, Lossless, Scale, chain
from bitpress.pipeline.composition import compress_matrix
from bitpress.pipeline.plan import PlannedWeight
from bitpress.pipeline.rescale import Rescaled
from bitpress.quantizers.quantizer import Outcome, Quantizer, output_errors
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import Recipe

__all__ = ["PressedBlock", "WeightPresser", "digest"]


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
        outcomes, errors, tokens = [], [], []
        seens = [stats[name] for name in parameter.parts() if name in stats]
        for name, w in zip(parameter.parts(), parameter.matrices(original), strict=True):
            outcome, error = self._press_matrix(name, parameter, w, stats.get(name), planned.format, scales)
            outcomes.append(outcome)
            errors.append(error)
            tokens.append(stats[name].tokens if name in stats else 0)
        weight = CompressedWeight.stack_rows([o.weight for o in outcomes]) if parameter.experts else outcomes[0].weight
        w_hat = weight.dequantize()
        if not all_finite(w_hat):
            raise NumericsError(f"{parameter.stem}: the compressed weight is not finite.")
        block.tensors |= {f"{parameter.stem}.{leaf}": t for leaf, t in weight.tensors().items()}
        record = {"spec": weight.spec(), "transposed": parameter.transposed, "experts": parameter.experts}
        if parameter.flat:
            record["flat"] = True
        if (by_terms := _errors_by_terms(outcomes, len(weight.terms))) is not None:
            record["errors"] = by_terms
        block.weights[parameter.name] = record
        block.digests[parameter.name] = digest(w_hat)
        block.rows.append(
            {
                **planned.row(),
                "bytes": weight.nbytes,
                "bits_per_weight": weight.bits_per_weight,
                "error_rounded": _mean([e[0] for e in errors]),
                "error": _mean([e[1] for e in errors]),
                "measured_on": "output" if any(seen.gram is not None for seen in seens) else "weight",
                "tokens": tokens if parameter.experts else tokens[0],
                "fallbacks": [text for o in outcomes for text in o.fallbacks],
            }
        )
        return parameter.restore(w_hat)

    def _press_matrix(
        self,
        name: str,
        parameter: WeightParameter,
        w: Float[torch.Tensor, "out in"],
        stats: Stats | None,
        fmt: AnyFormat,
        scales: Rescaled | None,
    ) -> tuple[Outcome, tuple[float, float]]:
        """Compress one matrix; errors are those of the layer's output, plainly rounded and as compressed.

        `w` has a rescaled weight's columns multiplied by their factor already; `stats` are of the input as it was.
        """
        if isinstance(fmt, Lossless):
            try:
                return Outcome(CompressedWeight((fmt.encode(w),))), (0.0, 0.0)
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from error
        quantizer = self._quantizer_of(parameter)
        factor = None if scales is None else scales.factors.get(name)
        needs = quantizer.needs | self.shared_needs
        scarce = self._scarce(name, parameter, stats, needs)
        if scarce is not None:
            # Experts of one stack have the same kinds of terms: this one goes the same way, as if its channels were all alike.
            alike = Stats(1, torch.eye(w.shape[1]), torch.ones(w.shape[1]))
            if not quantizer.needs <= {"gram", "mean_abs"}:
                quantizer = RTN(clip="mse")
            outcome = replace(compress_matrix(w, alike, fmt, quantizer, corrections=self.corrections), fallbacks=(scarce,))
        else:
            seen = stats if scales is None else scales.stats.get(name)
            outcome = self._compose(name, w, _needed(seen, needs), fmt, quantizer)
        unscaled, w_hat = w, outcome.weight.dequantize()
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
        plain = w_hat if alone else RTN().quantize(unscaled, None, fmt).weight.dequantize()
        usable = None if scarce is not None else stats
        before, after = output_errors(unscaled, (plain, w_hat), usable)
        return outcome, (before, after)

    def _quantizer_of(self, parameter: WeightParameter) -> Quantizer:
        other = self.recipe.quantizer_for(parameter.stem)
        return self.quantizer if other is None else other[1]

    def _compose(
        self, name: str, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format, quantizer: Quantizer
    ) -> Outcome:
        try:
            return compress_matrix(w, stats, fmt, quantizer, self.changes, self.corrections, self.targets)
        except (CalibrationError, FormatError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _scarce(self, name: str, parameter: WeightParameter, stats: Stats | None, needs: Collection[str]) -> str | None:
        """Say why a weight cannot be compressed by its statistics, or None. Only experts may go without."""
        if not needs:
            return None
        tokens = stats.tokens if stats is not None else 0
        if parameter.experts and tokens < max(self.recipe.min_expert_tokens, 1):
            return f"{name} saw {tokens} calibration tokens, fewer than {self.recipe.min_expert_tokens}; rounded without statistics"
        if stats is None:
            raise CalibrationError(f"{name}: calibration never reached this layer; skip it with --skip or quantize with rtn.")
        if "gram" in needs and stats.gram is not None and float(stats.gram.diagonal().sum()) <= 0:
            raise CalibrationError(f"{name}: every calibration input of this layer was zero.")
        return None


def digest(w_hat: Float[torch.Tensor, "rows in"]) -> str:
    """SHA-256 of a decoded weight's float32 values, to be compared after the file has been read again."""
    return hashlib.sha256(w_hat.contiguous().numpy().data).hexdigest()


def _needed(stats: Stats | None, needs: Collection[str]) -> Stats | None:
    """Leave out what is there only to say what the error is."""
    if stats is None or not needs:
        return None
    return stats if "gram" in needs else replace(stats, gram=None)


def _errors_by_terms(outcomes: Sequence[Outcome], count: int) -> list[float] | None:
    """Give the errors of the first 1, 2, ... of a weight's terms, experts' on average, where its quantizer says them all."""
    wanted = [f"error_{k}" for k in range(1, count + 1)]
    if not all(set(wanted) == {name for name in o.figures if name.startswith("error_")} for o in outcomes):
        return None
    return [_mean([o.figures[name] for o in outcomes]) for name in wanted]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)
