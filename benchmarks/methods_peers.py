"""Other packages on the bench of methods: their weights, decoded by themselves, judged as bitpress's own.

    make peers && make bench Q=methods_peers                     every peer at its widths; what has a row is not run again
    python benchmarks/methods_peers.py --only 'llama.cpp*' hqq   some of them
    python benchmarks/methods_peers.py --again --only hqq

Every peer presses the re-gauged SmolLM2 in a process and an environment of its own, on the calibration tokens that
benchmarks/methods.py draws, and writes its linears decoded; they take the place of the originals and go through the code that judges
recipes. Weights are kept until they have their row, so that a stop costs no pressing that was finished. A row of benchmarks/results/methods.jsonl with kind "peer" is one of them at one width. Bits are of the bytes that the peer
itself stores for these weights. The original's states are kept in a directory of their own.
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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import ROOT, add_row, read_rows

from bitpress.arithmetic import has_fast_bf16
from bitpress.checkpoints.named import resolve_model
from bitpress.checkpoints.safetensors_file import read_header, read_tensor
from bitpress.comparison.run import HELDOUT
from bitpress.comparison.statistics_cache import StatisticsCache, capture_original
from bitpress.errors import NumericsError
from bitpress.measure.evaluation_text import EvaluationText, distances
from bitpress.measure.noise_floor import measure_noise
from bitpress.measure.samples import draw_calibration
from bitpress.models.opening import open_original
from bitpress.models.tasks.causal_lm import draw_windows
from bitpress.models.walk import LoadedBlock, walk
from bitpress.pipeline.identity import versions
from bitpress.progress import Silent
from bitpress.quantizers.quantizer import output_errors
from bitpress.recipes import Calibration, Recipe
from bitpress.settings import cache_directory

MODEL = "smollm2-135m-regauged"
TOKENS, LENGTH = 32768, 512


@dataclass(frozen=True)
class Peer:
    """One package and method.

    environment  the folder of .peers whose Python runs it
    script       in benchmarks/peers
    options      what the script is told; "{bits}" stands for the width, "{compute}" for bf16 where that is fast and fp32 elsewhere
    weights      how it stores them, in a word
    widths       None alone: the peer has no widths; its row is of the whole bits that its bytes come to
    inputs       whose inputs it calibrates on, the original's or those the pressed blocks give; None: it reads no text
    """

    environment: str
    script: str
    options: str
    weights: str
    widths: tuple[int | None, ...] = (4, 3, 2)
    inputs: str | None = None


def gguf(kind: str, *, weighted: bool) -> Peer:
    options = f"--type {kind}" + (" --importance {importance}" if weighted else "")
    return Peer("llamacpp", "gguf_weights.py", options, kind, (None,), "original" if weighted else None)


PEERS: dict[str, Peer] = {
    "hqq (hqq)": Peer("golden", "hqq_weights.py", "--bits {bits}", "int{bits}-g64, hqq"),
    "nf4 (bitsandbytes)": Peer("golden", "bitsandbytes_nf4.py", "", "nf4-g64, fp32 scales", (4,)),
    "nf4 double (bitsandbytes)": Peer("golden", "bitsandbytes_nf4.py", "--double", "nf4-g64, 8-bit scales", (4,)),
    **{f"llama.cpp {kind}": gguf(kind, weighted=False) for kind in ("Q4_0", "IQ4_NL", "Q4_K_M", "Q3_K_M", "Q2_K")},
    **{
        f"llama.cpp {kind}, imatrix": gguf(kind, weighted=True)
        for kind in ("Q4_0", "IQ4_NL", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ3_S", "IQ2_S")
    },
    "gptq (llm-compressor)": Peer(
        "llmcompressor", "llmcompressor_gptq.py", "--bits {bits}", "int{bits}-g64-zero", inputs="pressed"
    ),
    "awq (llm-compressor)": Peer(
        "llmcompressor", "llmcompressor_awq.py", "--bits {bits} --samples 32", "int{bits}-g64-zero", inputs="original"
    ),
    "auto-round": Peer(
        "llmcompressor", "autoround_weights.py", "--bits {bits} --compute {compute}", "int{bits}-g64-zero", inputs="pressed"
    ),
}


class Bench:
    """The model, the texts, and what passes over the original have left."""

    def __init__(self, out: Path) -> None:
        self.path = resolve_model(MODEL)
        self.model, loader = open_original(self.path, torch.bfloat16)
        drawn = {
            name: draw_windows(text, self.path, samples=TOKENS // LENGTH, length=LENGTH, seed=0)
            for name, text in HELDOUT.items()
        }
        self.texts = {name: windows.inputs for name, windows in drawn.items()}
        self.calibration = Calibration(inputs="original")
        self.windows = draw_calibration(self.calibration, self.model.task, self.path, self.model.model.config)
        self.identity = {
            "comparison": 1,
            "source": loader.source.hashes(),
            "texts": {name: windows.sha256 for name, windows in drawn.items()},
            "compute": "bf16",
            "versions": versions(),
        }
        self.model.load_outer_()
        captured = self._capture(out / "capture")
        self.states = captured.states()
        self.stats = [captured.measured(i, {"gram"}).stats for i in range(len(self.model.blocks))]
        captured.close()  # so that others can run beside
        self.noise = self._noise(out / "noise.json")

    def _capture(self, where: Path) -> StatisticsCache:
        batch = Recipe().batch
        wanted = {**self.identity, "calibration": self.windows.sha256, "batch": batch}
        where.parent.mkdir(parents=True, exist_ok=True)
        tokens = self.windows.inputs
        return capture_original(where, wanted, self.model, self.texts, tokens, {"gram"}, batch, lambda: None, Silent())

    def _noise(self, where: Path) -> dict[str, Any]:
        """Measure the original in bf16 against itself in float32, as a comparison does."""
        known = json.loads(where.read_text(encoding="utf-8")) if where.exists() else {}
        if known.get("identity") != self.identity or "floor" not in known:
            known = {"identity": self.identity, "floor": measure_noise(self.path, self.model, self.texts, self.states)}
            where.write_text(json.dumps(known), encoding="utf-8")
        floor: dict[str, Any] = known["floor"]
        return floor

    def importance(self) -> dict[str, torch.Tensor]:
        """Return the mean square of every weight's inputs."""
        found = {}
        for stats in self.stats:
            for name, seen in stats.items():
                assert seen.gram is not None
                found[name if name.endswith(".weight") else f"{name}.weight"] = seen.gram.diagonal().contiguous()
        return found

    def judge(self, weights: Path) -> dict[str, Any]:
        """Measure the model with a file's tensors in place of its own."""
        entries, _ = read_header(weights)
        linears = {name for name in entries if name.endswith("_proj.weight")}
        if linears != set(self.importance()):
            raise SystemExit(f"{weights}: {len(linears)} linears, where the model's blocks have {len(self.importance())}.")
        started = time.perf_counter()
        heldout = EvaluationText(self.model, self.texts)
        heldout.start_()
        peer = PeerWeights(weights, self)
        walk(self.model, [peer, heldout])
        errors = peer.errors
        figures = distances((self.model, self.states), (self.model, heldout.states), self.texts)
        widths = [f["kl_ci95"] for f in figures.values()]
        return {
            "kl_mean": mean([f["kl_mean"] for f in figures.values()]),
            "kl_ci95": math.sqrt(math.fsum(w * w for w in widths)) / len(widths),
            "texts": figures,
            "error": mean(errors) if errors else None,
            "measured_on": "output" if errors else None,
            "seconds_measuring": round(time.perf_counter() - started, 2),
        }


