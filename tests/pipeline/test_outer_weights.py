"""Embeddings and output head in few bits: every road reads the same, the plan knows the bytes, and what cannot work is said first."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitpress
from bitpress import native
from bitpress.checkpoints.compressed import HEAD_NAME, OUTER_NAME, CompressedCheckpoint
from bitpress.comparison.run import compare_recipes
from bitpress.comparison.variants import Variant
from bitpress.errors import BitpressError, FormatError, UsageError
from bitpress.formats import parse_format
from bitpress.formats.terms.packed import Packed
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.outer_weights import compress_tables
from bitpress.pipeline.quantize import plan_run
from bitpress.recipes import choose_method, make_method, make_recipe
from bitpress.runtime.hf.layers import PackedParameter
from bitpress.runtime.native.assemble import load_engine
from bitpress.runtime.native.options import EngineOptions

TOKENS = torch.tensor([[3, 90, 17, 200, 41, 5, 77, 90]])
# A model, what is asked for, and the matrices that are compressed with their files.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = [
    (
        "llama",
        {},
        {"embeddings": "int8-row", "head": "int4-g16"},
        {"model.embed_tokens": OUTER_NAME, "lm_head": HEAD_NAME},
    ),
    ("llama", {"tie_word_embeddings": True}, {"head": "int6-g16-zero"}, {"model.embed_tokens": HEAD_NAME}),
    ("llama", {"tie_word_embeddings": True}, {"embeddings": "nf4-g16"}, {"model.embed_tokens": OUTER_NAME}),
    (
        "gemma3",
        {},
        {"head": "int6-g16", "embeddings": "int6-g16"},
        {"model.embed_tokens": HEAD_NAME},
    ),  # scaled by its own module
    ("gpt2", {}, {"embeddings": {"weights": "int8-row", "quantizer": "hqq"}}, {"transformer.wte": OUTER_NAME}),
    ("mixtral", {}, {"head": {"weights": "int4-g16", "quantizer": "rtn"}}, {"lm_head": OUTER_NAME}),
]


@pytest.mark.parametrize(("architecture", "changes", "keys", "matrices"), CASES)
def test_every_road_reads_the_same(
    architecture: str,
    changes: dict[str, Any],
    keys: dict[str, Any],
    matrices: dict[str, str],
    tiny_model: Callable[..., Path],
    gptq_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    from bitpress.runtime.hf.bridge import BitpressConfig

    model, recipe = tiny_model(architecture, **changes), make_recipe({**gptq_recipe().model_dump(exclude_unset=True), **keys})
    plan, _, _ = plan_run(model, make_method(recipe.model_dump(exclude_unset=True)))
    report = bitpress.quantize(model, tmp_path / "out", recipe=recipe, proof_tokens=0)
    checkpoint = CompressedCheckpoint.open(tmp_path / "out")
    assert {name.removesuffix(".weight") for name in checkpoint.outer} == set(matrices)
    stored = 0
    for name, file in matrices.items():
        parts = [checkpoint.tensors[tensor] for tensor in checkpoint.stored[f"{name}.weight"]]
        assert {path.name for path, _ in parts} == {file}
        stored += sum(entry.nbytes for _, entry in parts)
    assert stored == plan.outer_bytes == report["size"]["bytes_outer"]
    assert checkpoint.bits_per_weight == plan.bits_per_weight, "the bits a weight are those of the blocks"

    decoded = bitpress.load(tmp_path / "out")
    with torch.no_grad():
        expected = decoded(TOKENS).logits
        for name in matrices:
            assert not torch.equal(parameter(decoded, name), parameter(AutoModelForCausalLM.from_pretrained(model), name))
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits, expected)
        assert torch.equal(bitpress.load(tmp_path / "out", weights="packed")(TOKENS).logits, expected)
        with pytest.warns(UserWarning, match="quantization_config"):
            packed = AutoModelForCausalLM.from_pretrained(
                tmp_path / "out", quantization_config=BitpressConfig(version=2, weights="packed")
            )
        assert torch.equal(packed(TOKENS).logits, expected)
    if native.available() and architecture in ("llama", "gemma3"):
        engine = load_engine(tmp_path / "out", EngineOptions(activations="none", head="keep"))
        assert engine.facts["head"] == "as stored"
        torch.testing.assert_close(engine.forward(TOKENS[0].numpy(), logits="all"), expected[0], rtol=0, atol=1e-2)


def parameter(model: Any, stem: str) -> torch.Tensor:
    found: torch.Tensor = model.get_parameter(f"{stem}.weight")
    return found


def test_a_head_is_fed_by_what_reaches_it(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Error feedback on the head's own inputs beats rounding on them, and a quantizer of its own is used."""
    values = gptq_recipe().model_dump(exclude_unset=True)
    rows = {}
    for name in ("gptq", "rtn"):
        keys = {**values, "head": {"weights": "int3-g16", "quantizer": name}}
        report = bitpress.quantize(tiny_model(), tmp_path / name, recipe=keys, proof_tokens=0)
        rows[name] = next(row for row in report["layers"] if row["name"] == "lm_head")
        assert report["job"]["recipe"]["head"]["quantizer"]["name"] == name
    assert rows["gptq"]["measured_on"] == "output"
    assert rows["gptq"]["error"] < 0.8 * rows["gptq"]["error_rounded"]
    assert rows["rtn"]["tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "keys", "error", "says"),
    [
        ({}, {"embeddings": "int4-tensor"}, FormatError, "embeddings int4-tensor.* row cannot be read by itself"),
        ({}, {"embeddings": "tcq2-row"}, FormatError, "row cannot be read by itself"),
        ({}, {"embeddings": "int8-g48"}, FormatError, "embeddings int8-g48: model.embed_tokens: .*48"),
        (
            {},
            {"embeddings": {"weights": "int8-row", "quantizer": "gptq"}},
            UsageError,
            "rows of a table are looked up; use rtn or hqq",
        ),
        ({}, {"head": {"weights": "int4-g16", "quantizer": "boa"}}, UsageError, "head: boa needs .* measured inside blocks"),
        ({}, {"head": "dfloat11"}, UsageError, "dfloat11 is a format of the blocks"),
        ({}, {"head": "int4-g17x"}, BitpressError, "int4-g17x"),
        ({}, {"head": {"weights": "int4-g16", "quantiser": "rtn"}}, UsageError, "Did you mean 'quantizer'"),
        ({"tie_word_embeddings": True}, {"embeddings": "int8-row", "head": "int6-g16"}, UsageError, "both are one matrix"),
        (
            {},
            {"quantizer": "rtn", "head": {"weights": "int4-g16", "quantizer": "gptq"}},
            UsageError,
            "needs calibration, and nothing",
        ),
    ],
)
def test_what_cannot_work_is_said_first(
    changes: dict[str, Any],
    keys: dict[str, Any],
    error: type[BitpressError],
    says: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        bitpress.quantize(tiny_model(**changes), tmp_path / "out", recipe={"weights": "int4-g16", **keys})
    assert not (tmp_path / "out").exists()


def test_a_comparison_leaves_them_alone(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    variant = Variant("a", 4, make_method({"weights": "int4-g16", "head": "int8-row"}))
    with pytest.raises(UsageError, match=r"a, 4 bits \(head\): a comparison is of the blocks"):
        compare_recipes(tiny_model(), tmp_path / "out", [variant])


@pytest.mark.parametrize("name", ["int8-row", "int4-g16-zero", "int3-4x8", "nf4-g16", "e8p-row", "int4-tensor"])
def test_rows_are_those_of_the_decoded_whole(name: str) -> None:
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    fmt = parse_format(name)
    params = fmt.fit(w)
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    index = torch.tensor([23, 0, 7, 7, 12])
    assert torch.equal(packed.rows(index), packed.dequantize()[index])


@pytest.mark.parametrize(
    ("changes", "values", "formats"),
    [
        ({}, {}, {"lm_head": "int8-row", "model.embed_tokens": "int8-row"}),
        ({"tie_word_embeddings": True}, {}, {"model.embed_tokens": "int8-row"}),
        ({}, {"head": "int6-g16"}, {"lm_head": "int6-g16", "model.embed_tokens": "int8-row"}),
        ({"tie_word_embeddings": True}, {"head": "int6-g16"}, {"model.embed_tokens": "int6-g16"}),
        ({"tie_word_embeddings": True}, {"embeddings": "keep"}, {}),
        ({}, {"embeddings": "keep"}, {"lm_head": "int8-row"}),
        ({}, {"skip": ["lm_head"]}, {"model.embed_tokens": "int8-row"}),
        ({}, {"skip": ["*", "!*.v_proj"]}, {}),
        ({}, {"weights": "dfloat11"}, {}),
        ({}, {"recipe": {"weights": "int4-g16"}}, {}),
    ],
)
def test_what_nobody_names_is_in_8_bits(
    changes: dict[str, Any], values: dict[str, Any], formats: dict[str, str], tiny_model: Callable[..., Path]
) -> None:
    skip = values.get("skip", ())
    outer = {key: values.get(key) for key in ("embeddings", "head")}
    weights = None if "recipe" in values else values.get("weights", "int4-g16")
    method = choose_method(values.get("recipe"), weights=weights, skip=skip, outer=outer)
    plan, _, _ = plan_run(tiny_model("llama", dtype="bfloat16", **changes), method)
    assert {found.planned.parameter.stem: found.planned.format.name for found in plan.outer} == formats
    again = make_method(method.resolved())
    assert (again.outer.keys(), again.auto) == (method.outer.keys(), method.auto), "the recorded recipe says the same"


def test_a_head_that_8_bits_would_cost_much_stays_as_stored(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model(), tmp_path / "wide")
    weights = load_file(tmp_path / "wide" / "model.safetensors")
    weights["lm_head.weight"][:, 0] *= 3000.0  # every row has one value that takes the whole range
    weights["lm_head.weight"][:, 1:] *= 30.0
    save_file(weights, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    calibration = {"calibration": str(text_file), "samples": 4, "length": 32}
    report = bitpress.quantize(tmp_path / "wide", tmp_path / "out", weights="int4-g16", proof_tokens=0, **calibration)
    checkpoint = CompressedCheckpoint.open(tmp_path / "out")
    assert checkpoint.outer == ("model.embed_tokens.weight",)
    assert torch.equal(bitpress.load(tmp_path / "out").lm_head.weight, weights["lm_head.weight"])
    (note,) = [item["what"] for item in report["notes"] if item["weight"] == "lm_head"]
    assert "kept in float32: int8-row would cost about" in note
    assert [row["key"] for row in report["outer"]] == ["embeddings"]
    assert report["size"]["bytes_outer"] == sum(row["bytes"] for row in report["outer"])
    asked = bitpress.quantize(
        tmp_path / "wide", tmp_path / "asked", weights="int4-g16", head="int8-row", proof_tokens=0, **calibration
    )
    assert [row["key"] for row in asked["outer"]] == ["embeddings", "head"]


def test_a_packed_table_decodes_what_is_looked_up(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitpress.quantize(tiny_model(), tmp_path / "out", weights="int4-g16", quantizer="rtn", proof_tokens=0)
    decoded, model = bitpress.load(tmp_path / "out"), bitpress.load(tmp_path / "out", weights="packed")
    with monkeypatch.context() as patch:
        patch.setattr(PackedParameter, "tensor", lambda self: pytest.fail("the whole table was decoded"))
        model(TOKENS.int())
    table, whole = model.get_input_embeddings(), decoded.get_input_embeddings()
    for wrong in (torch.tensor([[-1]]), torch.tensor([[384]]), torch.tensor([[True]]), torch.tensor([[1]], dtype=torch.int16)):
        with pytest.raises((IndexError, RuntimeError)) as expected:
            whole(wrong)
        with pytest.raises(type(expected.value)):
            table(wrong)
    empty = torch.zeros(1, 0, dtype=torch.int64)
    assert table(empty).shape == whole(empty).shape == (1, 0, 32)


@pytest.mark.parametrize(
    ("changes", "keys", "says"),
    [
        ({}, {"skip": ["lm_head"], "head": "int6-g16"}, "head int6-g16 and skip 'lm_head' contradict each other"),
        (
            {"tie_word_embeddings": True},
            {"head": "keep", "embeddings": "int8-row"},
            "embeddings names a format and the other key says keep",
        ),
        (
            {"tie_word_embeddings": True},
            {"head": {"weights": "int8-row", "quantizer": "gptq"}, "embeddings": {"weights": "int8-row", "quantizer": "hqq"}},
            "both must say the same",
        ),
        ({}, {"head": "int8-row", "overrides": [{"match": "lm_head", "weights": "int8-row"}]}, "goes under the key head"),
        ({}, {"head": {"quantizer": "rtn"}}, r"head\.weights: it is missing"),
    ],
)
def test_what_contradicts_itself_is_refused(
    changes: dict[str, Any], keys: dict[str, Any], says: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        bitpress.quantize(tiny_model(**changes), tmp_path / "out", recipe={"weights": "int4-g16", **keys})


def test_tied_matrices_go_under_either_name(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama", tie_word_embeddings=True)

    def planned(**values: Any) -> list[tuple[str, str, str]]:
        plan, _, _ = plan_run(path, make_method({"weights": "int4-g16", "embeddings": "auto", "head": "auto", **values}))
        assert not plan.outer or "lm_head.weight" not in plan.kept
        return [(f.key, f.planned.format.name, f.planned.method.quantizer.name) for f in plan.outer]

    assert planned() == [("head", "int8-row", "gptq")]
    assert planned(embeddings=None) == [("head", "int8-row", "gptq")]
    assert planned(skip=["lm_head"]) == planned(skip=["*embed_tokens"]) == planned(embeddings="keep") == []
    running = {"name": "gptq", "groups": "running"}
    assert planned(quantizer=running) == [("head", "int8-row", "rtn")], "no row is looked up through a map"
    assert planned(head={"weights": "int6-g16", "quantizer": "hqq"}) == [("head", "int6-g16", "hqq")]
    assert planned(embeddings={"weights": "int6-g16", "quantizer": "hqq"}, head="int6-g16") == [
        ("embeddings", "int6-g16", "hqq")
    ]


def test_single_settings_reach_what_is_chosen_by_default() -> None:
    def head(*sets: str, given: Any = "auto") -> tuple[str, str]:
        own = make_method({"weights": "int4-g16", "head": given}, sets).outer["head"]
        return own.format.name, own.quantizer.name

    assert head("head.weights=int6-g16") == ("int6-g16", "gptq")
    assert head("head.quantizer=rtn") == ("int8-row", "rtn")
    assert head("head.quantizer.damp=0.1") == ("int8-row", "gptq")
    assert head("head.quantizer=hqq", given="int6-g16") == ("int6-g16", "hqq")


def test_what_follows_the_original_starts_from_its_embeddings(
    tiny_model: Callable[..., Path], gptq_recipe: Callable[..., Any]
) -> None:
    method = make_method({**gptq_recipe().model_dump(exclude_unset=True), "quantizer": "gptaq", "embeddings": "int2-g16"})
    plan, model, _ = plan_run(tiny_model(), method)
    outer = model.load_outer_()
    _, decoded = compress_tables(plan.outer, outer)
    stream = CalibrationStream(model, method.needs, batch=2, follows_original=False)
    original = model.embed(TOKENS)
    stream.start_(TOKENS, None, lambda: model.fill_outer_(decoded))
    assert stream.beside is not None
    assert stream.hidden is not None
    assert torch.equal(stream.beside, original)
    assert torch.equal(stream.hidden, model.embed(TOKENS))
    assert not torch.equal(stream.hidden, original)


def test_a_head_with_wider_scales_is_told_as_it_is_stored(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model(), tmp_path / "small")
    weights = load_file(tmp_path / "small" / "model.safetensors")
    weights["lm_head.weight"] *= 1e-8  # scales below half precision
    save_file(weights, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    report = bitpress.quantize(tmp_path / "small", tmp_path / "out", weights="int4-g16", quantizer="rtn", proof_tokens=0)
    (head,) = [row for row in report["outer"] if row["key"] == "head"]
    assert head["format"] == "int8-row-fp32"
    checkpoint = CompressedCheckpoint.open(tmp_path / "out")
    stored = [checkpoint.tensors[name][1].nbytes for outer in checkpoint.outer for name in checkpoint.stored[outer]]
    assert report["size"]["bytes_outer"] == sum(stored)
