"""The native layout tells the truth: bits that native code reads are bits that the file holds, but for the formats that the document names.

The law covers every usual format, every scale store, and groups of 16 at every number of bits. docs/native.md has a row for each format
whose bits in memory are more than 2 % above those stored, with both figures; no other may be, and none of these may be better than told.
"""

import re
from pathlib import Path

import pytest
import torch

from bitpress import native
from bitpress.formats import CompressedWeight
from bitpress.formats.listing import usual_formats
from bitpress.formats.scales import SCALES
from bitpress.formats.table import parse_format
from bitpress.formats.terms.packed import Packed
from bitpress.kernels.native_layout import lay_out, reason_to_expand

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "native.md"
SECTION = DOCUMENT.read_text(encoding="utf-8").split("## Bits in memory")[1].split("\n## ")[0]
TOLD = {
    name: (float(a), float(b)) for name, a, b in re.findall(r"^\| `(\S+)` \| ([\d.]+) \| ([\d.]+) \|", SECTION, re.MULTILINE)
}
SHAPE = (64, 1024)
NAMES = sorted(
    {
        *(fmt.name for fmt in usual_formats()),
        *(parse_format(f"int4-g64-{scale}").name for scale in SCALES),
        *(f"int{bits}-g16" for bits in range(2, 9)),
        *("e2m1-g16-fp8", "planes2-g128-bf16"),
    }
)


def compressed(name: str) -> CompressedWeight:
    fmt, w = parse_format(name), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    params = fmt.fit(w)
    return CompressedWeight((Packed.pack(fmt, fmt.encode(w, params), params),))


def test_every_exception_is_a_format_of_the_law() -> None:
    assert TOLD.keys() <= set(NAMES)
    assert len(TOLD) > 10


@pytest.mark.parametrize("name", NAMES)
def test_bits_in_memory_are_those_stored_or_told(name: str) -> None:
    weight = compressed(name)
    if reason_to_expand(weight) is not None:
        assert name not in TOLD
        assert name.split("-")[0] in DOCUMENT.read_text(encoding="utf-8"), "grids that are expanded to 16 bits are listed"
        return
    strips = lay_out(weight)
    memory = 8 * strips.nbytes / (SHAPE[0] * SHAPE[1])
    if name in TOLD:
        assert (round(weight.bits_per_weight, 2), round(memory, 2)) == pytest.approx(TOLD[name], abs=0.011)
    else:
        assert memory <= 1.02 * weight.bits_per_weight


@pytest.mark.parametrize(
    "name", ["e2m1-g16-fp8", "int4-g16-fp8", "planes2-g128-bf16", "bfp5-g64", "bipolar6-g64", "mxfp6-g32-e8m0"]
)
def test_what_is_read_is_what_the_format_decodes(name: str) -> None:
    """Up to the last digit of a float: a factor of the whole tensor is multiplied in another order."""
    weight = compressed(name)
    strips, decoded = lay_out(weight), weight.dequantize()
    for row in (0, 17, SHAPE[0] - 1):
        assert torch.allclose(strips.row(row), decoded[row], rtol=2**-22, atol=0)
