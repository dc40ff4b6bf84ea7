"""Files for llama.cpp, judged by llama.cpp: those of bitpress beside those of llama.cpp's own quantizer, every tensor of the same type.

    make peers && make bench Q=exchange
    python benchmarks/exchange.py --types IQ4_NL --only 'awq*'     some of llama.cpp's types, some recipes of benchmarks/exchange.yaml

llama.cpp's quantizer gets an importance matrix (the mean square of every linear's inputs over the calibration tokens). Its file says
which type each tensor has; a recipe then gets these types weight for weight, so both files have as many bytes. `bitpress quantize --for
llama.cpp` writes ours. benchmarks/peers/gguf_distance.py runs them beside the original in bf16, all in llama.cpp, on held-out text. A row of
benchmarks/results/exchange.jsonl is one file.
"""

import argparse
import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rows import ROOT, add_row, read_rows, rewrite_section
from transformers import AutoModelForCausalLM

from bitpress.checkpoints.named import resolve_model
from bitpress.comparison.run import HELDOUT
from bitpress.exchange.gguf_names import ARCHITECTURES
from bitpress.models.tasks.causal_lm import draw_windows
from bitpress.settings import cache_directory

MODEL = "smollm2-135m-regauged"
PEER = ROOT / ".peers" / "llamacpp" / "bin" / "python"
PEERS = ROOT / "benchmarks" / "peers"
RECIPES = ROOT / "benchmarks" / "exchange.yaml"
PAGE = ROOT / "docs" / "exchange.md"
SAMPLES, LENGTH = 128, 512


