"""A model that is published already: whether it is the one that is asked for."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME, VERSION, CompressedCheckpoint
from bitpress.checkpoints.directory import safe_file
from bitpress.checkpoints.jsonfile import read_json
from bitpress.errors import CheckpointError, UsageError
from bitpress.pipeline.journal import differences

__all__ = ["find_finished"]


def find_finished(out: Path, identity: Mapping[str, Any], force: bool) -> dict[str, Any] | None:
    """Return the report of a model that is published in `out` already, if it is this one."""
    if not (out / MANIFEST_NAME).exists():
        return None
    known = _known_job(out) if force else CompressedCheckpoint.open(out).manifest.job
    if isinstance(known, dict):  # the names of files make no other model of an older directory, nor does the device
        known = {**known, "directory": VERSION, "device": identity.get("device", "cpu")}
    changed = differences(known, identity)
    if changed and not force:
        raise UsageError(f"{out}: holds another model, which differs in {'; '.join(changed)}. Use --force to replace it.")
    if changed or not (out / "report.json").exists():
        return None
    if (out / JOB_DIRECTORY).exists():
        shutil.rmtree(out / JOB_DIRECTORY)  # killed after the manifest was written and before this was done
    report = read_json(safe_file(out, "report.json"))
    if not isinstance(report, dict) or not {"figures", "size", "run", "job", "layers", "fallbacks", "calibrated"} <= set(
        report
    ):
        raise CheckpointError(f"{out / 'report.json'}: is no report of bitpress; use --force to make the model again.")
    return report


def _known_job(out: Path) -> Any:
    """Return the identity of a model that may be replaced, whatever state its manifest is in."""
    try:
        manifest = read_json(out / MANIFEST_NAME)
    except CheckpointError:
        return None
    return manifest.get("job") if isinstance(manifest, dict) else None
