"""What embeddings and output head in few bits cost: KL divergence from the original and bytes of the file, by format.

    python benchmarks/outer.py DIR MODEL [--formats int8-row,int6-g64,...] [--quantizers rtn,gptq]

DIR was made from MODEL by `bitpress quantize` and has embeddings and head as stored; here they are compressed beside its blocks, which stay
as they are. `choice`: calibration text that no statistic of this script has seen, by which a format is chosen; `heldout`: the text that
judges it. One row a format and quantizer, and one (`as stored`) without.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import add_row

import bitpress
from bitpress.calibration import Capture, Observed, Stats
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.named import resolve_model
from bitpress.models.linears import find_outer
from bitpress.models.opening import open_original
from bitpress.models.tasks.causal_lm import draw_windows
from bitpress.pipeline.outer_weights import compress_outer, plan_outer
from bitpress.recipes import make_method

FORMATS = "int8-row,int8-g64,int6-g64,int5-g64,int4-g64-zero,int4-g32-zero"


def logits_of(model: Any, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(window[None]).logits[0] for window in windows])


def divergence(reference: torch.Tensor, model: Any, windows: torch.Tensor) -> float:
    """Return the mean KL divergence of all tokens, in nats."""
    total, at = 0.0, 0
    for window in windows:
        p = reference[at : at + len(window)].log_softmax(-1)
        q = logits_of(model, window[None]).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        at += len(window)
    return total / at


def measure_head(model: Any, windows: torch.Tensor) -> Stats:
    """Return the statistics of the head's input."""
    head = model.get_output_embeddings().weight
    capture = Capture([Observed("head", head, True, False)], {"gram"})
    for window in windows:
        capture.run(partial(logits_of, model, window[None]), whole=False)
    return capture.finish()["head"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--quantizers", default="rtn,gptq")
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text for the head's statistics")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text that judges")
    options = parser.parse_args()
    path = resolve_model(options.model)
    checkpoint = CompressedCheckpoint.open(options.directory)
    texts = {
        name: draw_windows(text, path, samples=options.windows, length=512, seed=seed).inputs
        for name, text, seed in (("choice", "builtin", 1), ("heldout", "builtin:heldout", 0))
    }
    original = load_original(path)
    reference = {name: logits_of(original, windows) for name, windows in texts.items()}
    del original
    model = bitpress.load(options.directory, dtype="fp32")
    stats = measure_head(model, draw_windows("builtin", path, samples=options.samples, length=512, seed=0).inputs)
    streamed, loader = open_original(path, torch.float32)
    table = find_outer(streamed.model).embeddings
    assert table is not None, "a model with a table of embeddings"
    stored = loader.load("", exclude=f"{streamed.stack}.")[table.name]

    def note(what: str, quantizer: str | None, nbytes: int, values: torch.Tensor) -> None:
        model.get_input_embeddings().weight.data = values.float()
        model.tie_weights(recompute_mapping=False)
        row = {
            "model": options.model,
            "weights": str(checkpoint.manifest.recipe["weights"]),
            "outer": what,
            "quantizer": quantizer,
            "bytes_outer": nbytes,
            "bytes": checkpoint.nbytes - stored.nbytes + nbytes,
            "tokens": texts["heldout"].numel(),
            "kl": {name: round(divergence(reference[name], model, windows), 5) for name, windows in texts.items()},
        }
        print(row["outer"], row["quantizer"], row["bytes"], row["kl"], time.strftime("%H:%M:%S"), flush=True)
        add_row("outer", row)

    note("as stored", None, stored.nbytes, stored)
    for name in options.formats.split(","):
        for quantizer in options.quantizers.split(","):
            settings = {"name": "rtn", "clip": "mse"} if quantizer == "rtn" else {"name": quantizer}
            key = {"weights": name, "quantizer": settings}
            (found,) = plan_outer(streamed, make_method({"weights": "int4-g64-zero", "head": key}))
            seen = Stats(stats.tokens, gram=stats.gram) if found.method.needs else None
            made, decoded = compress_outer(found, stored, seen)
            note(name, quantizer, made.parameters[table.name].weight.nbytes, decoded)


def load_original(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


if __name__ == "__main__":
    main()
