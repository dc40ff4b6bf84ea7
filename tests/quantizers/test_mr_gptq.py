"""MR-GPTQ: the scales are the best of those that the format has near the usual one, the rounding is GPTQ's."""

import pytest
import torch

from bitpress.calibration import Stats
from bitpress.errors import FormatError, UsageError
from bitpress.formats import Packed, Scale, parse_format
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.mr_gptq import MRGPTQ
from bitpress.quantizers.quantizer import output_error
from bitpress.recipes import build_method, make_recipe
from bitpress.transforms.basis import into_basis, with_maps
from bitpress.transforms.hadamard import HadamardBasis


def case(seed: int = 0, out: int = 24, inner: int = 64) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.rand(inner, generator=generator)
    x = torch.randn(400, inner, generator=generator) @ mix
    return torch.randn(out, inner, generator=generator), Stats(400, x.T @ x / 400)


def term_of(weight: object) -> Packed:
    term = weight.terms[0]  # type: ignore[attr-defined]
    assert isinstance(term, Packed)
    return term


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def plain_error(block: torch.Tensor, scale: float, importance: torch.Tensor) -> float:
    levels = torch.cat([-E2M1, E2M1]) * scale
    nearest = levels[(block[:, None] - levels).abs().argmin(1)]
    return float(((nearest - block) ** 2 * importance).sum())


def test_mxfp4_takes_the_best_of_three_powers() -> None:
    w, stats = case(1)
    importance = stats.need_gram("test").diagonal()
    scales = term_of(MRGPTQ().quantize(w, stats, parse_format("mxfp4")).weight).unpack_params()["scale"]
    lifted = 0
    for row in range(24):
        for at in range(2):
            block, weight = w[row, 32 * at : 32 * at + 32], importance[32 * at : 32 * at + 32]
            usual = 2.0 ** (torch.frexp(block.abs().max())[1].item() - 3)  # 2^(floor(log2(largest)) - 2)
            errors = {usual * f: plain_error(block, usual * f, weight) for f in (0.5, 1.0, 2.0)}
            assert float(scales[row, at]) == min(errors, key=errors.__getitem__)
            lifted += float(scales[row, at]) != usual
    assert lifted > 0


def test_nvfp4_scales_beat_every_shrunken_one() -> None:
    w, stats = case(2)
    gram, fmt = stats.need_gram("test"), parse_format("nvfp4")
    importance = gram.diagonal()
    # A gram without correlations feeds nothing back: the codes are then the nearest ones, and the scales can be compared.
    diagonal = Stats(400, torch.diag(importance))
    errors = [
        output_error(w, q.quantize(w, diagonal, fmt).weight.dequantize(), diagonal)
        for q in (MRGPTQ(), GPTQ(), GPTQ(clip="minmax"))
    ]
    assert errors[0] < 0.95 * errors[1] < 0.95 * errors[2]
    w_hat = MRGPTQ().quantize(w, diagonal, fmt).weight
    scale = term_of(w_hat).unpack_params()["scale"].reshape(24, 4, 1)
    top = w.reshape(24, 4, 16).abs().amax(2, keepdim=True) / scale
    # In some blocks the largest weight is at 4, in none it is clipped far.
    assert float((top < 5).float().mean()) > 0.05
    assert float(top.max()) < 6 / 0.5 * 1.07


def test_the_rounding_is_that_of_gptq() -> None:
    w, stats = case(3)
    fmt = parse_format("mxfp4")
    ours = MRGPTQ().quantize(w, stats, fmt).weight
    params = term_of(ours).unpack_params()
    # GPTQ from the same scales: the update written out for one column after the other, in float64.
    gram = stats.need_gram("test").double()
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, codes = w.double()[:, order], torch.zeros(24, 64, dtype=torch.uint8)
    for i, column in enumerate(order.tolist()):
        at = fmt.columns(params, (24, 64), column)
        codes[:, column : column + 1] = fmt.grid.encode(left[:, i : i + 1].float(), at)
        error = (left[:, i] - fmt.grid.decode(codes[:, column : column + 1], at)[:, 0]) / factor[i, i]
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    assert torch.equal(term_of(ours).unpack_codes(), codes)


def test_row_factors_help_and_are_stored() -> None:
    w, stats = case(4)
    fmt = parse_format("mxfp4")
    plain, eight = (MRGPTQ(row_factors=n).quantize(w, stats, fmt).weight for n in (1, 8))
    assert plain.output_map is None
    assert isinstance(eight.output_map, Scale)
    factor = eight.output_map.scale
    assert set((factor.log2() * 8).round().int().tolist()) <= set(range(8))
    assert len(set(factor.tolist())) > 2
    assert eight.nbytes == plain.nbytes + 4 * 24
    errors = [output_error(w, weight.dequantize(), stats) for weight in (plain, eight)]
    assert errors[1] < errors[0]


def test_outlier_channels_are_spread_over_their_block_only() -> None:
    w, stats = case(5)
    w[:, 3] *= 20
    fmt = parse_format("mxfp4")
    maps = HadamardBasis(block="group").plan(w, stats, fmt)
    assert maps[0] is not None
    inner = into_basis(w, maps)
    assert torch.allclose(inner[:, 32:].square().sum(1), w[:, 32:].square().sum(1), rtol=1e-4)
    rotated = with_maps(MRGPTQ().quantize(inner, stats.mapped(maps[0]), fmt).weight, maps)
    errors = [output_error(w, v.dequantize(), stats) for v in (rotated, MRGPTQ().quantize(w, stats, fmt).weight)]
    assert errors[0] < errors[1]


def test_other_formats_and_settings_are_refused() -> None:
    w, stats = case(6)
    with pytest.raises(FormatError, match="mr_gptq serves"):
        MRGPTQ().quantize(w, stats, parse_format("int4-g16"))
    for factors in (0, 65):
        with pytest.raises(UsageError, match="row_factors"):
            MRGPTQ(row_factors=factors)


def test_its_recipe_rotates_inside_every_block() -> None:
    recipe = make_recipe({"weights": "mxfp4", "quantizer": "mr_gptq"})
    assert [(p.name, p.part) for p in build_method(recipe).changes] == [("hadamard", HadamardBasis(block="group"))]
