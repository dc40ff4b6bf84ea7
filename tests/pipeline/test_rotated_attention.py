"""Queries and keys that are rotated before they are rounded, and offsets of rounded probabilities: what they do, stored and computed alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import bitpress
from bitpress.calibration.attention import Attention
from bitpress.checkpoints.compressed import MANIFEST_NAME, CompressedCheckpoint
from bitpress.cli.reports import describe_directory
from bitpress.corrections.softmax_bias import ProbabilityErrors, SoftmaxBias
from bitpress.errors import CheckpointError, FormatError, UsageError
from bitpress.formats import ActivationFormat, AttentionOperands, Hadamard, ProbabilityOffset, parse_format
from bitpress.models.attention import forget_attention_, round_attention_, watching
from bitpress.models.opening import open_streamed
from bitpress.models.walk import Stream, walk
from bitpress.pipeline.quantize import plan_run
from bitpress.recipes import NAMED_RECIPES, make_method, make_recipe
from bitpress.transforms.qk_hadamard import QKHadamard

TOKENS = torch.arange(6, 38).reshape(2, 16)
ROTATED = {"keys": "int4-row-zero", "queries": "int8-row", "transforms": ["qk-hadamard"]}
STATIC = {"keys": {"format": "int4-tensor", "parameters": "static"}, "transforms": [{"name": "qk-hadamard", "signs": False}]}


def corrected(each: str, format: Any = "int4-row") -> dict[str, Any]:
    return {"probabilities": format, "corrections": [{"name": "softmax-bias", "each": each}]}


def quantize(model: Path, out: Path, **keys: Any) -> dict[str, Any]:
    recipe = {"weights": "int8-row", "quantizer": "rtn", "calibration": {"samples": 2, "length": 32}, **keys}
    return bitpress.quantize(model, out, recipe=recipe, proof_tokens=0)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def streamed(path: Path) -> torch.Tensor:
    model = open_streamed(path, torch.float32)
    model.load_outer_()
    stream = Stream(model, [TOKENS])
    stream.start_()
    walk(model, [stream])
    return model.outputs(TOKENS, stream.states[0])


@pytest.mark.parametrize(
    ("family", "keys", "told"),
    [
        ("llama", {**ROTATED, **corrected("head")}, "probabilities int4-row dynamic, an offset for each head"),
        ("gpt2", {**STATIC, **corrected("query")}, "keys int4-tensor static, rotated"),
        ("opt", corrected("attention", {"format": "int4-tensor", "parameters": "static"}), None),
    ],
)
def test_every_road_computes_them_to_the_bit(
    family: str, keys: dict[str, Any], told: str | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny_model(family), out, **keys)
    operands = CompressedCheckpoint.open(out).load_attention()
    assert len(operands) == 2
    for own in operands.values():
        assert (own.rotation is not None) == ("transforms" in keys)
        assert (own.offset is not None) == ("corrections" in keys)
        assert AttentionOperands.build(own.spec(), own.tensors()).spec() == own.spec()
    models = {weights: bitpress.load(out, weights=weights, dtype="fp32") for weights in ("decoded", "packed")}
    models["transformers"] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    got = {name: logits(model) for name, model in models.items()} | {"streamed": streamed(out)}
    assert all(torch.equal(value, got["decoded"]) for value in got.values())
    assert told is None or f"{told} (simulated)" in describe_directory(out)["attention"]
    # Without what is under test the same operands give something else, and nothing far away.
    plain = {name: AttentionOperands(**dict(own.items())) for name, own in operands.items()}
    forget_attention_(models["packed"])
    round_attention_(models["packed"], plain)
    without = logits(models["packed"])
    assert not torch.equal(without, got["decoded"])
    assert float((without - got["decoded"]).square().mean()) < 0.1 * float(without.square().mean())


@pytest.mark.parametrize(("row", "signs"), [(16, True), (24, True), (64, False)])
def test_a_rotation_changes_no_score_and_spreads_outliers(row: int, signs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 40, row, generator=generator, dtype=torch.float64)
    k[..., 1] *= 50
    turned = AttentionOperands(rotation=QKHadamard(signs=signs).plan(row)).turned
    scores = q @ k.mT
    assert float((turned(q) @ turned(k).mT - scores).abs().max() / scores.abs().max()) < 1e-6
    assert not torch.allclose(turned(k), k)
    keys = ActivationFormat(parse_format("int4-row-fp32"))
    plain = (q @ keys.round(k.float()).double().mT - scores).square().mean()
    rotated = (turned(q) @ keys.round(turned(k).float()).double().mT - scores).square().mean()
    assert rotated < plain
    if not signs and row == 64:  # the matrix of the public code: a Walsh matrix alone
        assert torch.allclose(turned(torch.eye(64))[0], torch.full((64,), 1 / 8))


def test_static_parameters_are_those_of_rotated_keys(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    scales = {}
    for name, transforms in {"plain": [], "rotated": ["qk-hadamard"]}.items():
        quantize(tiny_model("llama"), tmp_path / name, keys=STATIC["keys"], transforms=transforms)
        found = CompressedCheckpoint.open(tmp_path / name).load_attention()
        scales[name] = [float(own.tensors()["keys.scale"]) for own in found.values()]
    assert scales["plain"] != scales["rotated"]


def test_offsets_are_the_mean_errors_of_what_a_query_sees() -> None:
    """The formula of the correction, against a plain loop over queries and keys."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 4, 12, 8, generator=generator)
    attention = Attention(query, key[:, :2], key[:, :2], None, causal=True, scale=1.0)
    fmt = ActivationFormat(parse_format("int3-row-fp32"))
    errors = ProbabilityErrors()
    for p in attention.scores(0):
        errors.add(p, fmt.round(p))
    scores = torch.cat([torch.nn.functional.pad(p, (0, 12 - p.shape[-1])) for p in attention.scores(0)], 1)
    wanted = []
    for head in range(4):
        missing = [scores[head, t, s] - fmt.round(scores[head, t, : t + 1])[s] for t in range(12) for s in range(t + 1)]
        wanted.append(torch.stack(missing).mean())
    by_head = SoftmaxBias().choose(errors).values
    assert by_head is not None
    torch.testing.assert_close(by_head, torch.stack(wanted), rtol=1e-4, atol=1e-7)
    of_all = SoftmaxBias(each="attention").choose(errors).values
    assert of_all is not None
    torch.testing.assert_close(of_all[0], torch.stack(wanted).mean(), rtol=1e-4, atol=1e-7)
    rounded = fmt.round(scores)
    fixed = SoftmaxBias().choose(errors).apply(rounded, scores)
    assert float((fixed - scores).sum().abs()) < 1e-3 < float((rounded - scores).sum().abs())
    by_query = SoftmaxBias(each="query").choose(None).apply(rounded, scores)
    torch.testing.assert_close(by_query.sum(-1), torch.ones(4, 12))
    assert torch.equal(by_query == 0, scores == 0), "what a query does not see stays at 0"


