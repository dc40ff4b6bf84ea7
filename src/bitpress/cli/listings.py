"""Lists of what there is: methods, number formats, named models, presets. None of these needs a model or the pipeline."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.markup import escape

from bitpress.cli.screen import out, size, table
from bitpress.presets import Preset

__all__ = ["describe_methods", "show_formats", "show_method", "show_methods", "show_models", "show_preset"]


def describe_methods() -> list[dict[str, Any]]:
    """List every table: name, kind, what it does, its paper, the statistics it needs, its settings.

    `bits`, the least and the most that a method is meant for, are a quantizer's; so are the transforms that its paper puts before it.
    A transform's row says by `works_on` whether it changes the "network" as a whole or the operands of "attention", scales "groups" of weights that share an input, or
    changes the basis of "weights" or the "targets" that their codes aim at. A tuning's row lists patterns of the formats that it `serves`.
    """
    from bitpress.calibration.observers import OBSERVERS
    from bitpress.corrections.table import BIAS_CORRECTIONS, CORRECTIONS, OFFSET_CORRECTIONS
    from bitpress.quantizers.table import QUANTIZERS
    from bitpress.recipes.schemes import SCHEMES
    from bitpress.transforms.table import (
        ATTENTION_CHANGES,
        BASIS_CHANGES,
        CHANNEL_CHANGES,
        NETWORK_CHANGES,
        TARGETS,
        TRANSFORMS,
    )
    from bitpress.tuning.table import TUNINGS

    rows = []
    tables: dict[str, Mapping[str, Any]] = {
        "quantizer": QUANTIZERS,
        "transform": TRANSFORMS,
        "correction": {**CORRECTIONS, **BIAS_CORRECTIONS, **OFFSET_CORRECTIONS},
    }
    for kind, methods in tables.items():
        for name, method in methods.items():
            settings = {f.name: f.default for f in dataclasses.fields(method)}
            row = {"name": name, "kind": kind, "summary": method.summary, "needs": sorted(method.needs), "settings": settings}
            row |= {"paper": method.paper, "bits": list(method.bits) if kind == "quantizer" else None}
            if kind == "quantizer":
                row["transforms"] = [{"name": part} if isinstance(part, str) else dict(part) for part in method.transforms]
            if kind == "transform":
                on: dict[str, Mapping[str, Any]] = {
                    "network": NETWORK_CHANGES,
                    "attention": ATTENTION_CHANGES,
                    "inputs": CHANNEL_CHANGES,
                    "weights": BASIS_CHANGES,
                    "targets": TARGETS,
                }
                row["works_on"] = next((what for what, table in on.items() if name in table), "groups")
            rows.append(row)
    for name, tuning in TUNINGS.items():
        settings = {f.name: f.default for f in dataclasses.fields(tuning)}
        row = {"name": name, "kind": "tuning", "summary": tuning.summary, "needs": ["gram"], "settings": settings}
        rows.append({**row, "paper": tuning.paper, "bits": None, "serves": list(tuning.serves)})
    for name, observer in OBSERVERS.items():
        settings = {f.name: f.default for f in dataclasses.fields(observer)}  # type: ignore[arg-type]
        row = {"name": name, "kind": "observer", "summary": observer.summary, "needs": [], "settings": settings}
        rows.append({**row, "paper": observer.source, "bits": None})
    rows += _describe_choices()
    for name, scheme in SCHEMES.items():
        row = {"name": name, "kind": "scheme", "summary": scheme.summary, "needs": [], "settings": dict(scheme.keys)}
        rows.append({**row, "paper": scheme.source, "bits": None})
    return rows


def _describe_choices() -> list[dict[str, Any]]:
    from bitpress.allocation.choices import CHOICES

    rows = []
    for name, choice in CHOICES.items():
        settings = {f.name: f.default for f in dataclasses.fields(choice)}
        row = {"name": name, "kind": "choice", "summary": choice.summary, "needs": sorted(choice.needs), "settings": settings}
        rows.append({**row, "paper": choice.paper, "bits": None})
    return rows


def show_methods(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each method, with needs, paper and settings on a wide screen."""
    wide = out.width >= 140
    lines = []
    for row in rows:
        settings = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
        more = (", ".join(row["needs"]) or "-", row["paper"], settings) if wide else ()
        lines.append((row["name"], row["kind"], _bits_of(row), row["summary"], *more))
    table("", ("name", "kind", "bits", "what it does", *(("needs", "paper", "settings") if wide else ())), lines)
    out.print("bits: of the codes, a weight, that a quantizer is meant for. `bitpress methods NAME` shows the settings of one.")


