"""Press one block after another: measure its inputs, rescale, quantize, and pass on what the compressed block gives.

The only place where calibration, transforms and quantizers meet. Everything random is drawn before; the same inputs give the same
bytes.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float

from bitpress.calibration import Capture, Stats, Watched
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CalibrationError, FormatError, NumericsError
from bitpress.formats import AnyFormat, CompressedWeight, Lossless, Scale, chain
from bitpress.pipeline.memory import release
from bitpress.pipeline.plan import PlannedWeight
from bitpress.pipeline.products import list_weights
from bitpress.pipeline.rescale import PROBE_LENGTH, Rescaled, rescale_block_
from bitpress.pipeline.streaming import StreamedModel
from bitpress.quantizers.quantizer import Outcome, output_errors
from bitpress.quantizers.rtn import RTN
from bitpress.recipes import Recipe

__all__ = ["PressedBlock", "Presser", "digest"]


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


class Presser:
    """Holds the model, the recipe's parts, and the hidden states that feed the next block.

    `before_advance` is called each time before those are overwritten.
    """

    def __init__(
        self,
        model: StreamedModel,
        recipe: Recipe,
        planned: Sequence[PlannedWeight],
        *,
        strict: bool = False,
        check_stop: Callable[[], None] = lambda: None,
        before_advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.recipe, self.planned, self.strict, self.check_stop = model, recipe, planned, strict, check_stop
        self.before_advance = before_advance
        self.quantizer = recipe.make_quantizer()
        self.transforms = recipe.make_transforms()
        self.needs = recipe.needs()
        self.hidden: torch.Tensor | None = None

    def start_(self, tokens: torch.Tensor | None, stored: torch.Tensor | None) -> None:
        """Embed the calibration tokens; take up stored hidden states where an earlier run left some."""
        if tokens is None:
            return
        batches = tokens.split(self.recipe.batch)
        if stored is None:
            self.hidden = torch.cat([self.model.embed(batch) for batch in batches])
        else:
            self.hidden = stored
            for batch in {batch.shape[0]: batch for batch in batches}.values():
                self.model.embed(batch)  # the model learns again what it passes to its blocks for this shape
        if self.transforms:
            self.model.embed(tokens[:1, :PROBE_LENGTH])

    def press_(self, i: int, *, last: bool) -> PressedBlock:
        """Compress block `i` and move the hidden states past it (not past the last one: nothing needs them)."""
        tensors = self.model.load_block_(i)
        planned = [p for p in self.planned if p.block == i]
        compressed = {p.parameter.name for p in planned}
        stats, scales = self._measure(i, tensors, planned) if self.needs else ({}, None)
        block = PressedBlock({name: t for name, t in tensors.items() if name not in compressed})
        for p in planned:
            self.check_stop()
            started = time.perf_counter()
            w_hat = self._press_parameter(block, p, tensors[p.parameter.name], stats, scales)
            block.rows[-1]["seconds"] = round(time.perf_counter() - started, 3)
            if not last and self.needs:
                self.model.fill_({p.parameter.name: w_hat})
        if not last and self.needs:
            self._advance(i)
        self.model.drop_block_(i)
        release()
        return block

    def _measure(
        self, i: int, tensors: dict[str, torch.Tensor], planned: Sequence[PlannedWeight]
    ) -> tuple[dict[str, Stats], Rescaled]:
        """Collect statistics of every weight's input; let the recipe's transforms rescale the block by them."""
        parameters = [p.parameter for p in planned]
        if self.transforms:
            # A weight that is kept may share an input that is rescaled, and has to follow.
            parameters, _ = list_weights(self.model.block_name(i), self.model.blocks[i], self.model.model.config, ())
        watched: dict[str, tuple[WeightParameter, Watched]] = {}
        for parameter in parameters:
            live = self.model.model.get_parameter(parameter.name)
            for part, view in zip(parameter.parts(), parameter.views(live), strict=True):
                watched[part] = (parameter, Watched(part, view, not parameter.transposed))
        capture = Capture([w for _, w in watched.values()], self.needs)
        with capture:
            for _, hidden in self._batches():
                self.model.run_block(i, hidden)
                capture.next_batch()
                self.check_stop()
        stats = capture.finish()
        assert self.hidden is not None
        searches = [search for _, search in self.transforms]
        scales = rescale_block_(self.model, i, tensors, planned, watched, capture.groups(), stats, searches, self.hidden)
        return stats, scales

    def _advance(self, i: int) -> None:
        self.before_advance()
        for rows, hidden in self._batches():
            out = self.model.run_block(i, hidden)
            if not bool(torch.isfinite(out.sum(dtype=torch.float32))) and not bool(torch.isfinite(out).all()):
                raise NumericsError(f"{self.model.block_name(i)}: the output of the compressed block is not finite.")
            assert self.hidden is not None
            self.hidden[rows] = out
            self.check_stop()

    def _batches(self) -> list[tuple[slice, torch.Tensor]]:
        if self.hidden is None:
            raise CalibrationError("no calibration text was given, and this method needs statistics of the inputs.")
        size = self.recipe.batch
        starts = range(0, self.hidden.shape[0], size)
        return [(slice(a, a + size), self.hidden[a : a + size]) for a in starts]

    def _press_parameter(
        self,
        block: PressedBlock,
        planned: PlannedWeight,
        original: torch.Tensor,
        stats: Mapping[str, Stats],
        scales: Rescaled | None,
    ) -> torch.Tensor:
        """Compress a parameter, all of its experts one by one; note it in `block`; give it back decoded."""
        parameter = planned.parameter
        outcomes, errors, tokens = [], [], []
        for name, w in zip(parameter.parts(), parameter.matrices(original), strict=True):
            outcome, error = self._press_matrix(name, parameter, w, stats.get(name), planned.format, scales)
            outcomes.append(outcome)
            errors.append(error)
            tokens.append(stats[name].tokens if name in stats else 0)
        weight = CompressedWeight.stack_rows([o.weight for o in outcomes]) if parameter.experts else outcomes[0].weight
        w_hat = weight.dequantize()
        if not bool(torch.isfinite(w_hat).all()):
            raise NumericsError(f"{parameter.stem}: the compressed weight is not finite.")
        block.tensors |= {f"{parameter.stem}.{leaf}": t for leaf, t in weight.tensors().items()}
        record = {"spec": weight.spec(), "transposed": parameter.transposed, "experts": parameter.experts}
        block.weights[parameter.name] = record
        block.digests[parameter.name] = digest(w_hat)
        block.rows.append(
            {
                **planned.row(),
                "bytes": weight.nbytes,
                "bits_per_weight": weight.bits_per_weight,
                "error_rounded": _mean([e[0] for e in errors]),
                "error": _mean([e[1] for e in errors]),
                "measured_on": "output" if self.needs else "weight",
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
        factor = None if scales is None else scales.factors.get(name)
        scarce = self._scarce(name, parameter, stats)
        if scarce is not None:
            outcome = Outcome(RTN(clip="mse").quantize(w, None, fmt).weight, (scarce,))
        else:
            seen = stats if scales is None else scales.stats[name]
            outcome = self.quantizer.quantize(w, seen, fmt)
        unscaled, w_hat = w, outcome.weight.dequantize()
        if factor is not None and scales is not None:
            unscaled, w_hat = w / factor, w_hat / factor
            if name in scales.unfolded:
                weight = outcome.weight
                divide = Scale((1 / factor).contiguous())
                mapped = CompressedWeight(weight.terms, chain(divide, weight.input_map), weight.output_map)
                text = "no producer takes the input's scale; it is applied at run time"
                outcome = Outcome(mapped, (*outcome.fallbacks, text))
        if outcome.fallbacks and self.strict:
            raise NumericsError(f"{name}: {outcome.fallbacks[0]} (an error because of --strict).")
        plain = w_hat if self.quantizer == RTN() else RTN().quantize(unscaled, None, fmt).weight.dequantize()
        usable = None if scarce is not None else stats
        before, after = output_errors(unscaled, (plain, w_hat), usable)
        return outcome, (before, after)

    def _scarce(self, name: str, parameter: WeightParameter, stats: Stats | None) -> str | None:
        """Say why a weight cannot be compressed by its statistics, or None. Only experts may go without."""
        if not self.needs:
            return None
        tokens = stats.tokens if stats is not None else 0
        if parameter.experts and tokens < max(self.recipe.min_expert_tokens, 1):
            return f"{name} saw {tokens} calibration tokens, fewer than {self.recipe.min_expert_tokens}; rounded without statistics"
        if stats is None:
            raise CalibrationError(f"{name}: calibration never reached this layer; skip it with --skip or quantize with rtn.")
        if stats.gram is not None and float(stats.gram.diagonal().sum()) <= 0:
            raise CalibrationError(f"{name}: every calibration input of this layer was zero.")
        return None


def digest(w_hat: Float[torch.Tensor, "rows in"]) -> str:
    """SHA-256 of a decoded weight's float32 values, to be compared after the file has been read again."""
    return hashlib.sha256(w_hat.contiguous().numpy().data).hexdigest()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)
