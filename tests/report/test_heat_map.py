"""The heat map: where a weight is, and what color its error has."""

import pytest

from bitpress.report.document import LayerRow
from bitpress.report.heat_map import STEPS, draw_heat_map, find_place


def row(name: str, error: float, fallbacks: tuple[str, ...] = ()) -> LayerRow:
    return LayerRow(
        name=name,
        shape=[4, 4],
        format="int4-g4",
        bytes=8,
        bits_per_weight=4.0,
        error_rounded=1.0,
        error=error,
        measured_on="output",
        calibrated=True,
        tokens=1,
        notes=[],
        fallbacks=list(fallbacks),
    )


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.down_proj", "3", "mlp.down_proj"),
        ("model.layers.11.mlp.experts.7.up_proj", "11", "mlp.experts.N.up_proj"),
        ("transformer.h.0.attn.c_attn", "0", "attn.c_attn"),
        ("model.layers.2.block_sparse_moe.experts.gate_up_proj", "2", "block_sparse_moe.experts.gate_up_proj"),
        ("layers.5", "5", "layers.5"),
        ("model.embed_tokens", "outside", "model.embed_tokens"),
        ("lm_head2.proj", "outside", "lm_head2.proj"),
    ],
)
def test_a_name_is_a_place(name: str, block: str, kind: str) -> None:
    assert find_place(name) == (block, kind)


def test_every_weight_has_a_cell_in_the_order_of_the_model() -> None:
    names = [f"m.{i}.{kind}" for i in (0, 1, 10, 2) for kind in ("a.q", "a.k")] + ["m.10.extra", "head", "table"]
    experts = [f"m.1.experts.{e}.up" for e in range(3)]
    found = draw_heat_map([row(name, 0.01) for name in (*names, *experts)])
    assert [block for block, _ in found.rows] == ["0", "1", "10", "2"]
    assert found.kinds == ("a.q", "a.k", "extra", "experts.N.up")
    assert sorted(w.name for cell in found.cells for w in cell.weights) == sorted((*names, *experts))
    assert [cell.weights[0].name for cell in found.outside] == ["head", "table"]
    assert [cell is None for cell in dict(found.rows)["0"]] == [False, False, True, True]


def test_colors_follow_the_error_and_single_extremes_do_not_take_them_all() -> None:
    errors = [0.001 * 1.05**i for i in range(60)] + [1e-9, 10.0, 0.0, float("inf")]
    found = draw_heat_map([row(f"m.{i}.w", error) for i, error in enumerate(errors)])
    steps = [cell.step for cell in found.cells]
    assert steps[:60] == sorted(steps[:60])
    assert set(steps[:60]) == set(range(STEPS))
    assert steps[60:] == [0, STEPS - 1, 0, STEPS - 1]
    assert 0.001 <= found.least < found.most < 0.02
    one = draw_heat_map([row("m.0.w", 0.5)])
    assert [cell.step for cell in one.cells] == [0]
    assert draw_heat_map([]).cells == []


def test_a_cell_of_several_weights_shows_their_mean_and_the_worst_first() -> None:
    weights = [row("m.0.experts.0.up", 0.01), row("m.0.experts.1.up", 0.03, ("rounded without statistics",))]
    (cell,) = draw_heat_map(weights).cells
    assert cell.error == pytest.approx(0.02)
    assert cell.weights[0].error == 0.03
    assert cell.fell_back


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (0.0024, ".24"),
        (0.12, "12"),
        (1.0, "100"),
        (1e-6, "1e-4"),
        (0.0, "0"),
        (float("inf"), "inf"),
        (0.005, ".5"),
        (500.0, "5e4"),
    ],
)
def test_errors_fit_into_a_cell(error: float, told: str) -> None:
    found = draw_heat_map([row("m.0.w", 0.01)])
    assert (found.unit, found.told(error)) == ("%", told)


def test_small_errors_are_parts_per_million() -> None:
    found = draw_heat_map([row("m.0.w", 0.0003)])
    assert (found.unit, found.told(0.0003), found.told(4.4e-6)) == ("ppm", "300", "4.4")