def show_method(row: Mapping[str, Any]) -> None:
    """Print one method in full."""
    facts = {
        "what it does": row["summary"],
        "bits it is meant for": _bits_of(row),
        "statistics it needs": ", ".join(row["needs"]) or "none",
        "paper": f"{row['paper']} (its row in the catalogue of methods)",
    }
    if row.get("transforms"):
        facts["transforms before it"] = ", ".join(part["name"] for part in row["transforms"])
    out.print(f"[bold]{row['name']}[/bold], a {row['kind']}")
    table("", ("", ""), list(facts.items()))
    if row["settings"]:
        table("\nSettings", ("name", "usual value"), [(k, escape(str(v))) for k, v in row["settings"].items()])


def _bits_of(row: Mapping[str, Any]) -> str:
    return "{:g}-{:g}".format(*row["bits"]) if row["bits"] else "-"


def show_formats(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print every table that a part of a format's name comes from."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    lines: list[tuple[str, ...]]
    lines = [(r["usual"], f"{r['bits_per_weight']:.3f}", str(r["levels"]), str(r["span"]), r["about"]) for r in kinds["grid"]]
    table("", ("grid, in its usual format", "bits", "codes", "span", "what it is"), lines, right=(1, 2, 3))
    out.print("bits: everything stored for a weight of 4096 x 4096; codes: how many; span: weights that share one.")
    lines = [(escape(r["name"]), r["about"]) for r in kinds["family"]]
    table("\nFamilies without a row for each member", ("pattern", "what it is"), lines)
    lines = [(r["name"], f"{r['bits_per_scale']:.2f}", "yes" if r["rows_apart"] else "no", r["about"]) for r in kinds["scale"]]
    table("\nFormats of scales", ("name", "bits a scale", "rows apart", "what it is"), lines, right=(1,))
    fits = {r["name"]: [g["usual"].split("-")[0] for g in kinds["grid"] if r["name"] in g["layouts"]] for r in kinds["layout"]}
    lines = [(r["name"], f"{len(fits[r['name']])} of {len(kinds['grid'])} grids", r["about"]) for r in kinds["layout"]]
    table("\nLayouts of codes", ("name", "takes", "what it is"), lines)
    lines = [(r["name"], f"about {r['bits_per_weight']:.2f}", r["about"]) for r in kinds["lossless"]]
    table("\nLossless", ("name", "bits", "what it is"), lines, right=(1,))
    lines = [(r["name"], r["format"], f"{r['bits_per_weight']:.3f}") for r in kinds["short"]]
    table("\nShort names", ("name", "stands for", "bits"), lines, right=(2,))
    out.print("\nA name is grid-block[-zero][-scale][-layout]; blocks are gN, row, tensor and RxC.")


def show_models(rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [
        (
            str(r["name"]),
            str(r["what"]),
            f"{r['parameters']:,}",
            "yes" if r["cached"] else f"no, {size(r['bytes_to_fetch'])} to fetch",
        )
        for r in rows
    ]
    table("", ("name", "what", "parameters", "here already"), lines, right=(2,))


def show_preset(preset: Preset) -> None:
    """Print a preset's recipe, its figures, and the recipes that measured worse."""
    out.print(f"[bold]{preset.name}, {preset.bits} bits:[/bold] {escape(preset.chosen.name)}")
    out.print(f"rule: {escape(preset.rule)}.")
    out.print(f"measured on: {escape(preset.bench)}")
    table(
        "\nChosen, and the nearest others",
        ("recipe", "stored bits", *(f"KL, {text}" for text in preset.chosen.kl), "seconds"),
        [
            (figures.name, f"{figures.bits:.3f}", *(f"{kl:.4f}" for kl in figures.kl.values()), f"{figures.seconds:.0f}")
            for figures in (preset.chosen, *preset.others)
        ],
        right=range(1, 3 + len(preset.chosen.kl)),
    )
    out.print(
        "[dim]seconds: half of the processor seconds that quantizing took, as on 2 cores; docs/methods-results.md has the whole.[/dim]"
    )
    out.print("\nAs a recipe file:")
    out.print(yaml.safe_dump(dict(preset.recipe), sort_keys=False, default_flow_style=None).rstrip(), markup=False)
