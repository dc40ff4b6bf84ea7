"""GPTQ checkpoints: every width, group and order there and back, the words as the public packers make them, and what is refused."""

import re
from collections.abc import Callable

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.exchange.gptq import Gptq
from bitpress.exchange.plain_layer import make_plain
from bitpress.exchange.source import StoredLayer
from bitpress.exchange.words import join_words
from bitpress.formats import CompressedLayer, parse_format

OUT, IN = 32, 96


def layer(name: str, order: torch.Tensor | None = None, out: int = OUT, width: int = IN) -> CompressedLayer:
    fmt, w = parse_format(name), torch.randn(out, width, generator=torch.Generator().manual_seed(3))
    params = fmt.fit(w)
    return make_plain(fmt, fmt.encode(w, params), params, order)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        f"int{b}-{block}{zero}{store}"
        for b in (2, 3, 4, 8)
        for block in ("g32", "row")
        for zero in ("", "-zero")
        for store in ("", "-bf16")
    ],
)
def test_codes_scales_and_order_go_there_and_back(name: str, ordered: bool) -> None:
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(4)) if ordered else None
    before = layer(name, order)
    after = Gptq.read(Gptq.write(before))
    assert after.weight.spec()["terms"] == before.weight.spec()["terms"]
    assert torch.equal(after.weight.dequantize(), before.weight.dequantize())