def peer(script: str, *words: object) -> list[dict[str, Any]]:
    """Run a script in llama.cpp's environment; return its JSON lines."""
    if not PEER.exists():
        raise SystemExit(f"{PEER} is not here; run make peers.")
    command = [str(PEER), str(PEERS / script), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@torch.inference_mode()
def write_importance(model: Path, out: Path) -> None:
    """Write the mean square of the inputs of every linear over the calibration tokens."""
    if out.exists():
        return
    opened: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def seen(name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    for name, module in opened.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(seen(f"{name}.weight"))
    windows = draw_windows("builtin", model, samples=SAMPLES, length=LENGTH, seed=0).inputs
    for batch in windows.split(4):
        opened.model(batch, use_cache=False)
    count = windows.numel()
    partial = out.with_suffix(".part.npz")
    squares: dict[str, Any] = {name: (total / count).float().numpy() for name, total in sums.items()}
    np.savez(partial, **squares)
    partial.rename(out)


def formats_of(types: dict[str, str]) -> dict[str, str]:
    """Return the type of every linear of a file by transformers' name, as bitpress's formats spell it."""
    names = {tensor: ARCHITECTURES["llama"].ours(tensor) for tensor in types}
    return {name.removesuffix(".weight"): types[tensor].lower() for tensor, name in names.items() if name and "_proj" in name}


def recipe_of(name: str, types: dict[str, str]) -> dict[str, Any]:
    """Return a recipe with a file's types weight for weight."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPES.read_text(encoding="utf-8"))[name]
    found = formats_of(types)
    usual = max(sorted(set(found.values())), key=list(found.values()).count)
    others = [{"match": stem, "weights": kind} for stem, kind in found.items() if kind != usual]
    calibration = {"samples": SAMPLES, "length": LENGTH, **recipe.get("calibration", {})}
    return {**recipe, "weights": usual, "overrides": others, "calibration": calibration}


def quantize(folder: Path, name: str, kind: str, types: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """Write a model for llama.cpp by a recipe; return the file, and the report."""
    safe = "".join(letter if letter.isalnum() else "-" for letter in f"{kind} {name}")
    recipe, out = folder / f"{safe}.yaml", folder / safe
    recipe.write_text(yaml.safe_dump(recipe_of(name, types)), encoding="utf-8")
    table = {"Q8_0": "q8_0", "Q6_K": "q6_k"}[types["token_embd.weight"]]
    command = [sys.executable, "-m", "bitpress", "quantize", MODEL, str(out), "--recipe", str(recipe), "--for", "llama.cpp"]
    command += ["--embeddings", table, "--proof-tokens", "0", "--json"]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return out / "model.gguf", report


def add(shared: dict[str, Any], facts: dict[str, Any], **more: Any) -> None:
    told = {
        key: value for key, value in facts.items() if key in ("bytes", "texts", "version", "bits_per_linear_weight", "tensors")
    }
    kl = [text["kl_mean"] for text in facts["texts"].values()]
    add_row("exchange", {**shared, **more, **told, "kl_mean": sum(kl) / len(kl)})


def render() -> None:
    """Write the table of docs/exchange.md from the last row of every file."""
    rows = {(row["type"], row["name"]): row for row in read_rows("exchange") if row["runtime"] == "llama.cpp"}
    if not rows:
        return
    lines = [
        "",
        "## Files for llama.cpp, judged by llama.cpp",
        "",
        "`make peers && make bench Q=exchange`: SmolLM2 re-gauged. llama.cpp's own quantizer has an importance matrix of the calibration text; a",
        "recipe of bitpress gets the types of its file tensor by tensor, so both files are as large. Distances are those of llama.cpp's logits from",
        "its logits of the original in bf16, in nats a token, on text that calibration has not seen.",
        "",
    ]
    lines += ["| types of | written by | bits a weight | file, MB | KL, speeches | KL, reference | same next token |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in sorted(rows.values(), key=lambda row: (row["bits_per_linear_weight"], row["type"], -row["kl_mean"])):
        texts = row["texts"]
        agreement = sum(text["top1_agreement"] for text in texts.values()) / len(texts)
        lines.append(
            f"| {row['type']} | {row['name']} | {row['bits_per_linear_weight']:.2f} | {row['bytes'] / 1e6:.1f} | "
            f"{texts['speeches']['kl_mean']:.4f} | {texts['reference']['kl_mean']:.4f} | {agreement:.3f} |"
        )
    rewrite_section(PAGE, "files for llama.cpp", [*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", default=["Q4_0", "IQ4_NL", "Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--only", nargs="*", default=["*"], help="names or patterns of recipes")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, of every held-out text")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "exchange")
    parser.add_argument("--render", action="store_true", help="only the table, from the rows there are")
    options = parser.parse_args()
    if options.render:
        render()
        return
    model, folder = resolve_model(MODEL), options.out
    (folder / "theirs").mkdir(parents=True, exist_ok=True)
    write_importance(model, folder / "importance.npz")
    texts = []
    for name, text in HELDOUT.items():
        windows = draw_windows(text, model, samples=options.windows, length=LENGTH, seed=0).inputs
        texts.append(folder / f"{name}.npy")
        np.save(texts[-1], windows.numpy())
    words = ("--types", *options.types, "--importance", folder / "importance.npz")
    original, *theirs = peer("gguf_models.py", model, folder / "theirs", *words)
    names = [name for name in yaml.safe_load(RECIPES.read_text()) if any(fnmatch(name, pattern) for pattern in options.only)]
    for kind, facts in zip(options.types, theirs, strict=True):
        ours = {name: quantize(folder, name, kind, facts["types"]) for name in names}
        files = [facts["file"], *(path for path, _ in ours.values())]
        judged = peer("gguf_distance.py", original["file"], *files, "--tokens", *texts)
        shared = {"model": MODEL, "type": kind, "runtime": "llama.cpp"}
        told = {"bits_per_linear_weight": facts["bits_per_linear_weight"], "tensors": facts["tensors"]}
        add(shared, {**told, **judged[0]}, name="llama.cpp, imatrix", tool="llama.cpp")
        for (name, (_, report)), found in zip(ours.items(), judged[1:], strict=True):
            seconds = report["run"]["seconds_pressing"]
            add(shared, {**told, **found}, name=name, tool="bitpress", recipe=report["recipe"], seconds_pressing=seconds)
    render()


if __name__ == "__main__":
    main()
