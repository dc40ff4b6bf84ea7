"""Weights and inputs of products in few bits: what every scheme of benchmarks/schemes.yaml costs, with and without planted outliers.

    make bench Q=schemes                                        bitpress-tiny, and a copy of it with large channels behind norms
    python benchmarks/schemes.py --models smollm2-135m-regauged smollm2-135m-outliers --samples 128 --tokens 32768
    python benchmarks/schemes.py --models bitpress-tiny-mamba --only '*per token'          a Mamba: train it first (scripts/train_tiny.py)
    python benchmarks/schemes.py --only 'w4a4*'                 some of them
    python benchmarks/schemes.py --choose                       by calibration text: what the named schemes take is chosen so
    python benchmarks/schemes.py --render                       only the tables, from the rows there are

Products of rounded inputs are computed from the values that codes stand for (simulated). A row of benchmarks/results/schemes.jsonl is one
recipe on one model; a recipe that has a row with the same number of tokens is run again, and the table takes the last row. With --choose
every built-in calibration text is cut in the middle: the first halves calibrate, the second halves judge, and held-out text is not read.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from rows import ROOT, add_row, read_rows, rewrite_section
from safetensors.torch import load_file, save_file
from scheme_picture import Shown, draw_schemes

from bitpress.calibration.samples import builtin_texts
from bitpress.checkpoints.named import resolve_model
from bitpress.checkpoints.regauge import plant_outliers_
from bitpress.models.skeleton import build_config
from bitpress.settings import cache_directory

RECIPES = ROOT / "benchmarks" / "schemes.yaml"
PAGE = ROOT / "docs" / "activations.md"
PLANTED = "bitpress-tiny, outliers"
TRAINED = "bitpress-tiny-mamba"
ROTATION = "{rotation}"
SEED = 20261127
JUDGED = ("smollm2-135m-regauged", "smollm2-135m-outliers")
FAMILIES = ("w8a8", "w4a8", "w6a6", "w4a4", "fp8", "int4 x fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "original", "other")
IN_README = ("w8a8", "w4a8", "w4a4", "fp8", "mxfp4", "nvfp4")
# The recipe that a named scheme is.
SCHEME_ROWS = {
    "w8a8": "w8a8, smoothquant, per token",
    "w8a8-static": "w8a8, smoothquant, per tensor static",
    "w4a8": "w4a8, smoothquant, per token",
    "w6a6": "w6a6, smoothquant + hadamard, per token",
    "w4a4": "w4a4, smoothquant + hadamard, per token",
    "fp8": "fp8, per token",
    "mxfp4": "mxfp4, smoothquant + hadamard of 32",
    "nvfp4": "nvfp4, smoothquant",
}


def directory_of(model: str, out: Path) -> str:
    """Return what `bitpress compare` takes: a name, the directory of the copy with planted outliers, made first if needed, or that of the
    Mamba, which `scripts/train_tiny.py` has made."""
    if model == TRAINED:
        trained = cache_directory() / "trained" / model
        if not trained.exists():
            raise SystemExit(f"{model}: is not there; train it first: python scripts/train_tiny.py {model}")
        return str(trained)
    if model != PLANTED:
        return model
    source, target = resolve_model("bitpress-tiny"), out / "bitpress-tiny-outliers"
    if not target.exists():
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (target / file.name).write_bytes(file.read_bytes())
        (weights,) = source.glob("*.safetensors")
        state = load_file(weights)
        types = {name: value.dtype for name, value in state.items()}
        plant_outliers_(state, build_config(json.loads((source / "config.json").read_text())), seed=SEED)
        made = {name: value.to(types[name]).contiguous() for name, value in state.items()}
        save_file(made, target / weights.name, metadata={"format": "pt"})
    return str(target)


def cut_calibration_text(out: Path) -> list[str]:
    """Write both halves of every built-in calibration text, and return the options that calibrate on the first and judge by the second."""
    halves: tuple[list[str], list[str]] = ([], [])
    for text in builtin_texts("calibration").values():
        middle = text.index("\n", len(text) // 2)
        for half, part in zip(halves, (text[:middle], text[middle:]), strict=True):
            half.append(json.dumps({"text": part}) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    files = out / "calibration-first.jsonl", out / "calibration-second.jsonl"
    for file, lines in zip(files, halves, strict=True):
        file.write_text("".join(lines), encoding="utf-8")
    return ["--calibration", str(files[0]), "--text", f"calibration={files[1]}"]


def with_rotations(model: str, out: Path, options: argparse.Namespace) -> Path:
    """Return the recipes, those with {rotation} given the rotation that is learned of this model by their formats; it is learned once."""
    recipes: dict[str, Any] = yaml.safe_load(RECIPES.read_text(encoding="utf-8"))
    file, made = out / f"rotation-{options.samples}.safetensors", out / "recipes.yaml"
    wanted = [
        recipe
        for name, recipe in recipes.items()
        if ROTATION in json.dumps(recipe) and (not options.only or any(fnmatch(name, pattern) for pattern in options.only))
    ]
    out.mkdir(parents=True, exist_ok=True)
    if wanted and not file.exists():
        start = {**wanted[0], "transforms": ["rotate"]}
        del start["bits"]
        recipe = out / "rotation.yaml"
        recipe.write_text(yaml.safe_dump(start), encoding="utf-8")
        command = [sys.executable, "-m", "bitpress", "rotations", model, str(file), "--recipe", str(recipe)]
        calibration = cut_calibration_text(options.out)[:2] if options.choose else []  # the halves that judge stay unseen
        subprocess.run([*command, "--samples", str(options.samples), *calibration], check=True)
    text = json.dumps(recipes if file.exists() else {n: r for n, r in recipes.items() if ROTATION not in json.dumps(r)})
    made.write_text(text.replace(ROTATION, str(file)), encoding="utf-8")
    return made


def measure(model: str, options: argparse.Namespace) -> None:
    out = options.out / "".join(letter if letter.isalnum() else "-" for letter in f"{model}{' choice' * options.choose}")
    directory = directory_of(model, options.out)
    recipes = with_rotations(directory, out.with_name(f"{out.name}-rotation"), options)
    command = [sys.executable, "-m", "bitpress", "compare", directory, str(out), "--recipes", str(recipes)]
    command += ["--bits", "8,6,4,3,2", "--tokens", str(options.tokens), "--samples", str(options.samples), "--json"]
    command += [part for pattern in options.only for part in ("--only", pattern)]
    command += cut_calibration_text(options.out) if options.choose else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    for row in found["rows"]:
        if row["failed"]:
            print(f"{row['name']}: failed: {row['failed']}", file=sys.stderr)
        else:
            shared = {"model": model, "compute": found["compute"], "noise": found["floor"], "simulated": True}
            add_row("schemes", {**shared, "choice": options.choose, **row})


def render() -> None:
    """Write the tables of docs/activations.md and README.md, and docs/schemes.svg."""
    rows = [row for row in read_rows("schemes") if row["kind"] == "recipe"]
    _table("measured schemes", [row for row in rows if not row.get("choice")])
    _table("chosen schemes", [row for row in rows if row.get("choice")])
    last = {
        (row["model"], row["name"]): row for row in read_rows("schemes") if not row.get("choice") and row["model"] in JUDGED
    }
    shown = list(_shown(last))
    if shown:
        title = "Inputs and weights in few bits: KL from the original, nats a token"
        (ROOT / "docs" / "schemes.svg").write_text(draw_schemes(shown, title), encoding="utf-8")
        _readme(last)


def _table(section: str, rows: list[dict[str, Any]]) -> None:
    """Write one line a recipe, one column a model."""
    last = {(row["model"], row["name"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["", f"| weights and inputs | bits | {' | '.join(models)} |", f"|---|---|{'---|' * len(models)}"]
    for name in dict.fromkeys(row["name"] for row in rows):
        some = next(last[model, name] for model in models if (model, name) in last)
        cells = [f"{last[model, name]['kl_mean']:.2g}" if (model, name) in last else "" for model in models]
        lines.append(f"| {name} | {some['bits_per_weight']:.2f} | {' | '.join(cells)} |")
    rewrite_section(PAGE, section, [*lines, ""])


def _shown(last: Mapping[tuple[str, str], dict[str, Any]]) -> Iterator[Shown]:
    """Yield every recipe and package that was measured on SmolLM2, in the order of the schemes."""
    schemes: dict[str, str] = {}
    for _, name in last:
        row = next(last[model, name] for model in JUDGED if (model, name) in last)
        schemes[name] = _family(row["beside"] if row["kind"] == "peer" else name)
    for name, scheme in sorted(schemes.items(), key=lambda pair: FAMILIES.index(pair[1])):
        plain, outliers = (last.get((model, name)) for model in JUDGED)
        is_peer = (plain or outliers or {})["kind"] == "peer"
        yield Shown(scheme, name, is_peer, plain["kl_mean"] if plain else None, outliers["kl_mean"] if outliers else None)


def _family(name: str) -> str:
    return next((family for family in FAMILIES if name.startswith(family)), FAMILIES[-1])


def _pair(rows: list[dict[str, Any] | None]) -> str:
    return ", ".join(f"{row['kl_mean']:.4f}" if row else "-" for row in rows)


def _readme(last: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Write one line for each named scheme of README.md, with the best package beside it."""
    lines = [
        "| `--scheme` | bits of weights, stored | KL | KL, planted outliers | another package, the same two |",
        "|---|---|---|---|---|",
    ]
    for scheme in IN_README:
        name = SCHEME_ROWS[scheme]
        if not all((model, name) in last for model in JUDGED):
            continue
        own = [last[model, name] for model in JUDGED]
        peers = {n: [last.get((m, n)) for m in JUDGED] for (_, n), row in last.items() if row.get("beside") == scheme}
        best = min(peers.items(), key=lambda pair: sum(r["kl_mean"] for r in pair[1] if r), default=None)
        told = "-" if best is None else f"{best[0]}: {_pair(best[1])}"
        figures = [f"{row['kl_mean']:.4f}" for row in own]
        lines.append(f"| `{scheme}` | {own[0]['bits_per_weight']:.2f} | {' | '.join(figures)} | {told} |")
    rewrite_section(ROOT / "README.md", "schemes", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["bitpress-tiny", PLANTED])
    parser.add_argument("--only", nargs="*", default=[], help="names or patterns of recipes")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=8192, help="of every held-out text")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "schemes")
    parser.add_argument("--choose", action="store_true", help="by halves of the calibration text; held-out text is not read")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        for model in options.models:
            measure(model, options)
    render()


if __name__ == "__main__":
    main()