class PeerWeights:
    """A visitor that puts a file's tensors in the place of a block's own, and keeps the output errors of its linears."""

    def __init__(self, weights: Path, bench: Bench) -> None:
        self.weights, self.bench, self.errors = weights, bench, list[float]()
        self.entries, _ = read_header(weights)

    def visit_(self, block: LoadedBlock) -> None:
        stats, prefix = self.bench.stats[block.index], f"{block.name}."
        given = {name: read_tensor(self.weights, entry) for name, entry in self.entries.items() if name.startswith(prefix)}
        linears = {name for name in given if name.endswith("_proj.weight")}
        if linears == set(given):  # with norms of its own its inputs are others, and so would the error be
            self.errors += [
                output_errors(block.tensors[name].float(), (w.float(),), stats[name.removesuffix(".weight")])[0]
                for name, w in given.items()
            ]
        self.bench.model.fill_(given)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def press(bench: Bench, peer: Peer, width: int | None, folder: Path) -> dict[str, Any]:
    """Run a peer in its environment; give what it tells, with its weights in FOLDER/weights.safetensors."""
    if (folder / "facts.json").exists():
        known: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        return known
    python = ROOT / ".peers" / peer.environment / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{python} is not here; run make peers.")
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(ROOT / "benchmarks" / "peers" / peer.script), "--model", str(bench.path)]
    command += ["--out", str(folder / "weights.safetensors")]
    if peer.inputs:
        np.save(folder / "tokens.npy", bench.windows.inputs.numpy())
        command += ["--tokens", str(folder / "tokens.npy")]
    if "{importance}" in peer.options:
        squares: dict[str, Any] = {name: value.numpy() for name, value in bench.importance().items()}
        np.savez(folder / "importance.npz", **squares)
    compute = "bf16" if has_fast_bf16() else "fp32"
    command += peer.options.format(bits=width, importance=folder / "importance.npz", compute=compute).split()
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False, env=environment)
    if done.returncode:
        last = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"exit {done.returncode}: {' '.join(last)}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "settings" not in facts:
        told = {"tool", "version", "seconds", "cpu_seconds", "load_seconds", "peak_rss_mb", "bytes", "load", "threads"}
        facts["settings"] = {key: value for key, value in facts.items() if key not in told}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return facts


