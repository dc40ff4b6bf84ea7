"""Tensor parallelism: every rule stands against what it is about, and against nothing else."""

from dataclasses import replace

import pytest

from bitpress.exchange.tensor_parallel import RULES, SIZES, ServedModel, ServedWeight, padded, sizes

DOWN = ServedWeight("down", (4096, 8192), True, 128, 4)
UP = ServedWeight("up", (16384, 4096), False, 128, 4)
GOOD = ServedModel((32,), (8,), (UP, DOWN))


def weights(*changed: ServedWeight) -> ServedModel:
    return replace(GOOD, weights=changed)


# By the rule that stands against it: a model, and the numbers of devices that it is refused on.
ODD: tuple[tuple[ServedModel, tuple[int, ...]], ...] = (
    (replace(GOOD, queries=(32, 12)), (8,)),
    (replace(GOOD, queries=(24,), keys=(6,)), (4, 8)),
    (weights(UP, replace(DOWN, shape=(4096, 4 * 129), group=None, packed=None)), (8,)),
    (weights(UP, replace(DOWN, shape=(4096, 1536))), (8,)),
    (weights(UP, replace(DOWN, shape=(4096, 8 * 20), group=None)), (8,)),
)


@pytest.mark.parametrize("number", range(len(RULES)))
def test_a_rule_stands_against_what_it_is_about(number: int) -> None:
    model, refused = ODD[number]
    for devices in SIZES:
        against = [i for i, rule in enumerate(RULES) if rule.refuses(model, devices) is not None]
        assert against == ([number] if devices in refused else []), (devices, against)
    assert [devices for devices, why in sizes(model).items() if why is not None] == list(refused)


def test_a_model_whose_numbers_are_multiples_runs_at_every_size() -> None:
    assert sizes(GOOD) == dict.fromkeys(SIZES)
    assert sizes(ServedModel((), (), ())) == dict.fromkeys(SIZES)
    assert sizes(replace(GOOD, keys=(1,))) == dict.fromkeys(SIZES), "one head of keys is repeated on every device"
    assert sizes(weights(replace(UP, shape=(129, 4096)))) == dict.fromkeys(SIZES), (
        "outputs are divided by heads, or as the inputs behind"
    )


def test_words_of_codes_are_whole_on_one_device_too() -> None:
    why = sizes(weights(replace(UP, shape=(64, 100), group=None)))
    assert why[1] == "up: 100 inputs a device, 4 bits each, do not fill words of 32 bits"
    assert sizes(weights(replace(UP, shape=(64, 100), group=None, packed=None))) == dict.fromkeys(SIZES)


@pytest.mark.parametrize(
    ("shape", "divided", "devices", "pads"),
    [
        ((960, 576), False, 1, True),  # SmolLM2-135M: 576 is no multiple of 128, 960 neither
        ((64, 128), False, 1, False),
        ((128, 64), False, 1, False),
        ((128, 64), False, 2, True),
        ((64, 256), True, 2, False),
        ((64, 256), True, 4, True),
    ],
)
def test_marlin_pads_shards_that_fill_no_tile(shape: tuple[int, int], divided: bool, devices: int, pads: bool) -> None:
    weight = ServedWeight("w", shape, divided, None, 4)
    assert (padded(weights(weight), devices) is not None) == pads
    assert padded(weights(replace(weight, packed=None)), devices) is None, "bytes are not multiplied by Marlin"
