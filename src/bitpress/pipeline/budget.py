"""A budget of bits: what each format of each weight costs the loss, measured before the first block, and the formats that it buys.

Source   Malinovskii et al. 2024, HIGGS (`allocation.linearity`): a factor of the weight times the relative squared error of the format.
Differs  errors are those of the recipe's changes of basis and quantizer where they need no statistics, as HIGGS does not. Rounding with
         clipping stands for a quantizer that does: the part of the error that it takes away, as corrections and other transforms do,
         is taken to be the same for all formats.
Cost     the whole model in memory and a pass of the calibration text back and forth, then a trial of every weight in each format.

The choice is made from these figures alone. They are kept with the job, so a resumed run chooses the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float

from bitpress.allocation.linearity import curved_factors
from bitpress.errors import FormatError, NumericsError, UsageError
from bitpress.formats import Format
from bitpress.formats.reach import lost_rows, widened
from bitpress.models.streaming import StreamedModel
from bitpress.models.task import Inputs
from bitpress.models.walk import LoadedBlock, walk
from bitpress.pipeline.compose import compress_matrix
from bitpress.pipeline.gradients import measure_curvature
from bitpress.pipeline.journal import Job
from bitpress.pipeline.offer import Offer, trial_parts
from bitpress.pipeline.plan import Plan, make_plan
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.progress import Progress
from bitpress.quantizers.quantizer import is_served
from bitpress.recipes import Method

__all__ = ["choose_formats", "measure_offer", "plan_method", "settle_plan", "told_formats"]

FIGURES = "budget.safetensors"
Figures = Mapping[str, Float[torch.Tensor, " figures"]]


def plan_method(model: StreamedModel, method: Method, stored: dict[str, int]) -> Plan:
    """Plan a run, as `make_plan` does. Under a budget the plan has an offer, and its bytes are those that the budget stands for.

    Raises also UsageError for a budget that cannot be met, and FormatError for a weight that some of the formats do not suit.
    """
    if not method.options:
        return make_plan(model, method, stored)
    plans = {fmt: make_plan(model, replace(method, format=fmt), stored) for fmt in method.options}
    plan = next(own for fmt, own in plans.items() if fmt == method.format)
    names = {fmt: {w.parameter.stem for w in own.weights} for fmt, own in plans.items()}
    for fmt, own in names.items():
        if missing := sorted({name for other in names.values() for name in other} - own):
            raise FormatError(f"budget: {missing[0]} is too small for {fmt.name}; leave that out of among or skip the weight.")
    offer = Offer(method.recipe.budget.bits if method.recipe.budget else 0.0, _options(plans))
    if not offer.free:
        raise UsageError("budget: overrides say the format of every weight, so there is nothing to choose; leave it out.")
    offer.check()
    disk = plan.disk + offer.nbytes - plan.compressed_bytes
    return replace(plan, offer=offer, compressed_bytes=offer.nbytes, disk=disk)


def choose_formats(
    job: Job,
    plan: Plan,
    model: StreamedModel,
    method: Method,
    stored: dict[str, int],
    inputs: Inputs | None,
    check_stop: Callable[[], None],
    progress: Progress,
) -> tuple[Plan, dict[str, str]]:
    """Measure what a plan offers, unless the job has done so, and return the plan of the formats chosen, and the hashes of what was kept.

    A plan without an offer is returned as it is.
    """
    if plan.offer is None:
        return plan, {}
    kept = {}
    if not job.units:
        assert inputs is not None
        model.load_outer_()
        kept = job.keep(FIGURES, measure_offer(model, plan.offer, inputs, check_stop, progress))
    figures = dict(job.kept(FIGURES))
    settled = settle_plan(plan, model, method, stored, figures)
    progress.note(f"formats chosen: {told_formats(settled.by_format())}")
    return settled, kept


def measure_offer(
    model: StreamedModel, offer: Offer, inputs: Inputs, check_stop: Callable[[], None], progress: Progress
) -> dict[str, Float[torch.Tensor, " figures"]]:
    """Return the factor of every weight that has several formats, and the relative squared error of each of them, in float64.

    The model's outer parts must be loaded. Raises NumericsError when a gradient or an error is not finite.
    """
    blocks = [[own for own in offer.free if own[0].block == i] for i in range(len(model.blocks))]
    traces = measure_curvature(model, [[own[0].parameter for own in block] for block in blocks], inputs, check_stop, progress)
    progress.begin("errors of the formats", len(blocks))
    tried = _Trials(blocks)
    walk(model, [tried], check_stop=check_stop, note=progress.advance)
    found = {}
    for own in offer.free:
        parameter = own[0].parameter
        (factor,) = curved_factors([traces[parameter.name]], [tried.mean_squares[parameter.name]])
        found[parameter.stem] = torch.tensor([factor, *tried.errors[parameter.name]], dtype=torch.float64)
        if not bool(torch.isfinite(found[parameter.stem]).all()):
            raise NumericsError(f"{parameter.stem}: the error of a format of the budget is not finite; skip the weight.")
    return found


def settle_plan(plan: Plan, model: StreamedModel, method: Method, stored: dict[str, int], figures: Figures) -> Plan:
    """Return a plan with the formats that its offer buys by what was measured."""
    assert plan.offer is not None
    chosen = make_plan(model, replace(method, chosen=plan.offer.choose(figures)), stored)
    return replace(
        chosen,
        side_bytes=plan.side_bytes,
        given=plan.given,
        untied=plan.untied,
        source_bytes=plan.source_bytes,
        disk=chosen.disk + plan.side_bytes,
    )


def told_formats(counts: Mapping[str, int]) -> str:
    """Say how many weights have each format: "12 weights int2-g64-zero, 200 weights int3-g64-zero"."""
    return ", ".join(f"{count} weight{'s' * (count != 1)} {name}" for name, count in counts.items())


def _options(plans: Mapping[Format, Plan]) -> tuple[tuple[PlannedWeight, ...], ...]:
    """Return every weight in each format; only in one if it is the same in all plans, as an override has said."""
    found = []
    for alike in zip(*(plan.weights for plan in plans.values()), strict=True):
        free = all(w.format == fmt for w, fmt in zip(alike, plans, strict=True))
        found.append(alike if free else alike[:1])
    return tuple(found)


class _Trials:
    """A visitor that tries weights in each of their formats; figures are by the names of parameters, those of experts together."""

    def __init__(self, blocks: list[list[tuple[PlannedWeight, ...]]]) -> None:
        self.blocks = blocks
        self.mean_squares: dict[str, float] = {}
        self.errors: dict[str, list[float]] = {}

    def visit_(self, block: LoadedBlock) -> None:
        for own in self.blocks[block.index]:
            parameter = own[0].parameter
            matrices = parameter.matrices(block.tensors[parameter.name])
            self.mean_squares[parameter.name] = sum(map(_energy, matrices)) / own[0].weights
            self.errors[parameter.name] = [_error(matrices, option) for option in own]


def _error(matrices: Sequence[Float[torch.Tensor, "out in"]], option: PlannedWeight) -> float:
    """Return the relative squared error of a weight in a format, all experts together."""
    parts, fmt, lost, energy = trial_parts(option), option.format, 0.0, 0.0
    assert isinstance(fmt, Format)
    for w in matrices:
        wide = widened(fmt) if bool(lost_rows(w, fmt).any()) else None
        held = wide if wide is not None and is_served(parts.quantizer.part.serves, wide) else fmt
        lost += _energy(w - compress_matrix(w, None, replace(parts, format=held)).weight.dequantize())
        energy += _energy(w)
    return lost / energy if energy > 0 else 0.0


def _energy(w: Float[torch.Tensor, "out in"]) -> float:
    return float(w.double().square().sum())
