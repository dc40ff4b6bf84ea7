"""The journal of a job: what a torn or damaged file, a second process and another recipe do to it, and the order of a commit."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.checkpoints import durable
from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME, CompressedCheckpoint
from bitpress.checkpoints.safetensors_file import read_header
from bitpress.errors import CheckpointError, DiskError, UsageError
from bitpress.pipeline import journal as job_module
from bitpress.pipeline.journal import Job, check_vacant, differences

IDENTITY = {"source": {"a.safetensors": "0" * 64}, "recipe": {"weights": "int4-g64", "batch": 8}, "calibration": None}


def shard(i: int) -> str:
    return f"model-{i + 1:05d}-of-00003.safetensors"


def commit(job: Job, i: int, *, last: bool = False) -> None:
    job.commit(
        f"unit {i}", shard(i), {"t": torch.full((4,), float(i))}, {"i": i}, None if last else torch.full((2, 3), float(i))
    )


@pytest.fixture
def two_units(tmp_path: Path) -> Path:
    """OUT with a job of two finished units."""
    out = tmp_path / "out"
    job = Job.open(out, IDENTITY)
    commit(job, 0)
    commit(job, 1)
    job.close()
    return out


def journal(out: Path) -> Path:
    return out / JOB_DIRECTORY / "journal.jsonl"


def line(value: Any) -> bytes:
    payload = json.dumps(value).encode()
    return b"%08x " % zlib.crc32(payload) + payload + b"\n"


def rewrite(out: Path, change: Any, number: int = 1) -> None:
    """Change a unit in the journal, its CRC made to match."""
    lines = journal(out).read_bytes().splitlines(keepends=True)
    unit = json.loads(lines[number][9:])
    change(unit)
    lines[number] = line(unit)
    journal(out).write_bytes(b"".join(lines))


# ---------------------------------------------------------------------------------------------------------------------- resume


def test_a_job_is_taken_up_where_it_was(two_units: Path) -> None:
    job = Job.open(two_units, IDENTITY)
    assert [unit.unit for unit in job.units] == ["unit 0", "unit 1"]
    assert [unit.facts for unit in job.units] == [{"i": 0}, {"i": 1}]
    stored = job.activations()
    assert stored is not None
    assert torch.equal(stored, torch.ones(2, 3))
    commit(job, 2, last=True)
    assert job.activations() is None
    assert not list((job.root / "activations").iterdir()), "nothing needs the states after the last block"
    job.publish({"config.json": b"{}"}, b"{}")
    job.close()
    names = sorted(p.name for p in two_units.iterdir())
    assert names == [MANIFEST_NAME, "config.json", shard(0), shard(1), shard(2)]


def test_only_the_newest_activations_are_kept(two_units: Path) -> None:
    assert [p.name for p in (two_units / JOB_DIRECTORY / "activations").iterdir()] == ["00001.safetensors"]


@pytest.mark.parametrize("keep", [1, 8, 9, 60, -1])
def test_a_torn_last_line_is_ignored_and_cut(two_units: Path, keep: int) -> None:
    whole = journal(two_units).read_bytes()
    added = line({"unit": "unit 2" + " " * 99})[:keep]
    journal(two_units).write_bytes(whole + added)
    job = Job.open(two_units, IDENTITY)
    assert len(job.units) == 2
    assert journal(two_units).read_bytes() == whole
    commit(job, 2, last=True)
    job.close()
    again = Job.open(two_units, IDENTITY)
    assert [unit.unit for unit in again.units] == ["unit 0", "unit 1", "unit 2"]
    again.close()


def test_a_journal_that_is_torn_in_its_first_line_is_empty(two_units: Path) -> None:
    journal(two_units).write_bytes(journal(two_units).read_bytes()[:20])
    job = Job.open(two_units, IDENTITY)
    assert job.units == []
    assert job.activations() is None
    job.close()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("at", [0, 8, 30])
def test_a_damaged_whole_line_is_refused(two_units: Path, number: int, at: int) -> None:
    lines = journal(two_units).read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[number])
    damaged[at] ^= 1
    lines[number] = bytes(damaged)
    journal(two_units).write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=rf"line {number + 1} is damaged; start again with --force"):
        Job.open(two_units, IDENTITY)
    job = Job.open(two_units, IDENTITY, force=True)  # the lock was given back, and the advice is right
    assert job.units == []
    commit(job, 0)
    job.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda unit: unit.update(more=1),
        lambda unit: unit.pop("sha256"),
        lambda unit: unit.update(bytes="many"),
        lambda unit: unit.update(shard="../../outside.safetensors"),
        lambda unit: unit.update(shard="/etc/hostname"),
        lambda unit: unit.update(after={"file": "../outside.safetensors", "sha256": "0" * 64}),
        lambda unit: unit.update(after="00001.safetensors"),
    ],
)
def test_a_line_that_is_no_unit_is_refused(two_units: Path, change: Any) -> None:
    rewrite(two_units, change)
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2"):
        Job.open(two_units, IDENTITY)


def test_a_list_in_the_journal_is_refused(two_units: Path) -> None:
    journal(two_units).write_bytes(journal(two_units).read_bytes() + line([1, 2]))
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:3: is not a unit"):
        Job.open(two_units, IDENTITY)


def test_a_finished_weight_file_that_changed_is_refused(two_units: Path) -> None:
    path = two_units / JOB_DIRECTORY / "objects" / shard(0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Job.open(two_units, IDENTITY)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Job.open(two_units, IDENTITY)


def test_activations_that_changed_are_refused(two_units: Path) -> None:
    path = two_units / JOB_DIRECTORY / "activations" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Job.open(two_units, IDENTITY)
    job = Job.open(two_units, IDENTITY, force=True)
    assert job.units == []
    job.close()


# ----------------------------------------------------------------------------------------------------------------- one writer


def test_a_second_process_is_refused(two_units: Path) -> None:
    job = Job.open(two_units, IDENTITY)
    code = (
        "import json, sys; from pathlib import Path; from bitpress.errors import UsageError; from bitpress.pipeline.journal import Job\n"
        "try: Job.open(Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "except UsageError as error: print(error); sys.exit(2)"
    )
    command = [sys.executable, "-c", code, str(two_units), json.dumps(IDENTITY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"process {os.getpid()} works here; wait for it or stop it" in done.stdout
    with pytest.raises(CheckpointError, match="this process is making a model here: wait until it is done"):
        CompressedCheckpoint.open(two_units)
    commit(job, 2, last=True)
    job.close()
    assert len(Job.open(two_units, IDENTITY).units) == 3


def test_a_second_job_in_this_process_is_refused_and_does_no_harm(two_units: Path) -> None:
    job = Job.open(two_units, IDENTITY)
    before = journal(two_units).read_bytes()
    with pytest.raises(UsageError, match="this process works here"):
        Job.open(two_units, {**IDENTITY, "calibration": "other"}, force=True)
    assert journal(two_units).read_bytes() == before
    job.close()


# ------------------------------------------------------------------------------------------------------------------- identity


def test_another_identity_is_refused_by_its_fields(two_units: Path) -> None:
    other = {
        "source": {"a.safetensors": "1" * 64},
        "recipe": {"weights": "int3-g64", "batch": 8, "seed": 1},
        "calibration": None,
    }
    with pytest.raises(UsageError) as caught:
        Job.open(two_units, other)
    message = str(caught.value)
    assert "recipe.weights (int4-g64 there, int3-g64 here)" in message
    assert "recipe.seed (None there, 1 here)" in message
    assert "source.a.safetensors" in message
    assert "batch" not in message
    assert "calibration" not in message
    assert len(Job.open(two_units, IDENTITY).units) == 2, "nothing was lost, and the lock was given back"


def test_differences_name_every_field_once() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"b": {"c": 2}}, {"b": {"c": 3}}) == ["b.c (2 there, 3 here)"]
    assert differences({"b": {"c": 2}}, {"b": 3}) == ["b ({'c': 2} there, 3 here)"]
    assert differences({"a": "x" * 64}, {"a": "y" * 64}) == ["a"]
    assert differences([], {"a": 1}) == ["a (None there, 1 here)"]


def test_force_discards_another_job_and_keeps_this_one(two_units: Path) -> None:
    same = Job.open(two_units, IDENTITY, force=True)
    assert len(same.units) == 2, "the same job is resumed"
    same.close()
    other = {**IDENTITY, "calibration": "other"}
    job = Job.open(two_units, other, force=True)
    assert job.units == []
    assert not list((job.root / "objects").iterdir())
    assert not journal(two_units).exists()
    job.close()
    with pytest.raises(UsageError, match="calibration"):
        Job.open(two_units, IDENTITY)


def test_work_without_an_identity_is_not_adopted(two_units: Path) -> None:
    """A job that was discarded or removed halfway: its journal says nothing about whose it was."""
    (two_units / JOB_DIRECTORY / "job.json").unlink()
    job = Job.open(two_units, {**IDENTITY, "calibration": "other"})
    assert job.units == []
    job.close()


@pytest.mark.parametrize("text", ["[]", "{}", '{"source": 1}'])
def test_a_strange_identity_differs(two_units: Path, text: str) -> None:
    (two_units / JOB_DIRECTORY / "job.json").write_text(text)
    with pytest.raises(UsageError, match="differs in"):
        Job.open(two_units, IDENTITY)


# ---------------------------------------------------------------------------------------------------------------------- places


def test_vacant_is_what_is_new_or_empty_or_a_job(tmp_path: Path) -> None:
    check_vacant(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_vacant(tmp_path / "empty")
    (tmp_path / "job" / JOB_DIRECTORY).mkdir(parents=True)
    (tmp_path / "job" / "other").touch()
    check_vacant(tmp_path / "job")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="holds something else"):
        check_vacant(tmp_path / "taken")
    with pytest.raises(UsageError, match="is a file"):
        check_vacant(tmp_path / "taken" / "thesis.txt")


def test_a_linked_job_folder_or_lock_is_refused(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / JOB_DIRECTORY).symlink_to(elsewhere)
    with pytest.raises(UsageError, match="is a link"):
        Job.open(out, IDENTITY)
    (out / JOB_DIRECTORY).unlink()
    (out / JOB_DIRECTORY).mkdir()
    (out / JOB_DIRECTORY / "lock").symlink_to(elsewhere / "lock")
    with pytest.raises(DiskError, match="lock"):
        Job.open(out, IDENTITY)
    assert not list(elsewhere.iterdir())


# ------------------------------------------------------------------------------------------------------------- order of a commit


def test_a_commit_is_durable_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight file, activations, journal line: each renamed or appended, and synced with its directory, before the next begins."""
    job = Job.open(tmp_path / "out", IDENTITY)
    events: list[str] = []

    class Noting:
        """`os` that writes down what becomes durable, by the name of the file."""

        def __init__(self) -> None:
            self.names: dict[int, str] = {}

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, path: Any, *args: Any, **kwargs: Any) -> int:
            descriptor = os.open(path, *args, **kwargs)
            self.names[descriptor] = Path(path).name
            return descriptor

        def fsync(self, descriptor: int) -> None:
            events.append(f"sync {self.names[descriptor]}")
            os.fsync(descriptor)

        def rename(self, old: Any, new: Any) -> None:
            events.append(f"rename {Path(new).name}")
            os.rename(old, new)

    monkeypatch.setattr(durable, "os", Noting())
    commit(job, 0)
    first = [
        f"sync {shard(0)}.tmp",
        f"rename {shard(0)}",
        "sync objects",
        "sync 00000.safetensors.tmp",
        "rename 00000.safetensors",
        "sync activations",
        "sync journal.jsonl",
        f"sync {JOB_DIRECTORY}",
    ]
    assert events == first
    events.clear()
    job.publish({"config.json": b"{}"}, b"{}")
    job.close()
    assert events[-3:] == [f"sync {MANIFEST_NAME}.tmp", f"rename {MANIFEST_NAME}", "sync out"] or events[-4:-1] == [
        f"sync {MANIFEST_NAME}.tmp",
        f"rename {MANIFEST_NAME}",
        "sync out",
    ]
    assert events.index("rename config.json") < events.index(f"rename {MANIFEST_NAME}")


