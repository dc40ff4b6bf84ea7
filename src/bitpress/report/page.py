"""The report as one HTML page: no file beside it, no network, no script needed for anything but the details of a weight.

`write_page` shows one published directory, `write_comparison` several. Texts are escaped by the templates (templates/*.jinja); the plots
are SVG (`plots`), the heat map is a table.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from bitpress.figures import shown
from bitpress.report.document import LayerRow, PositionDistance, Report, TextDistance, TunedSpan
from bitpress.report.heat_map import STEPS, HeatMap, draw_heat_map
from bitpress.report.plots import Bar, Course, Dot, plot_bars, plot_course, plot_front, plot_positions
from bitpress.report.sentences import say_kl, say_learned, say_parts, say_recipe, say_run
from bitpress.screen import duration, size

__all__ = ["write_comparison", "write_page"]

# The class of transformers that opens language models.
TEXT_CLASS = "AutoModelForCausalLM"
TEMPLATES = ("base.jinja", "page.jinja", "comparison.jinja", "page.css", "page.js")


@dataclass(frozen=True)
class Loading:
    """How a runtime loads a directory; `of_text` runtimes take language models alone."""

    runtime: str
    note: str
    code: str
    of_text: bool = False


LOADING = (
    Loading(
        "Command line",
        "The native engine where it knows the architecture, else transformers.",
        'bitpress run {name} --prompt "..."',
        True,
    ),
    Loading(
        "Python, transformers",
        "An ordinary model of transformers; its weights are decoded when it is opened.",
        'import bitpress\nfrom transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{name}")',
    ),
    Loading(
        "Python, native engine",
        "Runs on the packed weights; for the architectures that it knows.",
        'import bitpress\n\nengine = bitpress.load("{name}", runtime="native")\nprint("".join(engine.stream("Why is the sky blue?")))',
        True,
    ),
    Loading(
        "vLLM, SGLang, transformers without bitpress",
        "The same codes as compressed-tensors, where they can hold them; the command says what they cannot.",
        "bitpress export {name} {name}-vllm --to compressed-tensors\nvllm serve {name}-vllm",
        True,
    ),
    Loading(
        "llama.cpp",
        "The same codes in one GGUF file, where its types can hold them.",
        "bitpress export {name} {name}.gguf --to gguf\nllama-cli -m {name}.gguf",
        True,
    ),
    Loading(
        "Any other runtime",
        "The decoded weights as ordinary safetensors, in 16 bits; `bitpress targets` lists what else there is.",
        "bitpress export {name} {name}-bf16 --to bf16",
    ),
)


def write_page(report: Report, name: str) -> str:
    """Write the page of one published directory, whose own name is `name`."""
    heat_map = draw_heat_map(report.layers)
    values: dict[str, Any] = {
        "name": name,
        "report": report,
        "sentence": say_run(report, name),
        "recipe_text": say_recipe(report.job.recipe),
        "parts": say_parts(report),
        "heat_map": heat_map,
        "weights": _weights(heat_map),
        "plots": _plots(report),
        "learned": say_learned(report.tuned),
        "courses": _courses(report.tuned),
        "loading": [
            (row.runtime, row.note, row.code.format(name=name, auto_class=report.auto_class))
            for row in LOADING
            if not row.of_text or report.auto_class == TEXT_CLASS
        ],
        "recipe_json": json.dumps(report.job.recipe, indent=1, ensure_ascii=False),
    }
    return _render("page.jinja", values)


def write_comparison(reports: Sequence[tuple[str, Report]]) -> str:
    """Write the page that compares several published directories, by their names."""
    dots = [
        Dot(name, report.size.bytes, float(kl), report.figures.kl_ci95)
        for name, report in reports
        if (kl := report.figures.kl_mean) is not None and math.isfinite(float(kl))
    ]
    rows = [(name, report, say_recipe(report.job.recipe)) for name, report in reports]
    texts = {report.figures.text_sha256 for _, report in reports if report.figures.kl_mean is not None}
    sources = {json.dumps(report.job.source, sort_keys=True) for _, report in reports}
    remarks = [
        *(["They were measured on different texts: their distances cannot be compared."] if len(texts) > 1 else []),
        *(["They were made from different originals."] if len(sources) > 1 else []),
    ]
    values: dict[str, Any] = {
        "name": f"{len(reports)} compressed models",
        "rows": sorted(rows, key=lambda row: row[1].size.bytes),
        "remarks": remarks,
        "plots": {"front": plot_front(dots, "KL divergence against size")} if dots else {},
    }
    return _render("comparison.jinja", values)


def _plots(report: Report) -> dict[str, str]:
    """Draw the distance by text and by position, where they were measured."""
    figures = report.figures
    texts = [Bar(text, mean, half) for text, mean, half in map(_of_text, figures.by_text or ()) if mean is not None]
    places = [Bar(place, mean, half) for place, mean, half in map(_of_position, figures.by_position or ()) if mean is not None]
    found: dict[str, str] = {}
    if len(texts) > 1:
        found["by_text"] = plot_bars(texts, "KL divergence by kind of text")
    if len(places) > 1:
        found["by_position"] = plot_positions(places, "KL divergence by position in the window")
    return found


def _courses(spans: Sequence[TunedSpan]) -> list[tuple[str, str]]:
    """Draw the course of one span of every way to learn, the one that gained the most, with a caption."""
    drawn = []
    for name, span in dict.fromkeys((one.tuning, one.span) for one in spans):
        own = [one for one in spans if (one.tuning, one.span) == (name, span) and one.calibration and one.before > 0]
        if own:
            best = min(own, key=lambda one: one.after / one.before)
            course = Course(best.calibration, best.steps, best.before, best.after)
            drawn.append((f"{name}: {best.name}", plot_course(course, f"loss of {best.name} over the steps of {name}")))
    return drawn


def _of_text(found: TextDistance) -> tuple[str, float | None, float | None]:
    return f"{found.text} ({found.windows})", _finite(found.kl_mean), found.kl_ci95


def _of_position(found: PositionDistance) -> tuple[str, float | None, float | None]:
    place = str(found.first) if found.first == found.last else f"{found.first}\u2013{found.last}"
    return place, _finite(found.kl_mean), found.kl_ci95


def _finite(value: float | str) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _weights(heat_map: HeatMap) -> list[list[dict[str, Any]]]:
    """Return what the script shows of every cell, in the order of the map: a list of weights, the first of them with its picture."""
    return [[_weight(row, with_picture=i == 0) for i, row in enumerate(cell.weights)] for cell in heat_map.cells]


def _weight(row: LayerRow, *, with_picture: bool) -> dict[str, Any]:
    kept = {"name", "shape", "format", "bits_per_weight", "error", "error_rounded", "measured_on", "notes", "fallbacks"}
    values = row.model_dump(include=kept | ({"picture"} if with_picture else set()))
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}


@cache
def _environment() -> Any:
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files("bitpress.report").joinpath("templates")
    texts = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in TEMPLATES}
    environment = Environment(
        loader=DictLoader(texts), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters |= {
        "shown": shown,
        "kl": say_kl,
        "size": size,
        "duration": duration,
        "script_json": _script_json,
    }
    environment.globals["steps"] = STEPS
    return environment


def _script_json(value: Any) -> Any:
    """Return JSON that may stand inside a script element."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _render(template: str, values: Mapping[str, Any]) -> str:
    text: str = _environment().get_template(template).render(values)
    return text + "\n"