def test_offsets_are_absorbed_by_the_parameters_of_the_codes() -> None:
    """scale (code - zero) + offset is scale (code - z) with another zero point, as the paper stores it."""
    fmt = parse_format("int8-tensor-zero-fp32")
    p = torch.softmax(torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(2)) * 2, -1)
    own = ActivationFormat.static(fmt, fmt.fit(torch.tensor([[0.0, 1.0]])))
    offset, params = ProbabilityOffset("attention", torch.tensor([0.0007])), own.stored()
    codes = torch.clamp(torch.round(p / params["scale"]) + params["zero"], 0, 255)
    absorbed = (codes - (params["zero"] - 0.0007 / params["scale"])) * params["scale"]
    torch.testing.assert_close(offset.apply(own.round(p), p), absorbed, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("each", ["head", "query"])
def test_a_token_after_the_other_gives_what_all_give_at_once(each: str, tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    rotation, offset = QKHadamard().plan(16), ProbabilityOffset("head", torch.tensor([0.001, -0.001]))
    own = AttentionOperands(
        keys=ActivationFormat(parse_format("int4-row-zero")),
        probabilities=ActivationFormat(parse_format("int8-row")),
        rotation=rotation,
        offset=offset if each == "head" else ProbabilityOffset("query"),
    )
    round_attention_(model, {f"model.layers.{i}.self_attn": own for i in range(2)})
    cache = DynamicCache(config=model.config)
    rows = [model(input_ids=TOKENS[:, at : at + 1], cache=cache).logits for at in range(TOKENS.shape[1])]
    whole = logits(model)
    # Sums in another order, which may move a value over the edge between two codes of 4-bit keys.
    close = (torch.cat(rows, 1) - whole).abs() < 1e-3 * float(whole.abs().max())
    assert float(close.float().mean()) > 0.9


def test_the_calibrated_offset_takes_the_bias_away(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "out", **corrected("head", {"format": "int4-tensor", "parameters": "static"}))
    operands = CompressedCheckpoint.open(tmp_path / "out").load_attention()
    model = bitpress.load(tmp_path / "out", dtype="fp32")
    errors = {name: [0.0, 0.0] for name in operands}

    def look(name: str, p: torch.Tensor) -> None:
        own = operands[name]
        assert own.probabilities is not None
        assert own.offset is not None
        rounded = own.probabilities.round(p)
        for at, got in enumerate((torch.where(p > 0, rounded, 0.0), own.offset.apply(rounded, p))):
            errors[name][at] += float((got - p).sum())

    watches = {name: {"probabilities": lambda p, name=name: look(name, p)} for name in operands}
    with watching(model, watches), torch.no_grad():
        model(input_ids=torch.arange(6, 70).reshape(2, 32), use_cache=False)  # as long as the windows of calibration
    assert all(abs(after) < 0.1 * abs(before) for before, after in errors.values()), errors


def test_the_plan_says_what_a_rotation_costs(tiny_model: Callable[..., Path]) -> None:
    assert QKHadamard.operations(8) == 8 * 3  # three steps of additions
    assert QKHadamard.operations(24) == 24 * (12 + 1)  # a matrix of order 12, and a step
    plan, _, _ = plan_run(tiny_model("llama"), make_method({"weights": "int8-row", "quantizer": "rtn", **ROTATED}))
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    heads, row = config.num_attention_heads + config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert plan.as_dict()["rotation_operations"] == 2 * heads * QKHadamard.operations(row)
    assert plan_run(tiny_model("llama"), make_method({"quantizer": "rtn"}))[0].rotation_operations == 0


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"transforms": ["qk-hadamard"]}, "qk-hadamard serves the rounding of queries or keys"),
        ({"transforms": ["qk-hadamard"], "values": "int8-row"}, "add keys"),
        ({"corrections": ["softmax-bias"], "keys": "int8-row"}, "serves the rounding of probabilities"),
        ({"keys": "int8-row", "transforms": ["qk-hadamard", "qk-hadamard"]}, "named twice"),
        ({**ROTATED, "transforms": [{"name": "qk-hadamard", "signs": "maybe"}]}, "qk-hadamard: signs"),
        (corrected("row"), "each: 'row' is not one of attention, head or query"),
    ],
)
def test_parts_that_serve_nothing_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_recipe({"quantizer": "rtn", **keys})


