"""States: what models carry from block to block beside hidden states, against the whole model."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.models.hollow import hollow
from bitpress.models.opening import open_original
from bitpress.models.skeleton import build_config
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.gradients import measure_gradients
from bitpress.pipeline.plan import make_plan
from bitpress.progress import Silent
from bitpress.recipes import build_method, make_recipe

LAW = runpy.run_path(str(Path(__file__).resolve().parents[1] / "laws" / "architectures.py"))
NAMES = ["gemma3n_text", "gemma4_text", "zaya", "glm_moe_dsa"]
TOKENS = torch.randint(2, 258, (3, 24), generator=torch.Generator().manual_seed(5))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=[name for name in NAMES if name in LAW["names"]()])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    model = LAW["build"](request.param)
    LAW["save"](model, path)
    return request.param, path, model


def states(model: StreamedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    found = [model.embed(tokens)]
    for i in range(len(model.blocks)):
        model.load_block_(i)
        found.append(model.run_block(i, found[-1]))
        model.drop_block_(i)
    return found


def test_streamed_logits_are_the_models_own(case: tuple[str, Path, Any]) -> None:
    _, path, whole = case
    model, _ = open_original(path, torch.float32)
    model.load_outer_()
    last = states(model, TOKENS)[-1]
    with torch.no_grad():
        assert torch.equal(model.outputs(TOKENS, last), whole(TOKENS, use_cache=False).logits)
        # What follows the last block sees every token alone.
        picked = torch.tensor([3, 30, 70])
        alone = model.outputs(TOKENS.flatten()[picked, None], last.flatten(0, 1)[picked, None])[:, 0]
        torch.testing.assert_close(alone, whole(TOKENS, use_cache=False).logits.flatten(0, 1)[picked])


def test_a_part_of_a_state_is_the_state_of_a_part(case: tuple[str, Path, Any]) -> None:
    name, path, _ = case
    model, _ = open_original(path, torch.float32)
    model.load_outer_()
    width = model.width
    full, part = states(model, TOKENS), states(model, TOKENS[:1, :16])
    assert full[0].shape == (3, 24, width)
    for i, (whole, some) in enumerate(zip(full, part, strict=True)):
        torch.testing.assert_close(whole[:1, :16], some, msg=lambda text, i=i: f"{name}, before block {i}: {text}")


def test_texts_follow_each_other_without_traces(case: tuple[str, Path, Any]) -> None:
    _, path, _ = case
    model, _ = open_original(path, torch.float32)
    model.load_outer_()
    first = states(model, TOKENS)[-1]
    states(model, TOKENS.flip(0))
    assert torch.equal(states(model, TOKENS)[-1], first)


def test_a_plain_model_stores_hidden_states_alone(tmp_path: Path) -> None:
    LAW["save"](LAW["build"]("llama"), tmp_path)
    model, _ = open_original(tmp_path, torch.float32)
    model.load_outer_()
    assert model.width == 64
    assert torch.equal(model.embed(TOKENS), model.model.get_input_embeddings()(TOKENS))


def test_gradients_go_through_shared_keys_and_values(tmp_path: Path) -> None:
    whole = LAW["build"]("gemma4_text")
    LAW["save"](whole, tmp_path)
    model, _ = open_original(tmp_path, torch.float32)
    model.load_outer_()
    plan = make_plan(model, build_method(make_recipe({"weights": "int4-g16-zero", "quantizer": {"name": "rtn"}})), {})
    found = measure_gradients(model, plan.by_block(), TOKENS, {"sensitivity"}, lambda: None, Silent())
    expected = {name: torch.zeros_like(value) for name, value in found.items()}
    for text in TOKENS.split(1):
        whole.zero_grad()
        whole(text, labels=text, use_cache=False).loss.backward()
        for name in expected:
            expected[name] += whole.get_parameter(name).grad.square() / len(TOKENS)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert float(found["model.layers.0.self_attn.k_proj.weight"].sum()) > 0  # block 2 reads its keys


def test_a_hollow_model_takes_no_memory_and_is_itself_again() -> None:
    model = StreamedModel(build_config({"model_type": "llama"}), None, torch.bfloat16).model
    before = {name: value for name, value in model.named_parameters()}
    with hollow(model):
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        head = model.get_output_embeddings().weight
        assert not torch.equal(head[0], head[1])
    assert sum(storages.values()) < 32 * 2**20  # of 13 GB
    assert all(value is before[name] for name, value in model.named_parameters())
