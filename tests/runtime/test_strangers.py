"""Readers that do not know bitpress fail on its directories and say what is missing; directories of version 1 are read as before."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import bitpress
from bitpress.checkpoints.compressed import JOB_DIRECTORY, MANIFEST_NAME, WEIGHT_FILE_MARKS, CompressedCheckpoint
from bitpress.checkpoints.durable import hash_file
from bitpress.cli.reports import describe_directory, verify_directory
from bitpress.errors import UsageError
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.version import INSTALL

STRANGER = """
import sys, warnings
warnings.filterwarnings("ignore")
import accelerate
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
root = sys.argv[1]
roads = {
    "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(root),
    "AutoModel": lambda: AutoModel.from_pretrained(root),
    "LlamaForCausalLM": lambda: LlamaForCausalLM.from_pretrained(root, ignore_mismatched_sizes=True),
    "another head": lambda: LlamaForSequenceClassification.from_pretrained(root, use_safetensors=True),
    "no safetensors": lambda: AutoModelForCausalLM.from_pretrained(root, use_safetensors=False),
}
for name, road in roads.items():
    try:
        road()
    except Exception as error:
        print(name, "to load this model install bitpress and import it first" in str(error))
    else:
        print(name, "LOADED")
config = AutoConfig.from_pretrained(root)
try:
    accelerate.load_checkpoint_in_model(AutoModelForCausalLM.from_config(config), root)
except ValueError:
    print("accelerate finds nothing")
print(config.model_type, len(AutoTokenizer.from_pretrained(root)("a text")["input_ids"]) > 0, "bitpress" in sys.modules)
AutoModelForCausalLM.from_pretrained(root)
"""


def test_a_reader_without_bitpress_fails_and_names_the_package(pressed_original: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STRANGER, str(pressed_original)], capture_output=True, text=True, check=False)
    roads = ("AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM", "another head", "no safetensors")
    assert done.stdout.splitlines() == [
        *(f"{road} True" for road in roads),
        "accelerate finds nothing",
        "llama True False",
    ], done.stderr
    assert done.returncode == 1
    assert "to load this model install bitpress and import it first" in done.stderr.splitlines()[-1]


def test_no_file_has_a_name_that_other_readers_look_for(pressed_original: Path) -> None:
    names = {path.name for path in pressed_original.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")}
    assert weights == {"bitpress.safetensors", "bitpress-00001-of-00002.safetensors", "bitpress-00002-of-00002.safetensors"}
    assert not [name for name in names if name.endswith(".index.json") or name.startswith(("model", "pytorch_model"))]
    card = (pressed_original / "README.md").read_text()
    assert f"need the package bitpress: {INSTALL}." in card
    assert "pip install bitpress" not in card, "it is on no index"
    assert "import bitpress" in card


def to_former_mark(root: Path) -> Path:
    """Let config.json name the file that directories of version 2 named at first."""
    manifest, config = (json.loads((root / name).read_text()) for name in (MANIFEST_NAME, "config.json"))
    config["transformers_weights"] = WEIGHT_FILE_MARKS[1]
    (root / "config.json").write_text(json.dumps(config))
    manifest["files"]["config.json"] = {
        "bytes": (root / "config.json").stat().st_size,
        "sha256": hash_file(root / "config.json"),
    }
    (root / MANIFEST_NAME).write_text(json.dumps(manifest))
    return root


@torch.no_grad()
@pytest.mark.parametrize("kind", ["first version", "former mark"])
def test_an_older_directory_is_read_by_every_road(
    kind: str, pressed_dir: Path, pressed_original: Path, to_first_version: Callable[[Path], Path]
) -> None:
    if kind == "first version":
        old = to_first_version(pressed_dir)
        assert (old / "model.safetensors.index.json").exists()
    else:
        old = to_former_mark(pressed_dir)
    tokens = torch.arange(6, 22)[None]
    expected = bitpress.load(pressed_original)(input_ids=tokens).logits
    for model in (bitpress.load(old), AutoModelForCausalLM.from_pretrained(old), LlamaForCausalLM.from_pretrained(old)):
        assert torch.equal(model(input_ids=tokens).logits, expected)
    packed = bitpress.load(old, weights="packed")(input_ids=tokens).logits
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-4)
    engines = [bitpress.load(root, runtime="native").engine for root in (old, pressed_original)]
    a, b = (engine.forward(tokens[0].tolist(), logits="all") for engine in engines)
    assert torch.equal(a, b)
    assert verify_directory(old)["weights"] == describe_directory(old)["formats"].popitem()[1]["weights"]


def test_an_older_model_is_finished_and_an_older_job_is_refused(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], to_first_version: Callable[[Path], Path], tmp_path: Path
) -> None:
    source, recipe, out = tiny_model(), gptq_recipe(quantizer={"name": "rtn"}), tmp_path / "out"
    quantize_directory(source, out, recipe, proof=Proof(tokens=0))
    to_first_version(out)
    quantize_directory(source, out, recipe, proof=Proof(tokens=0))
    assert CompressedCheckpoint.open(out).manifest.bitpress == 1, "the same command leaves a finished model alone"
    job = json.loads((out / MANIFEST_NAME).read_text())["job"]
    shutil.rmtree(out)
    (out / JOB_DIRECTORY).mkdir(parents=True)
    (out / JOB_DIRECTORY / "job.json").write_text(json.dumps(job))
    with pytest.raises(UsageError, match=r"directory \(None there, 2 here\)"):
        quantize_directory(source, out, recipe, proof=Proof(tokens=0))
    quantize_directory(source, out, recipe, proof=Proof(tokens=0), force=True)
    assert CompressedCheckpoint.open(out).manifest.bitpress == 2
