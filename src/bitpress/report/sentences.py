"""The words of the report page: what was done, in one sentence, and what the bytes are."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.figures import ratio_text, shown
from bitpress.report.document import Report, TunedSpan
from bitpress.screen import size as bytes_text

__all__ = ["say_kl", "say_learned", "say_parts", "say_recipe", "say_run"]

Part = tuple[str, int]


def say_recipe(recipe: Mapping[str, Any]) -> str:
    """Return the parts of a resolved recipe: `int4-g64-zero by awq-scale + gptq`."""
    parts = [*recipe.get("transforms", ()), recipe["quantizer"], *recipe.get("corrections", ()), *recipe.get("tuning", ())]
    budget = recipe.get("budget")
    weights = f"{budget['bits']:g} bits a weight" if budget else str(recipe["weights"])
    return f"{weights} by {' + '.join(str(part['name']) for part in parts)}"


def say_learned(spans: Sequence[TunedSpan]) -> list[str]:
    """Say for every way to learn what came of it: how many blocks or weights were kept, and how much lower their losses are."""
    told = []
    for name, span in dict.fromkeys((one.tuning, one.span) for one in spans):
        own = [one for one in spans if (one.tuning, one.span) == (name, span)]
        kept = [one for one in own if one.kept]
        noun = {"block": "block", "layer": "weight", "windows": "window", "network": "network"}[span]
        text = f"{name}: {len(kept)} of {len(own)} {noun}s are better on held-out text and kept"
        if kept:
            text += f", their loss {100 * sum(1 - one.after / one.before for one in kept) / len(kept):.1f} % lower on average"
        early = sum(one.failed is not None for one in own)
        told.append(text + (f"; {early} ended early" if early else ""))
    return told


def say_kl(value: float | str | None, mean: float | str | None) -> str:
    """Return a KL divergence, or half its interval, with digits that suit the mean: `0.0123`, `0.00013`, `2.7e-06`."""
    size = abs(float(mean or 0.0))
    return shown(value, "{:.4f}" if size >= 0.001 or size == 0 else "{:.5f}" if size >= 0.0001 else "{:.1e}")


def say_run(report: Report, name: str) -> str:
    """Say in one sentence what was done, and what it cost."""
    figures, size = report.figures, report.size
    original = report.model or "The original model"
    told = (
        f"{original} ({bytes_text(size.bytes_original)}) was compressed to {name} ({bytes_text(size.bytes)}): "
        f"{ratio_text(size.ratio)}, with {_count(report)} stored in {say_recipe(report.job.recipe)}, "
        f"{figures.bits_per_weight:.2f} bits a weight"
    )
    if figures.kl_mean is None:
        return f"{told}; the distance from the original was not measured."
    half = "" if figures.kl_ci95 is None else f" ± {say_kl(figures.kl_ci95, figures.kl_mean)}"
    distance = f"{say_kl(figures.kl_mean, figures.kl_mean)}{half}"
    if figures.top1_agreement is None or figures.tokens is None:
        return f"{told}; its outputs differ from the original's by a KL divergence of {distance} nats."
    agreement = f"{100 * figures.top1_agreement:.1f}{_half(figures.top1_ci95, 100, '{:.1f}')} %"
    return (
        f"{told}; on {figures.tokens:,} tokens that nothing was fitted to, its predictions differ from the original's by "
        f"{distance} nats a token (KL divergence), and the most likely token is the same at {agreement} of the positions."
    )


def say_parts(report: Report) -> list[Part]:
    """Return the bytes of the published directory by part; nothing is left out."""
    size = report.size
    parts = [
        ("weights of the blocks, compressed", size.bytes_compressed_weights),
        ("embeddings and output head, compressed", size.bytes_outer),
        ("kept as stored (norms, biases, ...)", size.bytes_kept),
    ]
    rest = size.bytes - sum(count for _, count in parts)
    return [(part, count) for part, count in (*parts, ("tokenizer, configuration, manifest, reports", rest)) if count > 0]


def _count(report: Report) -> str:
    outer = {row.name for row in report.outer}
    count = sum(1 for row in report.layers if row.name not in outer)
    return "1 weight matrix" if count == 1 else f"{count:,} weight matrices"


def _half(value: float | None, factor: float, form: str) -> str:
    return "" if value is None else f" ± {form.format(factor * value)}"