def row_of(bench: Bench, name: str, width: int | None, facts: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    peer = PEERS[name]
    weights = sum(w.numel() for n, w in bench.model.model.named_parameters() if n.endswith("_proj.weight"))
    bits = facts["bytes"] * 8 / weights
    return {
        "kind": "peer",
        "name": name,
        "bits": math.floor(bits) if width is None else width,
        "width": width,
        "package": facts["tool"],
        "version": facts["version"],
        "settings": facts["settings"],
        "weights": peer.weights.format(bits=width),
        "model": MODEL,
        "compute": "bf16",
        "sources": {n: {"source": HELDOUT[n], "tokens": w.numel()} for n, w in bench.texts.items()},
        "noise": bench.noise,
        # Of the bench, so that the row stands with those of recipes; the peer itself may read no text.
        "recipe": {"calibration": bench.calibration.model_dump()},
        "calibration": bench.windows.sha256 if peer.inputs else None,
        "inputs": peer.inputs,
        "bits_per_weight": bits,
        "bytes": facts["bytes"],
        **figures,
        "failed": None,
        "seconds_pressing": facts["seconds"],
        "seconds_pressing_cpu": facts["cpu_seconds"],
        "peak_memory_bytes": facts["peak_rss_mb"] and round(facts["peak_rss_mb"] * 2**20),
        "threads": facts["threads"],
        "load": facts["load"],
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="names or patterns of peers")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--out", type=Path, default=cache_directory() / "benchmarks" / "methods_peers")
    options = parser.parse_args()
    known = {(row["name"], row["width"]) for row in read_rows("methods") if row["kind"] == "peer"}
    wanted = [
        (name, width)
        for name, peer in PEERS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
        for width in peer.widths
        if (width is None or width in options.bits) and (options.again or (name, width) not in known)
    ]
    if not wanted:
        return
    bench = Bench(options.out)
    failed = 0
    for name, width in wanted:
        label = name if width is None else f"{name}, {width} bits"
        folder = options.out / "pressed" / "".join(letter if letter.isalnum() else "-" for letter in label)
        if options.again:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            facts = press(bench, PEERS[name], width, folder)
            figures = bench.judge(folder / "weights.safetensors")
        except (NumericsError, RuntimeError) as error:
            failed += 1
            print(f"{label}: failed: {error}", file=sys.stderr, flush=True)
            continue
        row = add_row("methods", row_of(bench, name, width, facts, figures))
        shutil.rmtree(folder)
        distances_told = ", ".join(f"{text} {told['kl_mean']:.4f}" for text, told in row["texts"].items())
        print(f"{label}: {row['bits_per_weight']:.3f} bits, KL {distances_told}; {row['seconds_pressing']} s", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
