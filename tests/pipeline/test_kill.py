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
from journal_events import kind_of

from bitpress.calibration import builtin_texts
from bitpress.checkpoints import durable
from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME, CompressedCheckpoint
from bitpress.errors import CheckpointError, DiskError
from bitpress.pipeline import journal as job
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe

# Every kind of event that a run has; `journal_events.py` says what they are.
EVENTS = {"identity", "objects", "activations", "journal torn", "journal", "staged", "outer", "manifest", "cleared"}

DRIVER = """
import contextlib, json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
import bitpress.pipeline.quantize, bitpress.checkpoints.named, bitpress.cli.reports
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.cli.app import main
from bitpress.errors import CheckpointError
from bitpress.measure import continuations
import journal_events

continuations.NEW_TOKENS = 6

logging.set_verbosity_error()
folder, command = Path(sys.argv[1]), json.loads(sys.argv[2])


def start(out, event="", number=signal.SIGKILL):
    # Run the command in a process of its own, which sends itself the signal at the event.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        def reach(name):
            with open(folder / "events", "a") as file:
                file.write(f"{out.name}:{name}\\n")
            if name == event:
                os.kill(os.getpid(), number)
        journal_events.watch(reach)
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


def units(out):
    path = out / ".bitpress" / "journal.jsonl"
    return path.read_bytes().count(b"\\n") if path.exists() else 0


def state(out):
    try:
        CompressedCheckpoint.open(out)
        return "model"
    except CheckpointError as error:
        return "refused"


def events(out):
    lines = (folder / "events").read_text().splitlines()
    return [line.partition(":")[2] for line in lines if line.startswith(f"{out.name}:")]


results = {"killed": {}, "stopped": {}}
run(folder / "warm")  # what is imported late is imported now
results["reference"] = start(folder / "reference")
results["events"] = events(folder / "reference")
for i, event in enumerate(journal_events.one_of_each(results["events"])):
    # Every third run is killed three times: at the event, after one more unit, and beside the weights.
    out, runs = folder / f"killed-{i}", []
    for at in (event, *(["journal 1", "outer 1"] if i % 3 == 1 else []), ""):
        code = start(out, at)
        runs.append([at, code, units(out), state(out)])
        if code == 0:
            break
    results["killed"][event] = runs
for number in (signal.SIGINT, signal.SIGTERM):
    out = folder / f"stopped-{number.name}"
    results["stopped"][number.name] = [start(out, "journal 2", number), units(out), state(out), start(out), state(out)]
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
    command += ["--proof-tokens", "64", "--proof-text", str(held_out)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), json.dumps(command)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=400,
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
    events, killed = results["events"], results["killed"]
    assert {kind_of(event) for event in killed} == {kind_of(event) for event in events} == EVENTS
    kills = [run for series in killed.values() for run in series if run[0]]
    for i, (event, series) in enumerate(killed.items()):
        (first, code, _, _), (*_, last_code, _, _) = series[0], series[-1]
        assert (first, code) == (event, -signal.SIGKILL)
        assert last_code == 0, series
        committed = 0
        for _, code, units, state in series:
            assert code in (0, -signal.SIGKILL), series
            assert state == "model" or code != 0
            if state == "refused" and "staged" not in event:
                assert units >= committed, f"a later run lost a unit that an earlier one had: {series}"
                committed = units
        check_same(folder / f"killed-{i}", folder / "reference")
    with capsys.disabled():
        early = sum(state == "model" for *_, state in kills)
        print(
            f"\nF5: {len(kills)} kills at {len(killed)} kinds of events, {early} of them after the manifest: "
            "0 corrupt, 0 unresumable, 0 units lost, all final files byte-identical"
        )


def test_a_unit_is_there_from_its_line_of_the_journal_on(runs: tuple[Path, dict[str, Any]]) -> None:
    _, results = runs
    units = {event: series[0][2] for event, series in results["killed"].items()}
    for event, there in units.items():
        name, *number = event.split()[:2]
        if name in ("objects", "activations", "journal"):
            assert there == int(number[0]) - (event != f"journal {number[0]}"), event


def test_a_model_is_none_before_its_manifest(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = runs
    reference = content(folder / "reference")
    for i, (event, series) in enumerate(results["killed"].items()):
        assert (series[0][3] == "model") == (event in ("manifest", "cleared")), event
        if series[0][3] == "model":
            assert content(folder / f"killed-{i}") == reference


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_says_so_and_goes_on(runs: tuple[Path, dict[str, Any]], which: str) -> None:
    folder, results = runs
    code, units, state, again, state_after = results["stopped"][which]
    assert code == 75
    assert units >= 2
    assert (state, again, state_after) == ("refused", 0, "model")
    check_same(folder / f"stopped-{which}", folder / "reference")
    assert f"stopped by {which}" in (folder / "log").read_text()


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


# Which calls fail with which error, by their number modulo 4: a quarter of them by day, every one before a release.
FAILING = [
    pytest.param(errno.ENOSPC, (0,), id="ENOSPC"),
    pytest.param(errno.ENOSPC, (2,), id="ENOSPC, others", marks=pytest.mark.release),
    pytest.param(errno.EIO, (1, 3), id="EIO", marks=pytest.mark.release),
]


@pytest.mark.parametrize(("number", "turns"), FAILING)
def test_every_failed_write_is_an_error_and_the_next_run_completes(
    number: int,
    turns: tuple[int, ...],
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
    # Those of its turns, and the first and the last ones always.
    chosen = [n for n in range(1, total + 1) if n % 4 in turns or n in (1, 2, 3, total - 2, total - 1, total)]
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
