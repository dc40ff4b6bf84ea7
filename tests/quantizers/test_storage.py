"""Bytes of a plan against those of weights that were compressed."""

from typing import Any

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import BitpressError
from bitpress.formats import Format, parse_format
from bitpress.quantizers.bitstack import BitStack
from bitpress.quantizers.quantizer import Quantizer
from bitpress.quantizers.table import QUANTIZERS

OUT, IN = 24, 128
# Decided by settings and shapes alone.
EXACT: list[tuple[str, str, dict[str, Any]]] = [
    ("bitstack", "binary-tensor", {"terms": 1, "rank": 4}),
    ("bitstack", "binary-tensor", {"terms": 3, "rank": 2, "dtype": "bf16"}),
    ("quip_sharp", "e8p-row", {}),
    ("quip_sharp", "e8p-row", {"residual": "e81b"}),
    ("quip_sharp", "e8p-g64", {"residual": "e8p"}),
    ("ptqtp", "trits2-g32", {}),
    ("ptqtp", "ternary-g32-base3", {}),
    ("ptq161", "binary-row", {}),
    ("ptq161", "binary-row", {"salient": 0.0}),
    ("ptq161", "binary-g32", {"salient": 0.1, "high": "int8-row"}),
    ("aligned_groups", "int2-g16-zero", {}),
    ("aligned_groups", "nf2-g16", {"share": 0.5}),
    ("aligned_groups", "int2-g16-zero", {"share": 0.0}),
    ("aligned_groups", "int2-g16-zero", {"share": 1.0}),
    ("pb_llm", "binary-g32", {}),
    ("pb_llm", "binary-g32", {"salient": 0.0}),
    ("pb_llm", "binary-g32", {"salient": 0.02, "store": "fp16"}),
    ("pb_llm", "binary-g32", {"salient": 0.0, "store": "fp16"}),
    ("gptq", "int3-g32-zero", {}),
    ("aqlm", "aq2x4x4-row", {}),
]
# Decided by the weights: settings bound or aim at it.
AIMED: list[tuple[str, str, dict[str, Any]]] = [
    ("spqr", "int3-g32-zero", {"most": 0.01}),
    ("squeezellm", "kmeans3-row", {"sensitive": 0.01, "outliers": 0.02}),
    ("quantease", "int3-g32-zero", {"outliers": 0.01}),
    ("easyquant", "int3-g32-zero", {"sigmas": 2.0}),
]


def pressed_bytes(name: str, fmt: Format, settings: dict[str, Any]) -> int:
    """Bytes of the terms: of maps a plan counts nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    w = torch.randn(OUT, IN, generator=generator)
    stats = Stats(400, x.T @ x / 400, x.abs().mean(0), sensitivity=torch.rand(OUT, IN, generator=generator))
    weight = QUANTIZERS[name](**settings).quantize(w, stats, fmt).weight
    return sum(t.numel() * t.element_size() for term in weight.terms for t in term.tensors.values())


@pytest.mark.parametrize(("name", "fmt", "settings"), EXACT)
def test_what_shapes_decide_is_exact(name: str, fmt: str, settings: dict[str, Any]) -> None:
    parsed = parse_format(fmt)
    planned = QUANTIZERS[name](**settings).stored_bytes(parsed, (OUT, IN))
    assert planned == pressed_bytes(name, parsed, settings)


@pytest.mark.parametrize(("name", "fmt", "settings"), AIMED)
def test_what_weights_decide_is_aimed_at(name: str, fmt: str, settings: dict[str, Any]) -> None:
    parsed = parse_format(fmt)
    alone = parsed.nbytes((OUT, IN))
    own = QUANTIZERS[name](**settings).stored_bytes(parsed, (OUT, IN)) - alone
    found = pressed_bytes(name, parsed, settings) - alone
    # A row's start is 4 bytes and an outlier 4: of 31 to 140 outliers a third more or fewer.
    assert own > 4 * (OUT + 1)
    assert abs(found - own) <= own / 3


def test_a_stack_of_weights_is_so_many_times_one() -> None:
    for name, fmt, settings in [*EXACT, *AIMED]:
        quantizer, parsed = QUANTIZERS[name](**settings), parse_format(fmt)
        if not parsed.rows_apart:
            continue
        one, three = (quantizer.stored_bytes(parsed, (OUT, IN), parts) for parts in (1, 3))
        assert 3 * one - 8 <= three <= 3 * one, "but for the starts of rows, which end once"


def test_every_method_of_the_table_has_a_case() -> None:
    own = {name for name, made in QUANTIZERS.items() if made.stored_bytes is not Quantizer.stored_bytes}
    assert own <= {name for name, _, _ in [*EXACT, *AIMED]}
    assert len(own) > 5


def test_a_rank_that_a_shape_does_not_have_is_known_beforehand() -> None:
    with pytest.raises(BitpressError, match="rank"):
        BitStack(rank=200).stored_bytes(parse_format("binary-tensor"), (OUT, IN))
