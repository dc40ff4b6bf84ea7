"""Figures F5 to F7 in small: a run that is killed, stopped or let down by the disk goes on, and ends in the same bytes.

The runs that are killed are children of one driver process, forked after its imports: what is killed is a whole process that runs the
command line, and no second goes into importing torch again.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitpress.calibration import builtin_texts
from bitpress.checkpoints import durable
from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME, CompressedCheckpoint
from bitpress.errors import CheckpointError, DiskError
from bitpress.pipeline import journal as job
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe

KILLS = 10
SEED = 20261

DRIVER = """
import contextlib, json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
import bitpress.pipeline.quantize, bitpress.checkpoints.named, bitpress.cli.reports
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.cli.app import main
from bitpress.errors import CheckpointError

logging.set_verbosity_error()
folder, command, kills, seed = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
choose = random.Random(seed)


def start(out):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run(out)
    finally:
        os._exit(code)


def run(out):
    sys.argv = ["bitpress", *(word.replace("OUT", str(out)) for word in command)]
    with open(folder / "log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def units(out):
    path = out / ".bitpress" / "journal.jsonl"
    return path.read_bytes().count(b"\\n") if path.exists() else 0


def state(out):
    try:
        CompressedCheckpoint.open(out)
        return "model"
    except CheckpointError as error:
        return "refused"


def stop_after(out, wanted, number):
    # Wait until so many units are committed, then send the signal.
    child = start(out)
    while units(out) < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    os.kill(child, number)
    return end(child)


results = {"killed": [], "stopped": []}
run(folder / "warm")  # what is imported late is imported now
began = time.monotonic()
results["reference"] = end(start(folder / "reference"))
whole = time.monotonic() - began
results["seconds"] = whole
for i in range(kills):
    out, runs = folder / f"killed-{i}", []
    while True:
        child = start(out)
        if len(runs) < 2:  # the first run and its first successor, at moments spread over the length of a run
            time.sleep(whole * (i + choose.random()) / kills * (1.0 if not runs else 0.5))
            os.kill(child, signal.SIGKILL)
        code, left = end(child), units(out)
        runs.append([code, left, state(out)])
        if code == 0 or len(runs) > 5:
            break
    results["killed"].append(runs)
for number in (signal.SIGINT, signal.SIGTERM):
    out = folder / f"stopped-{number.name}"
    codes = [stop_after(out, 2, number), units(out), state(out), end(start(out)), state(out)]
    results["stopped"].append(codes)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def runs(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """All killed and stopped runs, and the folder with what each of them left."""
    folder = tmp_path_factory.mktemp("kills")
    model = tiny_model("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=128)
    command = ["quantize", str(model), "OUT", "--weights", "int4-g32-zero", "--quantizer", "gptq"]
    command += ["--calibration", str(text_file), "--samples", "16", "--length", "64", "--set", "batch=4"]
    held_out = tmp_path_factory.mktemp("text") / "held_out.txt"
    held_out.write_text(builtin_texts("heldout")["reference"][:20_000], encoding="utf-8")
    command += ["--proof-tokens", "256", "--proof-text", str(held_out)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), json.dumps(command), str(KILLS), str(SEED)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr + (folder / "log").read_text()
    return folder, json.loads(done.stdout)


def content(out: Path) -> dict[str, bytes]:
    """Every file of a published model that its manifest accounts for, and the manifest."""
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    return {name: (out / name).read_bytes() for name in [*manifest["files"], MANIFEST_NAME]}


def check_same(out: Path, reference: Path) -> None:
    assert content(out) == content(reference)
    CompressedCheckpoint.open(out)
    assert not (out / JOB_DIRECTORY).exists()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in reference.iterdir()), "something was left behind"


def test_killed_runs_end_in_the_same_bytes(runs: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, results = runs
    assert results["reference"] == 0
    kills = [run for series in results["killed"] for run in series if run[0] == -signal.SIGKILL]
    assert len(kills) >= KILLS, "too many runs had ended before they were killed"
    for i, series in enumerate(results["killed"]):
        assert series[-1][0] == 0, series
        assert {code for code, _, _ in series} <= {0, -signal.SIGKILL}, series
        committed = 0
        for code, units, state in series:
            if code != 0 and state == "refused":
                assert units >= committed, f"a later run lost a unit that an earlier one had: {series}"
                committed = units
            assert state == "model" or code != 0
        check_same(folder / f"killed-{i}", folder / "reference")
    midway = {units for _, units, state in kills if state == "refused"}
    assert len(midway) > 1, f"every kill fell on the same unit: {kills}"
    with capsys.disabled():
        early = sum(state == "model" for _, _, state in kills)
        print(
            f"\nF5: {len(kills)} kills (seed {SEED}) over runs of {results['seconds']:.1f} s, {early} of them after the manifest: "
            "0 corrupt, 0 unresumable, 0 units lost, all final files byte-identical"
        )


def test_a_model_is_none_before_its_manifest(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = runs
    reference = content(folder / "reference")
    for i, series in enumerate(results["killed"]):
        for code, _, state in series:
            if code != 0 and state == "model":  # killed between the manifest and the exit: then it is whole
                assert content(folder / f"killed-{i}") == reference


@pytest.mark.parametrize("which", [0, 1], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_says_so_and_goes_on(runs: tuple[Path, dict[str, Any]], which: int) -> None:
    folder, results = runs
    code, units, state, again, state_after = results["stopped"][which]
    assert code == 75
    assert units >= 2
    assert (state, again, state_after) == ("refused", 0, "model")
    check_same(folder / f"stopped-{['SIGINT', 'SIGTERM'][which]}", folder / "reference")
    assert f"stopped by {['SIGINT', 'SIGTERM'][which]}" in (folder / "log").read_text()


# ------------------------------------------------------------------------------------------------------------------ bad disks


class Faulty(ModuleType):
    """`os`, with one call of those that change the disk failing."""

    CHANGING = ("write", "fsync", "rename", "replace")

    def __init__(self, fail_at: int | None, number: int = 0) -> None:
        super().__init__("os")
        self.calls, self.fail_at, self.number = 0, fail_at, number

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CHANGING:
            return real

        def changing(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **kwargs)

        return changing


@pytest.fixture(scope="module")
def small_run(tiny_model: Callable[..., Path]) -> Callable[[Path], Any]:
    model = tiny_model("llama", num_hidden_layers=1)
    recipe = make_recipe({"weights": "int4-g32", "quantizer": "rtn"})
    return lambda out: quantize_directory(model, out, recipe, proof=Proof(tokens=0))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_every_failed_write_is_an_error_and_the_next_run_completes(
    number: int,
    small_run: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(out: Path, faulty: Faulty) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", faulty)
            patch.setattr(job, "os", faulty)
            small_run(out)

    counting = Faulty(None)
    run(tmp_path / "reference", counting)
    total = counting.calls
    reference = content(tmp_path / "reference")
    assert total > 50
    after_manifest = 0
    # Every call once, half of them with each error; the first and the last ones with both.
    chosen = [n for n in range(1, total + 1) if n % 2 == (number == errno.EIO) or n in (1, 2, 3, total - 2, total - 1, total)]
    for n in chosen:
        out = tmp_path / f"fault-{n}"
        with pytest.raises(DiskError) as caught:
            run(out, Faulty(n, number))
        assert caught.value.exit_code == 4
        assert str(out) in str(caught.value), "the message names the path"
        assert os.strerror(number) in str(caught.value)
        assert not list(out.rglob("*.tmp")), f"call {n}: a partial file was left"
        if (out / MANIFEST_NAME).exists():  # the rename was done, its fsync failed: whole, but not a success
            after_manifest += 1
            assert content(out) == reference
        else:
            with pytest.raises(CheckpointError):
                CompressedCheckpoint.open(out)
        small_run(out)
        check_same(out, tmp_path / "reference")
    assert after_manifest <= 2
    with capsys.disabled():
        print(
            f"\nF7: {os.strerror(number)} at {len(chosen)} of {total} calls of {', '.join(Faulty.CHANGING)}: 0 false successes"
        )
