"""Open a checkpoint in a peer's environment, and end with one line where that fails.

Stand-alone: nothing of bitpress is imported.
"""

import json
from pathlib import Path

import transformers


def fail(message: object) -> SystemExit:
    """Build an exit that prints one line on stderr."""
    line = " ".join(str(message).split()) or type(message).__name__
    return SystemExit(f"error: {line[:400]}")


def load_model(path: Path, dtype: str) -> transformers.PreTrainedModel:
    """Load the checkpoint, refusing one that this transformers release would read differently."""
    raw = json.loads((path / "config.json").read_text())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{path}: weights do not match the model: {info}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    wanted = {**rope, "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}
    loaded = model.config.rope_parameters
    if different := {key: loaded.get(key) for key in wanted if loaded.get(key) != wanted[key]}:
        raise ValueError(f"{path}: rotary settings read as {different}, saved as {wanted}")
    plain = {key: value for key, value in raw.items() if isinstance(value, int | float) and key != "rope_theta"}
    if changed := [key for key, value in plain.items() if getattr(model.config, key, None) != value]:
        raise ValueError(f"{path}: the loaded configuration lacks or changes {changed}")
    return model.eval()
