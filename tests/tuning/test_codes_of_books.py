"""Codes of books and powers that are learned with their parameters: small cases whose best codes are found by trying all."""

import itertools

import torch

from bitpress.formats import CompressedWeight, Packed, parse_format
from bitpress.tuning.learned import LearnedWeight, Start
from bitpress.tuning.objectives import LayerObjective
from bitpress.tuning.table import TUNINGS
from bitpress.tuning.tuner import Tuning, tune_


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(w: torch.Tensor, name: str) -> Packed:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def run(tuning: Tuning, term: Packed, w: torch.Tensor, gram: torch.Tensor) -> tuple[LearnedWeight, float, float]:
    """Learn a term by the output of its layer; the error is relative."""
    weight = CompressedWeight((term,))
    start, at = LearnedWeight.start(weight, w)
    one = LearnedWeight(weight, tuning.begin(start), at)
    curve = tune_(LayerObjective("w", w, gram, None), {"w": one}, tuning)
    made = one.harden()
    again = CompressedWeight.build(made.spec(), {name: t.clone() for name, t in made.tensors().items()})
    assert torch.equal(one.hard_value(), again.dequantize()), "what is stored is what was looked at"
    return one, curve.before, curve.after


def correlated(width: int) -> torch.Tensor:
    x = draw(64, width, seed=9) + 2 * draw(64, 1, seed=10)
    return x.T @ x / 64


def test_candidates_find_the_best_choice_of_two() -> None:
    """With words and scales that stay, the soft choice ends at the best of all 2^4 choices of a row, where rounding is not."""
    w, gram = draw(1, 8), correlated(8)
    term = rounded(draw(32, 8, seed=1), "vq4x2-tensor")
    fmt = term.format
    params = term.unpack_params()
    codes = fmt.encode(w, params)
    tuning = TUNINGS["candidates"](steps=200, rate=1e-9, choices=1e8, weight=0.02)  # type: ignore[call-arg]
    start = Start.of(Packed.pack(fmt, codes, params), w)
    vectors = (w / params["scale"]).reshape(4, 2)
    near = torch.cdist(vectors, params["words"]).topk(2, largest=False).indices
    errors = []
    for choice in itertools.product((0, 1), repeat=4):
        picked = near[torch.arange(4), torch.tensor(choice)][None].to(codes.dtype)
        off = fmt.decode(picked, params) - w
        errors.append(float((off @ gram * off).sum() / (w @ gram * w).sum()))
    assert min(errors) < 0.8 * errors[0], "a case where plain rounding is not best"
    _, before, after = run(tuning, Packed.pack(fmt, codes, params), w, gram)
    assert abs(before - errors[0]) < 1e-5
    assert after < 1.02 * min(errors)
    assert torch.equal(tuning.begin(start).harden().unpack_codes(), codes), "the start is the closed form's"  # type: ignore[union-attr]


def test_words_are_learned_with_the_choice() -> None:
    w, gram = draw(16, 16), correlated(16)
    tuning = TUNINGS["candidates"](steps=200, rate=1e-2, choices=5.0)  # type: ignore[call-arg]
    _, before, after = run(tuning, rounded(w, "vq4x2-tensor"), w, gram)
    assert after < 0.7 * before


def test_joint_learning_moves_codes_and_words() -> None:
    """JLCM: better than the same number of steps with the codes fixed."""
    w, gram = draw(16, 32), correlated(32)
    term = rounded(w, "kmeans2-tensor")
    one, before, after = run(TUNINGS["jlcm"](steps=200), term, w, gram)
    _, _, fixed = run(TUNINGS["parameters"](steps=200, norms=0.0), term, w, gram)
    assert after < 0.8 * fixed <= 0.8 * before
    assert not torch.equal(one.harden().terms[0].unpack_codes(), term.unpack_codes())  # type: ignore[attr-defined]


def test_a_layer_alone_is_learned_by_its_output() -> None:
    """AdaQuant: columns that always come together round against each other, as no rounding to nearest does."""
    w = torch.tensor([[1.0, 0.45, 0.4, 0.3]])
    gram = torch.ones(4, 4) + 0.01 * torch.eye(4)
    fmt = parse_format("int4-row")
    params = {"scale": torch.ones(1, 1)}
    start = Packed.pack(fmt, fmt.encode(w, params), params)
    tuning = TUNINGS["adaquant"](steps=100, rate=2e-2, scales=0.0)  # type: ignore[call-arg]
    assert tuning.span == "layer"
    one, before, after = run(tuning, start, w, gram)
    assert float(one.hard_value().sum()) == 2.0, "the sum of the row is 2.15; rounding to nearest says 1"
    assert after < before / 10
