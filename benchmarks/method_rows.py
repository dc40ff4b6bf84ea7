"""The measured rows of methods: the newest of every recipe, and what its recipe means today. For the bench, its tables and the presets."""

from typing import Any

from rows import ROOT, read_rows

from bitpress.pipeline.identity import recorded
from bitpress.recipes import build_method, make_recipe

__all__ = [
    "BEYOND",
    "MODEL",
    "RECIPES",
    "chooses_bits",
    "keys_of",
    "knows_the_texts",
    "latest",
    "meant",
    "on_gpu",
    "processor_seconds",
    "seconds",
]

MODEL = "smollm2-135m-regauged"
RECIPES = ROOT / "benchmarks" / "methods.yaml"
# Stored bits a preset may have beyond its name's: scales and zero points of groups of 64 are 0.31.
BEYOND = 0.5


def latest(kind: str = "recipe") -> list[dict[str, Any]]:
    """Return the newest row of every recipe (or peer) and width, of those that saw the same model and texts as the newest recipe."""

    def seen(row: dict[str, Any]) -> tuple[Any, ...]:
        calibration = row["recipe"]["calibration"]
        return row["model"], row["sources"], calibration["samples"], calibration["length"]

    rows = [row for row in read_rows("methods") if row["kind"] in ("recipe", "peer")]
    newest = next((row for row in reversed(rows) if row["kind"] == "recipe"), None)
    if newest is None:
        return []
    return list({(r["name"], r["bits"]): r for r in rows if r["kind"] == kind and seen(r) == seen(newest)}.values())


def meant(row: dict[str, Any]) -> dict[str, Any]:
    """Return the method of a row's recipe with the settings that have come since, as they are by default."""
    return keys_of(recorded(build_method(make_recipe(keys_of(row["recipe"])))))


def keys_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what of a recipe is the method's own."""
    own = ("weights", "transforms", "quantizer", "corrections", "tuning", "inputs", "budget")
    found = {key: recipe[key] for key in own if key in recipe}
    calibration = {key: value for key, value in recipe["calibration"].items() if key in ("inputs", "sequential")}
    return {**found, "calibration": calibration}


def knows_the_texts(row: dict[str, Any]) -> bool:
    """Whether the bits of a recipe's layers were chosen for this model, on a part of the evaluation texts."""
    return bool(row["recipe"].get("overrides"))


def chooses_bits(row: dict[str, Any]) -> bool:
    """Whether weights of a recipe have formats of their own: chosen by a budget, or by hand."""
    return knows_the_texts(row) or "budget" in row["recipe"]


def on_gpu(row: dict[str, Any]) -> bool:
    """Whether a GPU computed the row's blocks, so that its processor seconds say little."""
    return "peak_device_bytes" in row


def processor_seconds(row: dict[str, Any]) -> float:
    """Return the processor seconds of quantizing; for a row without them, the seconds times the threads."""
    return float(row.get("seconds_pressing_cpu") or row["seconds_pressing"] * row["threads"])


def seconds(row: dict[str, Any]) -> float:
    """Return the seconds of quantizing on 2 cores, if two are twice as fast as one."""
    return processor_seconds(row) / 2
