"""Other packages' schemes of weights and inputs, judged as bitpress's own: the rows that benchmarks/schemes.py sets its own beside.

    make peers && make bench Q=schemes_peers                                  every scheme of every peer, on SmolLM2 with and without outliers
    python benchmarks/schemes_peers.py --only 'llm-compressor*' --models smollm2-135m-regauged

Each peer quantizes in a process and an environment of its own, on the calibration tokens that benchmarks/schemes.py draws, rounds inputs in
its own forward, and gives the states behind the last block for the held-out texts; the head, which no peer changes, is the original's. A
row of benchmarks/results/schemes.jsonl with kind "peer" is one of them on one model.
"""

import argparse
import datetime
import fnmatch
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ROOT, add_row
from safetensors.torch import load_file

from bitpress.checkpoints.named import resolve_model
from bitpress.comparison.run import HELDOUT
from bitpress.measure.evaluation_text import EvaluationText, distances
from bitpress.measure.samples import draw_calibration
from bitpress.models.opening import open_original
from bitpress.models.tasks.causal_lm import draw_windows
from bitpress.models.walk import walk
from bitpress.recipes import Calibration
from bitpress.settings import cache_directory

LENGTH = 512
# Name of the row: the environment in .peers, the script in benchmarks/peers, its scheme, and the scheme of bitpress that it stands beside.
PEERS = {
    "llm-compressor W8A8, SmoothQuant and GPTQ": ("llmcompressor", "llmcompressor_schemes.py", "w8a8", "w8a8"),
    "llm-compressor FP8_DYNAMIC": ("llmcompressor", "llmcompressor_schemes.py", "fp8", "fp8"),
    "llm-compressor FP8": ("llmcompressor", "llmcompressor_schemes.py", "fp8-static", "fp8-static"),
    "llm-compressor NVFP4": ("llmcompressor", "llmcompressor_schemes.py", "nvfp4", "nvfp4"),
    "llm-compressor MXFP4": ("llmcompressor", "llmcompressor_schemes.py", "mxfp4", "mxfp4"),
    "torchao int8 dynamic": ("golden", "torchao_schemes.py", "int8-dynamic", "w8a8"),
    "auto-round MXFP4, no steps": ("llmcompressor", "autoround_schemes.py", "mxfp4-rtn", "mxfp4"),
    "auto-round NVFP4, no steps": ("llmcompressor", "autoround_schemes.py", "nvfp4-rtn", "nvfp4"),
}


class Judge:
    """One model, its calibration tokens and held-out texts, and the states that its original gives for these."""

    def __init__(self, name: str, samples: int, tokens: int) -> None:
        self.name, self.path = name, resolve_model(name)
        self.model, _ = open_original(self.path, torch.float32)
        calibration = Calibration(inputs="original", samples=samples)
        self.windows = draw_calibration(calibration, self.model.task, self.path, self.model.model.config)
        self.calibration = calibration
        drawn = {n: draw_windows(t, self.path, samples=tokens // LENGTH, length=LENGTH, seed=0) for n, t in HELDOUT.items()}
        self.texts = {n: windows.inputs for n, windows in drawn.items()}
        self.model.load_outer_()
        heldout = EvaluationText(self.model, self.texts)
        heldout.start_()
        walk(self.model, [heldout])
        self.states = heldout.states

    def figures(self, states: dict[str, torch.Tensor]) -> dict[str, Any]:
        found = distances((self.model, self.states), (self.model, states), self.texts)
        return {"kl_mean": math.fsum(f["kl_mean"] for f in found.values()) / len(found), "texts": found}


def run(peer: str, judge: Judge, folder: Path) -> dict[str, Any]:
    """Run a peer; return its facts, with its states in FOLDER/states.safetensors. Raises RuntimeError."""
    environment, script, scheme, _ = PEERS[peer]
    python = ROOT / ".peers" / environment / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{python} is not here; run make peers.")
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", judge.windows.inputs.numpy())
    texts: dict[str, Any] = {name: tokens.numpy() for name, tokens in judge.texts.items()}
    np.savez(folder / "texts.npz", **texts)
    command = [str(python), str(ROOT / "benchmarks" / "peers" / script), "--model", str(judge.path), "--scheme", scheme]
    command += ["--tokens", str(folder / "tokens.npy"), "--texts", str(folder / "texts.npz")]
    command += ["--out", str(folder / "states.safetensors")]
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False, env=variables, cwd=folder)
    if done.returncode:
        last = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"exit {done.returncode}: {' '.join(last)}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def row_of(peer: str, judge: Judge, facts: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "peer",
        "name": peer,
        "beside": PEERS[peer][3],
        "model": judge.name,
        "compute": "fp32",
        "recipe": {"calibration": judge.calibration.model_dump()},
        "calibration": judge.windows.sha256,
        "package": facts["tool"],
        "version": facts["version"],
        "settings": {key: facts[key] for key in ("scheme", "torch", "transformers")},
        **figures,
        "seconds_pressing": facts["seconds"],
        "seconds_pressing_cpu": facts["cpu_seconds"],
        "peak_memory_bytes": round(facts["peak_rss_mb"] * 2**20),
        "threads": facts["threads"],
        "load": facts["load"],
        "simulated": True,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="names or patterns of peers")
    parser.add_argument("--models", nargs="*", default=["smollm2-135m-regauged", "smollm2-135m-outliers"])
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=8192, help="of every held-out text")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "schemes_peers")
    options = parser.parse_args()
    wanted = [name for name in PEERS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    failed = 0
    for model in options.models:
        judge = Judge(model, options.samples, options.tokens)
        for peer in wanted:
            folder = options.out / "".join(letter if letter.isalnum() else "-" for letter in f"{model} {peer}")
            try:
                facts = run(peer, judge, folder)
                figures = judge.figures(load_file(folder / "states.safetensors"))
            except (RuntimeError, ValueError) as error:
                failed += 1
                print(f"{peer}, {model}: failed: {error}", file=sys.stderr, flush=True)
                continue
            row = add_row("schemes", row_of(peer, judge, facts, figures))
            shutil.rmtree(folder)
            print(f"{peer}, {model}: KL {row['kl_mean']:.5f}; {row['seconds_pressing']} s", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