def test_a_commit_that_fails_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.open(tmp_path / "out", IDENTITY)
    commit(job, 0)
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "append_durably", _full)
        with pytest.raises(DiskError):
            commit(job, 1)
    assert len(job.units) == 1
    assert job.activations() is not None
    job.close()
    again = Job.open(tmp_path / "out", IDENTITY)
    assert len(again.units) == 1
    commit(again, 1)
    again.close()


def _full(path: Path, data: bytes) -> None:
    raise DiskError(f"{path}: no room")


def test_staging_may_be_done_again(two_units: Path) -> None:
    job = Job.open(two_units, IDENTITY)
    job.stage({"config.json": b"{}"})
    job.close()
    again = Job.open(two_units, IDENTITY)
    assert len(again.units) == 2, "the weight files are found in their final place"
    again.stage({"config.json": b"{}"})
    assert set(read_header(two_units / shard(1))[0]) == {"t"}
    (two_units / shard(0)).unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        again.stage({})
    again.close()


def test_replacing_a_model_takes_its_own_files_only(two_units: Path, tmp_path: Path) -> None:
    (two_units / "notes.md").write_text("mine")
    (two_units / "vocab.json").write_text("{}")
    (tmp_path / "outside.json").write_text("{}")
    (two_units / MANIFEST_NAME).write_text(json.dumps({"files": {"vocab.json": {}, "config.json": {}}}))
    job = Job.open(two_units, IDENTITY)
    job.stage({"config.json": b"{}"})
    assert sorted(p.name for p in two_units.iterdir()) == sorted([JOB_DIRECTORY, "config.json", "notes.md", shard(0), shard(1)])
    (two_units / MANIFEST_NAME).write_text(json.dumps({"files": {"../outside.json": {}}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        job.stage({"config.json": b"{}"})
    assert (tmp_path / "outside.json").exists()
    job.close()
