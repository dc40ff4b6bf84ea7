"""The presets of `bitpress quantize`: for every preset and width the best measured recipe that its rule allows."""

import json
from typing import Any

import torch
from method_rows import BEYOND, chooses_bits, keys_of, latest, on_gpu, seconds
from rows import ROOT

from bitpress.calibration import Stats
from bitpress.formats import parse_format
from bitpress.kernels.native_layout import reason_to_expand
from bitpress.pipeline.compose import compress_matrix
from bitpress.recipes import LayerMethod, Named, build_method, make_recipe

__all__ = ["choose_presets"]

PRESETS = ROOT / "src" / "bitpress" / "presets.json"
# Seconds on 2 cores that "balanced" may take for the bench's model.
BALANCED = 180
RULES = {
    "fast": "The recipe with the least KL of those that need no calibration",
    "balanced": f"The recipe with the least KL of those that quantize the bench's model in at most {BALANCED} seconds on 2 cores",
    "best": "The recipe with the least KL",
}
SHARED_RULE = (
    f"Recipes count if they store at most {BEYOND} bits a weight beyond the codes, in layouts that the native engine reads directly, "
    "with no bits chosen layer by layer"
)


def choose_presets() -> None:
    """Write src/bitpress/presets.json."""
    on_processor = [
        row for row in latest() if row["bits"] is not None and not on_gpu(row)
    ]  # their times are what presets promise
    rows = [row for row in on_processor if not chooses_bits(row) and not reason_to_expand_of(row)]
    some = rows[0]
    samples, texts = some["recipe"]["calibration"], some["sources"]
    read = " and ".join(f"{text['tokens']:,} held-out tokens of {name}" for name, text in texts.items())
    bench = f"{some['model']}, calibrated on {samples['samples']} windows of {samples['length']} built-in tokens; KL on {read}"
    choices: dict[str, dict[str, Any]] = {name: {} for name in RULES}
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        fit = sorted(
            (r for r in rows if r["bits"] == bits and r["bits_per_weight"] <= bits + BEYOND), key=lambda r: r["kl_mean"]
        )
        allowed = {
            "fast": [row for row in fit if row["calibration"] is None],
            "balanced": [row for row in fit if seconds(row) <= BALANCED],
            "best": fit,
        }
        for name, those in allowed.items():
            if those:
                choices[name][str(bits)] = {
                    "recipe": keys_of(those[0]["recipe"]),
                    "chosen": figures(those[0]),
                    "others": [figures(row) for row in those[1:6]],
                }
    rules = {name: f"{rule}. {SHARED_RULE}" for name, rule in RULES.items()}
    table = {"bench": bench, "rules": rules, "choices": choices}
    PRESETS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def reason_to_expand_of(row: dict[str, Any]) -> str | None:
    """Say what of a recipe's weights the native engine would decode to 16 bits, by trying a small one."""
    recipe = make_recipe(keys_of(row["recipe"]))
    method = build_method(recipe)
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 768, generator=generator), torch.randn(512, 768, generator=generator)
    gram, heads = x.T @ x / 512, 4
    stats = Stats(
        512,
        gram=gram,
        mean_abs=x.abs().mean(0),
        cross=gram,
        attention_gram=gram,
        row_gram=torch.eye(64 // heads).expand(heads, -1, -1),
        head_gram=gram.expand(heads, -1, -1),
        sensitivity=torch.rand(w.shape, generator=generator),
    )
    made = compress_matrix(
        w,
        stats,
        LayerMethod(
            parse_format(recipe.weights),
            Named("quantizer", "", method.quantizer.part),
            changes=tuple(p.part for p in method.changes),
            corrections=tuple(p.part for p in method.corrections),
            targets=tuple(p.part for p in method.of("target")),
        ),
    )
    return reason_to_expand(made.weight)


def figures(row: dict[str, Any]) -> dict[str, Any]:
    kl = {name: round(text["kl_mean"], 5) for name, text in row["texts"].items()}
    return {"name": row["name"], "bits": round(row["bits_per_weight"], 4), "kl": kl, "seconds": round(seconds(row))}
