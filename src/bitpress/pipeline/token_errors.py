"""Errors of a layer's output on held-out tokens, in all and by class of token: what one figure over all tokens may hide.

A few tokens with massive activations may hold nearly all of a layer's energy; the error relative to all tokens is then theirs alone. Here
every class is compared with its own outputs:

    sum over its tokens |x (w - w_hat)'|^2  /  sum over its tokens |x w'|^2
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from bitpress.calibration.held_out import TOKEN_CLASSES, HeldOut, TokenClass
from bitpress.calibration.stats import products_of
from bitpress.finite import all_finite
from bitpress.pipeline.records import TokenErrors

__all__ = ["FAR", "ClassEnergies", "far_classes", "measure_classes", "note_ordinary", "token_errors"]

# A class is far off if its error is more than this many times that of all tokens.
FAR = 4.0
# Outputs that are computed at a time: for 2,048 tokens 16 MB.
ROWS_TOGETHER = 2048


@dataclass(frozen=True)
class ClassEnergies:
    """Sums over the tokens of a class: how many they are, the energy of the output, those of the errors of some candidates."""

    tokens: int
    output: float
    errors: tuple[float, ...]

    def __add__(self, other: "ClassEnergies") -> "ClassEnergies":
        errors = tuple(a + b for a, b in zip(self.errors, other.errors, strict=True))
        return ClassEnergies(self.tokens + other.tokens, self.output + other.output, errors)


def measure_classes(
    w: Float[torch.Tensor, "out in"], candidates: Sequence[Float[torch.Tensor, "out in"]], held_out: HeldOut
) -> dict[str, ClassEnergies]:
    """Return the sums of every class that has tokens; none if a square is beyond the range of float32."""
    matrices = [w, *(w - w_hat for w_hat in candidates)]
    # A weight that rounding leaves as it is has no error to multiply.
    none = torch.zeros(len(held_out.x), device=w.device)
    energies = [_energies(held_out.x, m) if bool(m.any()) else none for m in matrices]
    if not all(map(all_finite, energies)):
        return {}
    found: dict[str, ClassEnergies] = {}
    for name, mask in held_out.classes().items():
        if bool(mask.any()):
            output, *errors = (float(energy[mask].sum(dtype=torch.float64)) for energy in energies)
            found[name] = ClassEnergies(int(mask.sum()), output, tuple(errors))
    return found


def _energies(x: Float[torch.Tensor, "tokens in"], w: Float[torch.Tensor, "out in"]) -> Float[torch.Tensor, " tokens"]:
    """Return every token's squared norm of the product."""
    total = torch.zeros(len(x), device=x.device)
    with products_of(x.dtype):
        for rows in w.float().split(ROWS_TOGETHER):
            total += (x.float() @ rows.T).square_().sum(1)
    return total


def token_errors(matrices: Sequence[Mapping[str, ClassEnergies]]) -> dict[str, TokenErrors] | None:
    """Return the errors of all tokens and of every class, summed over the matrices of a weight; None if no token was held out.

    The candidates are the plainly rounded weight and the compressed one.
    """
    sums: dict[str, ClassEnergies] = {}
    for name in TOKEN_CLASSES:
        parts = [energies[name] for energies in matrices if name in energies]
        if parts:
            sums[name] = sum(parts[1:], parts[0])
    if not sums:
        return None
    whole = list(sums.values())
    sums = {"all": sum(whole[1:], whole[0]), **sums}
    return {name: _relative(energies) for name, energies in sums.items()}


def _relative(energies: ClassEnergies) -> TokenErrors:
    rounded, compressed = (error / energies.output if energies.output > 0 else 0.0 for error in energies.errors)
    return TokenErrors(tokens=energies.tokens, error_rounded=rounded, error=compressed)


def far_classes(errors: Mapping[str, TokenErrors] | None) -> list[TokenClass]:
    """Return the classes whose error is more than `FAR` times that of all tokens."""
    return [name for name in TOKEN_CLASSES if errors and name in errors and errors[name].error > FAR * errors["all"].error]


def note_ordinary(errors: Mapping[str, TokenErrors] | None) -> list[str]:
    """Return a note where ordinary tokens are far off: nearly all tokens are such. Of other classes the report counts the weights."""
    if errors is None or "others" not in far_classes(errors):
        return []
    own, whole = errors["others"], errors["all"]
    beside = f", more than plain rounding's {own.error_rounded:.3g}" if own.error > own.error_rounded else ""
    return [f"ordinary tokens have an error of {own.error:.3g}{beside}; all tokens together {whole.error:.3g} (held-out text)"]
