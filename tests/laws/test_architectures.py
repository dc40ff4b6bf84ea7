"""Every architecture goes the whole road, or is refused in words: one of every kind here, all of them before a release."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress.errors import CheckpointError
from bitpress.models.skeleton import build_config, build_skeleton
from bitpress.models.tasks.causal_lm import CausalLM
from bitpress.models.tasks.table import find_task
from bitpress.progress import Silent

ROOT = Path(__file__).resolve().parents[2]
LAW = runpy.run_path(str(Path(__file__).with_name("architectures.py")))
NAMES = LAW["names"]()

# One of every structure, by what is particular to it.
KINDS = {
    "bamba": "blocks return a pair; state space and attention by turns",
    "codegen": "attention and MLP beside each other",
    "deepseek_v3": "low-rank attention, experts from some layer on",
    "deepseek_v4": "four streams; experts chosen by the token itself",
    "dots3_note": "a text model beside towers for other inputs",
    "falcon_mamba": "state space alone",
    "gemma2": "norms before and after, soft caps",
    "gemma3n_text": "four streams, inputs of every layer, shared keys and values, weights of 4 columns",
    "gemma4": "a wrapper of several inputs around gemma4_text",
    "gemma4_text": "inputs of every layer, shared keys and values",
    "git": "a tower that is larger than the text's blocks",
    "glm_moe_dsa": "blocks return a pair whose second is for the next",
    "gpt2": "Conv1D",
    "gpt_oss": "experts stored transposed, with biases",
    "lfm2": "convolutions and attention by turns",
    "jetmoe": "experts as the 3-d weight of a module",
    "llama4_text": "experts stored transposed, multiplied in one batch; attention in chunks",
    "longcat_flash": "two attentions and MLPs a block, experts that compute nothing",
    "mixtral": "experts",
    "nemotron_h": "state space, attention and experts by turns",
    "openai-gpt": "blocks return a list",
    "opt": "biases, learned positions",
    "qwen3_next": "linear attention, a shared expert",
    "recurrent_gemma": "linear recurrences",
    "rwkv": "recurrences, weights that the class itself would rescale",
    "xlstm": "blocks return their cells' states too",
    "zaya": "a router's state goes from block to block",
}
# What a refusal must say.
REFUSED = {
    "bart": "bart is an encoder-decoder model, or the decoder of one, not a causal language model",
    "bert": "bert is an encoder, not a causal language model",
    "blt": "do not work on one vector a token",
    "gemma4_assistant": "cannot be run block by block",
    "hrm_text": "runs its blocks more than once",
    "inkling2_text": "more than the block before it returned",
    "trocr": "trocr is the decoder of an encoder-decoder model, not a causal language model",
    "xlnet": "looks at later tokens",
    "zamba": "blocks that share weights cannot be compressed one by one",
}


def known(names: Any) -> list[str]:
    return [name for name in names if name in NAMES]


@pytest.fixture(autouse=True)
def _no_chatter() -> None:
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", known(KINDS))
def test_one_of_every_kind_works(name: str, tmp_path: Path, text_file: Path) -> None:
    assert LAW["walk_the_road"](name, tmp_path, LAW["recipes"](text_file)["rounding"]) == "works"


# Experts that are stored transposed and multiplied in one batch; the release tries all others.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", known(["llama4_text"]))
def test_presets_suit_experts(name: str, tmp_path: Path, text_file: Path) -> None:
    assert LAW["walk_the_road"](name, tmp_path, LAW["recipes"](text_file)["preset"]) == "works"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", known(REFUSED))
def test_what_cannot_work_is_refused_in_one_line(name: str, tmp_path: Path, text_file: Path) -> None:
    outcome = LAW["walk_the_road"](name, tmp_path, LAW["recipes"](text_file)["rounding"])
    assert REFUSED[name] in outcome
    assert "\n" not in outcome
    assert not (tmp_path / "out").exists()


@pytest.mark.release
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", ["rounding", "default", "preset"])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_works_or_is_refused(name: str, recipe: str, tmp_path: Path, text_file: Path) -> None:
    try:
        outcome = LAW["walk_the_road"](name, tmp_path, LAW["recipes"](text_file)[recipe])
    except ImportError as error:
        pytest.skip(str(error).split(". ")[0])
    assert outcome == "works" or len(outcome) > 20


@pytest.mark.parametrize("model_type", ["t5", "vit", "whisper", "clip", "musicgen", "xlm-roberta", "reformer"])
def test_what_is_no_causal_language_model_is_called_so(model_type: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^here: {model_type} is .*, not a causal language model; bitpress quantizes causal"
    ):
        find_task(build_config({"model_type": model_type}), "here")


def test_an_encoder_made_a_decoder_is_a_causal_language_model() -> None:
    assert isinstance(find_task(build_config({"model_type": "bert", "is_decoder": True}), "here"), CausalLM)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def lacking(*args: Any, **kwargs: Any) -> None:
        raise ImportError("the tower requires the timm library")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", lacking)
    with pytest.raises(
        CheckpointError, match="llama needs a package that is not installed: the tower requires the timm library"
    ):
        build_skeleton(build_config({"model_type": "llama"}), torch.float32)


class _Stopping(Silent):
    """Breaks off after a number of units."""

    def __init__(self, left: int) -> None:
        self.left = left

    def advance(self, unit: str, **figures: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    # What is particular to the second, the first has too.
    [
        pytest.param(name, marks=() if i == 0 else pytest.mark.release)
        for i, name in enumerate(known(["gemma3n_text", "gemma4_text"]))
    ],
)
def test_the_default_works_and_a_broken_run_ends_in_the_same_bytes(name: str, tmp_path: Path, text_file: Path) -> None:
    recipe = LAW["recipes"](text_file)["default"]
    assert LAW["walk_the_road"](name, tmp_path, recipe) == "works"
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        bitpress.quantize(tmp_path / "source", broken, recipe=recipe, proof_tokens=0, progress=_Stopping(3))
    bitpress.quantize(tmp_path / "source", broken, recipe=recipe, proof_tokens=0)
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        assert file.read_bytes() == (broken / file.name).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_few_inputs_are_kept_with_the_reason_and_many_are_an_error(tmp_path: Path) -> None:
    from bitpress.errors import FormatError
    from bitpress.pipeline.quantize import plan_run
    from bitpress.recipes import build_method, make_recipe

    LAW["save"](LAW["build"]("gemma3n_text"), tmp_path)
    plan, _, _ = plan_run(tmp_path, build_method(make_recipe({"weights": "int4-g32-zero", "quantizer": {"name": "rtn"}})))
    coefficients = [name for name in plan.kept if "prediction_coefs" in name]
    assert len(coefficients) == 4
    assert {plan.kept[name] for name in coefficients} == {"fewer inputs (4) than the group (32)"}
    assert not {w.parameter.name for w in plan.weights} & set(coefficients)
    with pytest.raises(FormatError, match=r"in_features=64 is not a multiple of 48"):
        plan_run(tmp_path, build_method(make_recipe({"weights": "int4-g48-zero", "quantizer": {"name": "rtn"}})))
    with pytest.raises(FormatError, match=r"every weight has fewer inputs \(\d+\) than the group \(4096\)"):
        plan_run(tmp_path, build_method(make_recipe({"weights": "int4-g4096-zero", "quantizer": {"name": "rtn"}})))


def test_the_document_has_every_kind_with_its_outcome() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "list_architectures.py"))
    rows = dict(script["rows_of"]((ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")))
    assert len(rows) > 150
    for name in KINDS:
        assert rows[name] == "works", "run make docs"
    for name, words in REFUSED.items():
        assert words in rows[name], "run make docs"


@pytest.mark.filterwarnings("ignore")
def test_towers_are_left_out_where_transformers_builds_the_text_model_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    from bitpress.models.opening import open_original

    LAW["save"](AutoModelForImageTextToText.from_config(LAW["small_config"]("llama4")), tmp_path)
    model, loader = open_original(tmp_path, torch.float32)
    assert model.stack == "model.layers"
    assert {name.split(".")[0] for name in loader.names.left_out} == {"multi_modal_projector", "vision_model"}
    tensors = load_file(tmp_path / "model.safetensors")
    stray = {**tensors, "language_model.model.layers.0.stray.weight": torch.zeros(2, 2)}
    save_file(stray, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stray\.weight' of the checkpoint belongs to no parameter"):
        open_original(tmp_path, torch.float32)
