"""GGUF files: a tiny Llama is written with the gguf package, loaded, re-gauged and saved; broken files are refused."""

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from progress_record import Said
from tokenizers.pre_tokenizers import ByteLevel

from bitpress.checkpoints.gguf_file import GgufModel, load_gguf, save_directory
from bitpress.checkpoints.gguf_header import describe_given, read_gguf_header
from bitpress.checkpoints.given import read_given
from bitpress.checkpoints.named import resolve_model
from bitpress.checkpoints.regauge import OUTLIER_FACTOR, OUTLIERS, SPREAD, plant_outliers_, regauge_
from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.cli.reports import told_original
from bitpress.errors import CheckpointError
from bitpress.exchange.table import open_source
from bitpress.figures import ratio_text
from bitpress.pipeline.quantize import Proof, plan_run, quantize_directory
from bitpress.progress import Silent
from bitpress.recipes import build_method, make_recipe

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 32, 48, 2, 4, 2
TOKENS = ["<|end|>", *sorted(ByteLevel.alphabet()), "Ġa", "ĠĠ"]
TEMPLATE = "{% for m in messages %}<|end|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def write_tiny(path: Path, **changes: Any) -> None:
    """Write a Llama of two blocks in float32; `changes` spoil it."""
    split, small = changes.get("split", 0), changes.get("small_first", False)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split, small_first_shard=small)
    writer.add_block_count(changes.get("layers", LAYERS))
    writer.add_context_length(64)
    writer.add_embedding_length(changes.get("hidden", HIDDEN))
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(changes.get("merges", ["Ġ a", "Ġ Ġ"]))
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if "q8" in changes:
        writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    numbers = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if name != changes.get("without"):
            value = (numbers.standard_normal(shape) * 0.2).astype(np.float32)
            if name == changes.get("not_a_number"):
                value[0] = np.nan
            if "q8" in changes and len(shape) == 2 and shape[1] % 32 == 0:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, value)

    add("token_embd.weight", len(TOKENS), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for i in range(LAYERS):
        for name, *shape in (
            ("attn_norm", HIDDEN),
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN // 2, HIDDEN),
            ("attn_v", HIDDEN // 2, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_norm", HIDDEN),
            ("ffn_gate", INTERMEDIATE, HIDDEN),
            ("ffn_up", INTERMEDIATE, HIDDEN),
            ("ffn_down", HIDDEN, INTERMEDIATE),
        ):
            add(f"blk.{i}.{name}.weight", *shape)
    for name in changes.get("extra", ()):
        add(name, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> GgufModel:
    return load_gguf(tiny, Silent())


def logits(model: GgufModel, state: dict[str, torch.Tensor]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    built = AutoModelForCausalLM.from_config(model.config, dtype=torch.float64)
    built.load_state_dict({name: value.double() for name, value in state.items()})
    with torch.inference_mode():
        return torch.as_tensor(built.eval()(torch.arange(1, 40)[None]).logits)


def test_header_counts_every_value(tiny: Path) -> None:
    header = read_gguf_header(tiny)
    assert header.metadata["llama.block_count"] == LAYERS
    assert header.metadata["tokenizer.ggml.tokens"] == len(TOKENS)
    assert header.tensors["blk.1.ffn_up.weight"].numel == HIDDEN * INTERMEDIATE
    assert len(header.tensors) == 2 + 9 * LAYERS


def test_saved_directory_is_a_model(loaded: GgufModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_directory(loaded, tmp_path)
    source = SourceCheckpoint.open(tmp_path)
    assert source.config["rope_parameters"]["rope_theta"] == source.config["rope_theta"] == 50000.0
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.config["tie_word_embeddings"] is True
    assert "quantization_config" not in source.config
    assert "lm_head.weight" not in source.tensors
    for name, value in loaded.state.items():
        if name != "lm_head.weight":
            assert torch.equal(source.read(name), value.to(torch.bfloat16))
    assert capfd.readouterr() == ("", "")
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_values_are_those_of_the_file(tiny: Path, loaded: GgufModel) -> None:
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tiny).tensors}
    up = torch.from_numpy(values["blk.1.ffn_up.weight"].copy())
    assert torch.equal(loaded.state["model.layers.1.mlp.up_proj.weight"], up)


def test_a_file_is_a_source_of_its_values(tiny: Path, loaded: GgufModel) -> None:
    source = open_source(tiny)
    assert {*source.names, "lm_head.weight"} == {*loaded.state, "lm_head.weight"}
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"):
        value = source.read(name)
        assert isinstance(value, torch.Tensor)
        assert torch.equal(value, loaded.state[name])
    with pytest.raises(CheckpointError, match="holds no 'nothing'"):
        source.read("nothing")


def test_digits_stand_alone(loaded: GgufModel, tmp_path: Path) -> None:
    save_directory(loaded, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    # The two spaces are one token: the digit does not take the second one, as it would in GPT-2's way to split.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 64


def test_unknown_way_to_split_is_said(tmp_path: Path) -> None:
    said = Said()
    write_tiny(tmp_path / "x.gguf", pre="nobody-knows")
    load_gguf(tmp_path / "x.gguf", said)
    assert len(said.lines) == 1
    assert "nobody-knows" in said.lines[0]


def test_every_tensor_is_followed_and_the_file_is_parsed_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, before = [], gguf.GGUFReader._build_fields

    def build(self: gguf.GGUFReader, *place: int) -> Any:
        parsed.append(self)
        return before(self, *place)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", build)
    reader, said = gguf.GGUFReader, Said()
    load_gguf(tiny, said)
    tensors = len(read_gguf_header(tiny).tensors)
    assert said.stages == [(f"reading {tiny.name}", tensors)]
    assert len(said.units) == tensors
    assert len(parsed) == 1
    assert gguf.GGUFReader is reader, "other users of the package get their own again"


def test_regauged_model_computes_the_same(loaded: GgufModel) -> None:
    state = dict(loaded.state)
    regauge_(state, loaded.config, seed=1)
    before, after = logits(loaded, loaded.state), logits(loaded, state)
    # Float64 throughout: some hundred roundings of 2**-53 each in every sum, far below 1e-12 of the logits' size.
    assert (before - after).abs().max() < 1e-12 * before.abs().max()
    changed = [name for name in state if not torch.equal(state[name].double(), loaded.state[name].double())]
    assert len(changed) == 9 * LAYERS


def test_planted_outliers_change_norms_and_what_reads_them_and_nothing_else(loaded: GgufModel) -> None:
    state = dict(loaded.state)
    plant_outliers_(state, loaded.config, seed=1)
    before, after = logits(loaded, loaded.state), logits(loaded, state)
    assert (before - after).abs().max() < 1e-12 * before.abs().max()
    changed = [name for name in state if not torch.equal(state[name].double(), loaded.state[name].double())]
    assert len(changed) == 7  # of the first block alone: two norms and five readers
    ratio = state["model.layers.0.input_layernorm.weight"] / loaded.state["model.layers.0.input_layernorm.weight"].double()
    assert int((ratio > OUTLIER_FACTOR / 2).sum()) == OUTLIERS


def test_factors_come_in_the_stated_order(loaded: GgufModel) -> None:
    state = dict(loaded.state)
    regauge_(state, loaded.config, seed=7)
    generator = torch.Generator().manual_seed(7)
    kv = HIDDEN // 2
    factors = [
        torch.exp(SPREAD * torch.randn(size, generator=generator, dtype=torch.float64))
        for _ in range(LAYERS)
        for size in (HIDDEN, HIDDEN, INTERMEDIATE, kv)
    ]
    attention, mlp, down, o = factors[4:]
    block = "model.layers.1"

    def ratio(name: str) -> torch.Tensor:
        return state[f"{block}.{name}.weight"] / loaded.state[f"{block}.{name}.weight"].double()

    torch.testing.assert_close(ratio("self_attn.q_proj")[0], attention)
    torch.testing.assert_close(ratio("input_layernorm"), 1 / attention)
    torch.testing.assert_close(ratio("mlp.gate_proj")[0], mlp)
    torch.testing.assert_close(ratio("mlp.down_proj")[0], down)
    torch.testing.assert_close(ratio("mlp.up_proj"), mlp / down[:, None])
    torch.testing.assert_close(ratio("self_attn.v_proj"), attention / o[:, None])
    # Heads 0 and 1 share the first key-value head.
    head = HIDDEN // HEADS
    torch.testing.assert_close(ratio("self_attn.o_proj")[0], torch.cat([o[:head], o[:head], o[head:], o[head:]]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"without": "output_norm.weight"}, "holds"),
        ({"extra": ["rope_freqs.weight"]}, "no key for rope_freqs.weight"),
        ({"extra": ["blk.0.surprise.weight"]}, "holds"),
        ({"layers": 10**9}, "block_count"),
        ({"hidden": 2**20}, "holds"),
        ({"not_a_number": "blk.0.ffn_up.weight"}, "model.layers.0.mlp.up_proj.weight holds a NaN"),
        ({"merges": ["Ġ zz"]}, "transformers cannot read"),
    ],
)
def test_well_formed_files_that_are_no_model(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write_tiny(tmp_path / "x.gguf", **changes)
    with pytest.raises(CheckpointError, match=text):
        load_gguf(tmp_path / "x.gguf", Silent())


def test_broken_files(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    path = tmp_path / "x.gguf"
    cases = {
        "empty": b"",
        "text": b"hello, this is no model at all",
        "random": random.Random(0).randbytes(5000),
        "magic only": b"GGUF",
        "version": data[:4] + struct.pack("<I", 1) + data[8:],
        "big endian": data[:4] + struct.pack(">I", 3) + data[8:],
        "too many tensors": data[:8] + struct.pack("<Q", 2**40) + data[16:],
        "too many pairs": data[:16] + struct.pack("<Q", 2**40) + data[24:],
        "cut in the header": data[:3000],
        "cut in the data": data[:-64],
    }
    for name, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_gguf(path, Silent())
        assert "\n" not in str(caught.value), name


def test_spoiled_bytes_never_escape(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    end_of_header = data.find(b"blk.1.ffn_down.weight") + 60
    draw = random.Random(3)
    refused = 0
    for _ in range(40):
        spoiled = bytearray(data)
        for _ in range(2):
            spoiled[draw.randrange(end_of_header)] = draw.randrange(256)
        (tmp_path / "x.gguf").write_bytes(spoiled)
        try:
            load_gguf(tmp_path / "x.gguf", Silent())
        except CheckpointError:
            refused += 1
    assert refused >= 20  # most bytes of a header are lengths and names


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', "comes as code"),
        ("config.json", '{"model_type": "llama", "auto_map": {"AutoTokenizer": "x.Y"}}', "comes as code"),
        ("config.json", '{"model_type": "nobody", "auto_map": {"AutoConfig": "x.Y"}}', "comes as code"),
        ("tokenizer_config.json", "[]", "must be an object"),
        ("tokenizer.json", '{"model": ', "cannot be loaded"),
        (
            "tokenizer.json",
            '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
            "cannot be loaded",
        ),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_tokenizers_that_are_refused(loaded: GgufModel, tmp_path: Path, name: str, content: str | None, text: str) -> None:
    save_directory(loaded, tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=text) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("small_first", [False, True])
def test_parts_are_read_as_one_model(tiny: Path, tmp_path: Path, cache: Path, small_first: bool) -> None:
    write_tiny(tmp_path / "m.gguf", split=8, small_first=small_first)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3 + small_first
    whole = resolve_model(str(tiny))
    made = {resolve_model(str(part)) for part in parts}
    assert len(made) == 1
    joined = made.pop()
    for file in whole.iterdir():
        if file.name != "origin.json":
            assert (joined / file.name).read_bytes() == file.read_bytes(), file.name
    given = read_given(joined)
    assert given is not None
    assert (given.parts, given.nbytes) == (len(parts), sum(part.stat().st_size for part in parts))
    assert not list(cache.rglob("*.gguf"))
    # Another part makes another model.
    data = bytearray(parts[-1].read_bytes())
    data[-40] ^= 1
    parts[-1].write_bytes(data)
    assert resolve_model(str(parts[0])) != joined


def test_parts_that_do_not_make_a_model(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path / "m.gguf", split=8)
    first, second, third = sorted(tmp_path.glob("m-*.gguf"))

    def refused(text: str) -> None:
        with pytest.raises(CheckpointError, match=text) as caught:
            resolve_model(str(first))
        assert "\n" not in str(caught.value)

    away = tmp_path / "away"
    second.rename(away)
    refused(r"part 1 of 3 of a model, and m-00002-of-00003\.gguf is not beside it")
    third.rename(tmp_path / "away3")
    refused(r"m-00002-of-00003\.gguf, m-00003-of-00003\.gguf are not beside it")
    (tmp_path / "away3").rename(third)
    second.write_bytes(third.read_bytes())
    refused("belongs to another model")
    away.rename(second)
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="is part 1 of 3 of a model, but its name does not say so"):
        resolve_model(str(renamed))
    resolve_model(str(second))


def test_the_report_compares_with_what_the_user_gave(tmp_path: Path, cache: Path) -> None:
    file, out = tmp_path / "q8.gguf", tmp_path / "out"
    write_tiny(file, q8=True)
    source = resolve_model(str(file))
    given = read_given(source)
    assert given is not None
    assert (given.format, given.file_type, given.nbytes, given.parts) == ("GGUF", "Q8_0", file.stat().st_size, 1)
    assert given.is_quantized
    assert given.text.startswith("GGUF Q8_0, quantized already: Q8_0 ")
    recipe = make_recipe({"weights": "int8-row", "quantizer": "rtn"})
    plan, _, loader = plan_run(source, build_method(recipe))
    listening = Listening()
    report = quantize_directory(source, out, recipe, proof=Proof(tokens=0), progress=listening)
    size = report["size"]
    assert size["bytes_original"] == file.stat().st_size == plan.given_bytes
    assert size["bytes_converted"] == loader.source.nbytes
    assert size["ratio"] == size["bytes_original"] / size["bytes"]
    assert report["given"]["types"] == given.types
    assert "GGUF Q8_0, quantized already" in (out / "README.md").read_text("utf-8")
    assert not (out / "origin.json").exists()
    assert report["left_behind"] == []
    whole = sum(path.stat().st_size for path in out.iterdir() if path.name != "report.html")
    assert size["bytes"] == whole
    assert plan.published_bytes == pytest.approx(whole, rel=0.1)
    card = (out / "README.md").read_text("utf-8")
    assert f"| {whole:,}; original: {file.stat().st_size:,}, {ratio_text(size['ratio'])} |" in card
    assert "pip install bitpress" not in card, "it is on no index"
    assert (plan.published_bytes > plan.given_bytes) == any("larger than its source" in line for line in listening.said)
    assert plan.as_dict()["given"]["file_type"] == "Q8_0"
    told = told_original(report)
    assert "GGUF Q8_0, quantized already" in told
    assert ratio_text(size["ratio"]) in told
    assert ratio_text(2) == "the result is 2.00 times smaller"
    assert ratio_text(0.5) == "the result is 2.00 times larger"


def test_a_file_that_claims_to_be_an_origin_is_a_side_file(loaded: GgufModel, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model").mkdir()
    save_directory(loaded, tmp_path / "model")
    claim = {"format": "GGUF", "file_type": "F32", "nbytes": 1, "parts": 1, "types": {}}
    (tmp_path / "model" / "origin.json").write_text(json.dumps({"given": claim}))
    source = SourceCheckpoint.open(tmp_path / "model")
    assert source.given is None
    assert "origin.json" in source.side_files().carried


def test_the_type_of_a_file_that_does_not_state_one_is_that_of_most_bytes(tiny: Path) -> None:
    given = describe_given([read_gguf_header(tiny)])
    assert (given.file_type, given.is_quantized) == ("F32", False)
    assert given.text == "GGUF F32, not quantized: F32 100 %"
    assert replace(given, file_type="Q4_1").text == given.text, "the tensors say what they are, not the header"
