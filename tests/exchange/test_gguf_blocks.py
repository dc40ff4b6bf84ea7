"""Every type of blocks: random bytes decode to the numbers of the `gguf` package bit for bit, and come back as the same bytes."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf_files import random_bytes

from bitpress.errors import FormatError
from bitpress.exchange.gguf_blocks import BLOCK_TYPES, Raw, read_blocks, write_blocks
from bitpress.formats import Packed, parse_format


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_random_blocks_are_the_numbers_of_the_package(name: str) -> None:
    kind = BLOCK_TYPES[name]
    qtype = gguf.GGMLQuantizationType[name]
    assert (int(qtype), GGML_QUANT_SIZES[qtype]) == (kind.number, (kind.weights, kind.nbytes))
    raw = random_bytes(name)
    packed = read_blocks(name, raw)
    theirs = gguf.quants.dequantize(raw.numpy(), qtype)
    assert packed.format == parse_format(kind.format)
    assert np.array_equal(packed.dequantize().numpy(), theirs)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in packed.tensors.items()} == packed.format.expected(packed.shape)
    assert torch.equal(write_blocks(name, packed), raw)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_what_is_quantized_here_is_read_back_by_the_package(name: str) -> None:
    fmt = parse_format(BLOCK_TYPES[name].format)
    w = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    params = fmt.fit(w)
    packed = Packed.pack(fmt, fmt.encode(w, params), params)
    if name == "NVFP4":
        packed = Packed(fmt, packed.shape, {**packed.tensors, "scale_tensor": torch.ones(1)})
    raw = write_blocks(name, packed)
    theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(packed.dequantize().numpy(), theirs)
    again = read_blocks(name, raw)
    assert {part: t.tolist() for part, t in again.tensors.items()} == {part: t.tolist() for part, t in packed.tensors.items()}


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_scales_that_are_no_numbers_are_refused(name: str) -> None:
    raw = random_bytes(name)
    at = 0
    for field in BLOCK_TYPES[name].fields:
        if isinstance(field, Raw):
            raw[0, at : at + field.nbytes] = 0xFF
        at += field.nbytes
    with pytest.raises(FormatError):
        read_blocks(name, raw)
