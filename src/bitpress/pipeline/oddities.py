"""What a recipe does to a model that its user may not have meant: noted before any work."""

from pathlib import Path

from bitpress.errors import UsageError
from bitpress.formats import Format
from bitpress.pipeline.plan import Plan, overlooked_products, unmeant_bits
from bitpress.progress import Progress
from bitpress.quantizers.quantizer import is_served
from bitpress.recipes import Method

__all__ = ["note_oddities", "notes_of", "told_scarce", "told_untied"]


def told_scarce(plan: Plan) -> tuple[str, ...]:
    """Say which spans have more learned parameters than the calibration text has values to learn them from."""
    return () if plan.learning is None else plan.learning.scarce


def told_idle(plan: Plan, method: Method) -> list[str]:
    """Say which tunings can learn no weight of a plan, and no norm either."""
    formats = {w.format for w in plan.weights if isinstance(w.format, Format)}
    return [
        f"{named.name} learns codes of {', '.join(named.part.serves)}, and no weight of this recipe has such a format: it learns nothing"
        for named in method.tunings
        if not named.part.norms and not any(is_served(named.part.serves, fmt) for fmt in formats)
    ]


def told_untied(plan: Plan) -> list[str]:
    """Say which parameters of a plan have a matrix of their own that had none in the source."""
    return [
        f"{alias} and {original} are one matrix in the source (tied) and two in the rotated model, which is larger by that"
        for alias, original in plan.untied.items()
    ]


def notes_of(plan: Plan, method: Method) -> list[str]:
    """Return as sentences what is noted of a plan, the bits beyond a budget too."""
    excess = None if plan.offer is None else plan.offer.excess()
    texts = [f"{text}." for text in (*unmeant_bits(plan), *told_scarce(plan), *told_idle(plan, method), *told_untied(plan))]
    return texts if excess is None else [*texts, excess]


def note_oddities(plan: Plan, method: Method, out: Path, strict: bool, progress: Progress) -> None:
    """Note what a plan's user may not have meant. Raises UsageError for some of that if it is `strict`."""
    for text in overlooked_products(plan):
        if strict:
            raise UsageError(f"{text} (an error because of --strict). Skip them by name (--skip) to allow it.")
        progress.note(f"{text}.")
    for text in unmeant_bits(plan):
        if strict:
            raise UsageError(f"{text} (an error because of --strict).")
        progress.note(f"{text}.")
    for text in (*told_scarce(plan), *told_idle(plan, method)):
        if strict:
            raise UsageError(f"{text} (an error because of --strict).")
        progress.note(f"{text}.")
    for text in told_untied(plan):
        progress.note(f"{text}.")
    if (reason := method.no_default_scales()) is not None:
        progress.note(f"{reason}; name a quantizer to choose.")
    if plan.offer is not None and (excess := plan.offer.excess()) is not None:
        progress.note(excess)
    if plan.given is not None and plan.published_bytes > plan.given_bytes:
        progress.note(
            f"{out} will be larger than its source: about {plan.published_bytes / 1e6:.0f} MB from {plan.given_bytes / 1e6:.0f} MB "
            f"({plan.given.text})."
        )
