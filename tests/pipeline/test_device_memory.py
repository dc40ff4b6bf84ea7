"""The arithmetic of a GPU's memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitpress.devices import find_device
from bitpress.errors import MemoryLimitError, UsageError
from bitpress.models.opening import open_original
from bitpress.pipeline.device_memory import DeviceMemory, Sizes, refuse_beyond
from bitpress.pipeline.quantize import plan_opened
from bitpress.recipes import make_method

GB = 10**9
CARD = 80 * GB
HIDDEN, INSIDE, KEYS, VOCABULARY = 8192, 28672, 1024, 128256
# A Llama of 70 billion parameters: 80 blocks, 8 heads of keys and values, calibrated on 8 samples of 2,048 tokens at a time.
LLAMA_70B = Sizes(
    outer=2 * VOCABULARY * HIDDEN + HIDDEN,
    block=2 * HIDDEN**2 + 2 * HIDDEN * KEYS + 3 * HIDDEN * INSIDE + 2 * HIDDEN,
    blocks=80,
    weights=((HIDDEN, HIDDEN), (KEYS, HIDDEN), (INSIDE, HIDDEN), (HIDDEN, INSIDE)),
    inputs=(HIDDEN, HIDDEN, HIDDEN, INSIDE),
    itemsize=2,
    stored=2,
    positions=2048,
    batch=8,
    outputs=2048 * VOCABULARY,
    squares=1,
)


def test_a_model_of_70_billion_parameters_goes_through_a_card_of_80_gb() -> None:
    whole = LLAMA_70B.blocks * LLAMA_70B.block + LLAMA_70B.outer
    assert 70.5e9 < whole < 70.6e9
    needed = DeviceMemory.of(LLAMA_70B)
    assert needed.outer == 2 * LLAMA_70B.outer
    assert needed.block == 4 * LLAMA_70B.block
    assert 2 * whole > CARD > needed.total > needed.outer + needed.block + 4 * INSIDE**2
    refuse_beyond(LLAMA_70B, CARD, "a card")
    # The gradients of the loss need the whole model at once.
    with pytest.raises(MemoryLimitError, match=r"a method without statistics such as rtn fits"):
        refuse_beyond(replace(LLAMA_70B, backward=True), CARD, "a card")


def test_what_does_not_fit_is_told_with_what_would() -> None:
    many = replace(LLAMA_70B, batch=64)
    with pytest.raises(
        MemoryLimitError, match=r"a card: about .* bytes of its memory are needed \(outer .*--set batch=\d+ fits"
    ) as told:
        refuse_beyond(many, CARD, "a card")
    fits = int(str(told.value).split("batch=")[1].split()[0])
    assert DeviceMemory.of(replace(many, batch=fits)).total <= CARD < DeviceMemory.of(replace(many, batch=fits + 1)).total
    with pytest.raises(MemoryLimitError, match=r"use --device cpu"):
        refuse_beyond(LLAMA_70B, GB, "a card")


def test_a_limit_below_the_whole_model_holds_a_block() -> None:
    """The model takes 141 GB, and a limit of a quarter of that is enough without statistics."""
    plain = replace(LLAMA_70B, squares=0)
    assert DeviceMemory.of(plain).total < 35 * GB


def test_a_compressed_head_and_what_is_learned_count() -> None:
    """A head of two billion weights has five copies in float32, its gram with what is solved of it, and the outputs of a sample."""
    headed = DeviceMemory.of(replace(LLAMA_70B, head=(2 * VOCABULARY, HIDDEN)))
    assert headed.work == 5 * 4 * 2 * VOCABULARY * HIDDEN + 28 * HIDDEN**2 + 4 * LLAMA_70B.outputs
    assert headed.work > DeviceMemory.of(LLAMA_70B).work
    learned = DeviceMemory.of(replace(LLAMA_70B, learning=50 * GB))
    assert learned.total > 50 * GB + learned.outer + learned.block


def test_sizes_are_those_of_the_model(tiny_model: Callable[..., Path]) -> None:
    method = make_method({"weights": "int4-g16", "quantizer": "gptq"})
    model, loader = open_original(tiny_model("llama"), torch.float32)
    sizes = Sizes.of(model, method, plan_opened(model, loader, method))
    values = {name: p.numel() for name, p in model.model.named_parameters()}
    assert sizes.blocks == 2
    assert sizes.outer + sizes.blocks * sizes.block == sum(values.values())
    # Attention's own input and that of its output, the MLP's and its inside.
    assert sorted(sizes.inputs) == [32, 32, 32, 64]
    assert sizes.squares == 1
    assert sizes.itemsize == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told_in_a_line() -> None:
    for name in ("cuda", "cuda:3"):
        with pytest.raises(
            UsageError, match=rf"device {name}: there is no GPU here that can be used \(torch .*\); use --device cpu\."
        ):
            find_device(name)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


def test_a_name_that_is_no_device_is_told() -> None:
    with pytest.raises(UsageError, match="device 'gpu': use auto, cpu, cuda, or cuda:N"):
        find_device("gpu")


def test_the_environment_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_DEVICE", "quantum")
    with pytest.raises(UsageError, match="quantum"):
        find_device()