def test_words_hold_codes_from_the_least_significant_bit() -> None:
    """As AutoGPTQ packs: eight 4-bit codes down the inputs make a word, zero points of version 1 are stored less 1."""
    before = layer("int4-g32")
    stored = Gptq.write(before)
    codes = before.weight.terms[0].unpack_codes()  # type: ignore[attr-defined]
    words = sum((codes[:, i::8].long() << 4 * i for i in range(8)), torch.zeros(OUT, IN // 8, dtype=torch.int64))
    assert torch.equal(stored.tensors["qweight"].long() & 0xFFFFFFFF, words.T)
    assert stored.entry["checkpoint_format"] == "gptq"
    assert set((stored.tensors["qzeros"].long() & 0xFFFFFFFF).flatten().tolist()) == {0x77777777}


def test_three_bits_cross_the_ends_of_words() -> None:
    """As AutoGPTQ packs 3 bits: code 10 has two bits in the first word and one in the second, code 21 one and two."""
    stored = Gptq.write(before := layer("int3-g32"))
    codes = before.weight.terms[0].unpack_codes()[0, :32].tolist()  # type: ignore[attr-defined]
    bits = sum(code << 3 * i for i, code in enumerate(codes))
    words = [int(word) & 0xFFFFFFFF for word in stored.tensors["qweight"][:3, 0]]
    assert words == [(bits >> 32 * i) & 0xFFFFFFFF for i in range(3)]


def test_zero_points_of_version_1_wrap() -> None:
    """A stored 15 is the zero point 0 for today's readers, which add 1 and keep four bits."""
    stored = Gptq.write(layer("int4-g32-zero"))
    zeros = torch.full_like(stored.tensors["qzeros"], -1)
    read = Gptq.read(StoredLayer({**stored.tensors, "qzeros": zeros}, {**stored.entry, "checkpoint_format": "gptq"}))
    assert float(read.weight.dequantize().min()) >= 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_points_of_either_version_are_the_middle(bits: int) -> None:
    """Kernels for symmetric weights look at neither the version nor the zero points, so that files have them of the other version."""
    before = layer(f"int{bits}-g32")
    stored = Gptq.write(before)
    of_version_2 = join_words(torch.full((IN // 32, OUT), 1 << bits >> 1, dtype=torch.uint8), bits)
    for version, qzeros in (("gptq", of_version_2), ("gptq_v2", stored.tensors["qzeros"])):
        entry = {**stored.entry, "checkpoint_format": version}
        read = Gptq.read(StoredLayer({**stored.tensors, "qzeros": qzeros}, entry))
        assert torch.equal(read.weight.dequantize(), before.weight.dequantize()), version
        as_stored = Gptq.read(StoredLayer({**stored.tensors, "qzeros": qzeros}, {**entry, "sym": False}))
        assert not torch.equal(as_stored.weight.dequantize(), before.weight.dequantize()), "the zero points as they are stored"


@pytest.mark.parametrize("setting", ["desc_act", "sym", "is_marlin_format"])
@pytest.mark.parametrize("value", ["false", 0, 1.0, []])
def test_what_is_neither_true_nor_false_is_refused(setting: str, value: object) -> None:
    settings = {"quant_method": "gptq", "bits": 4, setting: value}
    with pytest.raises(FormatError, match=f"{setting} is .* where true or false is needed"):
        Gptq.entries({"quantization_config": settings}, {"a": {}})
    if setting != "is_marlin_format":
        with pytest.raises(FormatError, match="where true or false is needed"):
            Gptq.entries({"quantization_config": {"bits": 4, "dynamic": {"+:a": {setting: value}}}}, {"a": {}})


@pytest.mark.parametrize("name", ["int5-g32", "gauss4-row", "int4-4x32", "int4-g32-s4", "nf4-g32"])
def test_what_gptq_does_not_have_is_refused_with_a_reason(name: str) -> None:
    refused = layer(name)
    assert Gptq.refuses(refused.weight.spec()) is not None
    with pytest.raises(FormatError):
        Gptq.write(refused)


DAMAGES: dict[str, Callable[[StoredLayer], StoredLayer]] = {
    "bits": lambda s: StoredLayer(s.tensors, {**s.entry, "bits": 5}),
    "are needed": lambda s: StoredLayer({**s.tensors, "scales": s.tensors["scales"].float()}, s.entry),
    "32-bit words": lambda s: StoredLayer({**s.tensors, "qweight": s.tensors["qweight"].long()}, s.entry),
    "does not divide": lambda s: StoredLayer(s.tensors, {**s.entry, "group_size": 7}),
    "g_idx does not put": lambda s: StoredLayer({**s.tensors, "g_idx": torch.zeros(IN, dtype=torch.int32)}, s.entry),
    "g_idx is": lambda s: StoredLayer({**s.tensors, "g_idx": torch.zeros(3, dtype=torch.int32)}, s.entry),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_layers_are_refused_in_one_line(message: str) -> None:
    damaged = DAMAGES[message](Gptq.write(layer("int4-g32")))
    with pytest.raises(FormatError, match=re.escape(message)) as error:
        Gptq.read(damaged)
    assert "\n" not in str(error.value)


def test_words_that_end_inside_a_code_are_refused() -> None:
    stored = Gptq.write(layer("int3-g32"))
    cut = StoredLayer({**stored.tensors, "qzeros": stored.tensors["qzeros"][:, :1]}, stored.entry)
    with pytest.raises(FormatError, match="do not hold a whole number of codes of 3 bits"):
        Gptq.read(cut)


def test_settings_of_single_layers_are_read_and_written() -> None:
    entries = {
        name: dict(Gptq.write(layer(fmt)).entry)
        for name, fmt in (("a.q", "int4-g32"), ("a.k", "int4-g32"), ("a.v", "int8-g32"))
    }
    config = Gptq.configure({"model_type": "llama"}, entries, ())
    assert config["quantization_config"]["bits"] == 4
    assert Gptq.entries(config, {name: {} for name in entries}) == entries
    assert Gptq.plain(config) == {"model_type": "llama"}


def test_two_versions_in_one_checkpoint_are_refused() -> None:
    entries = {name: Gptq.write(layer(name)).entry for name in ("int4-g32", "int4-g32-zero")}
    with pytest.raises(FormatError, match="two versions"):
        Gptq.configure({}, entries, ())


def test_a_version_that_is_not_known_is_refused_by_its_name() -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v9"}}
    with pytest.raises(FormatError, match="gptq_v9"):
        Gptq.entries(config, {})