KEYS = {"format": "int8-row", "parameters": "dynamic"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"rotation": {"map": "hadamard", "size": "8"}}, "neither is rounded"),
        ({"keys": KEYS, "rotation": {"map": "hadamard", "size": "eight"}}, "map: hadamard and the size"),
        ({"keys": KEYS, "rotation": {"map": "kronecker", "size": "8"}}, "map: hadamard and the size"),
        ({"keys": KEYS, "rotation": {"map": "hadamard", "size": "4099"}}, "does not fit a width"),
        ({"keys": KEYS, "rotation": {"map": "hadamard", "size": "8"}}, r"rotation\.signs' is missing"),
        ({"keys": KEYS, "offset": {"each": "query"}}, "these are not rounded"),
        ({"probabilities": KEYS, "offset": {"each": "head"}}, "specified by each"),
        ({"probabilities": KEYS, "offset": {"each": "head", "heads": "0"}}, "'0' heads"),
        ({"probabilities": KEYS, "offset": {"each": "attention"}}, r"offset\.values' is missing"),
    ],
)
def test_a_manifest_that_is_wrong_about_them_is_refused(
    spec: dict[str, Any], says: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    quantize(tiny_model("llama"), tmp_path / "out")
    path = tmp_path / "out" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention": {"model.layers.0.self_attn": spec}}))
    with pytest.raises(CheckpointError, match=says):
        bitpress.load(tmp_path / "out", dtype="fp32")


def test_what_is_stored_for_another_width_is_refused_when_it_runs() -> None:
    small = Hadamard.random(8, 8, torch.Generator().manual_seed(0))
    with pytest.raises(FormatError, match="16 channels a head, and their rotation 8"):
        AttentionOperands(rotation=small).turned(torch.zeros(1, 2, 3, 16))
    p = torch.full((4, 2, 2), 0.5)
    with pytest.raises(FormatError, match="4 heads of queries have offsets for 3"):
        ProbabilityOffset("head", torch.zeros(3)).apply(p, p)


def test_quarot_with_a_cache_of_4_bits_has_all_four_rotations(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    keys = {**NAMED_RECIPES["quarot-kv4"].keys, "quantizer": "rtn"}
    quantize(tiny_model("llama"), tmp_path / "out", **keys)
    (own, _) = CompressedCheckpoint.open(tmp_path / "out").load_attention().values()
    assert own.rotation is not None
    assert dict(own.items()).keys() == {"keys", "values"}
    assert torch.equal(logits(bitpress.load(tmp_path / "out", dtype="fp32")), streamed(tmp_path / "out"))
