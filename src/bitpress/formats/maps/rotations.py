"""Rotations: orthogonal maps that are products of small factors, so that no square matrix of the whole width is stored.

    Hadamard     T = (I ⊗ C ⊗ W) diag(signs) / sqrt(block)     blocks of `core` * 2^m values; C of order `core`, W the Walsh matrix
    Kronecker    T = left ⊗ right                              two orthogonal matrices of orders a and b, a * b = n

Source   The random Hadamard transform of Ailon & Chazelle 2006 as QuIP# and QuaRot use it, for widths that are no power of two times
         a Hadamard matrix of a small order; the product of two small orthogonal matrices of QuIP (Chee et al. 2023).
Differs  the matrices of order `core` come from Paley's two constructions over a prime (12, 20, 28, 36, 44, 60, 68, 76, 108, 140, 148,
         ...: 576 = 36 * 16, 1536 = 12 * 128, 14336 = 28 * 512), where QuIP# keeps tables. An order that they do not reach (172, and
         with it 11008 = 43 * 256) takes the Hartley matrix of the odd part, cos + sin of 2 pi i j / k: orthogonal for every k, and
         no entry above sqrt(2) times those of a Hadamard matrix. QuIP# takes a Fourier transform there.
Needs    1 bit a channel for signs; a^2 + b^2 float32 for the product.        Cost  O(n (core + log n)), O(n (a + b)) a vector.
Fails    FormatError for factors that do not multiply to the width or are not orthogonal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, UInt8

from bitpress.errors import FormatError
from bitpress.formats.format import Expected
from bitpress.formats.layouts import dense as dense

__all__ = ["LARGEST", "Factors", "Hadamard", "Kronecker", "core_of", "hadamard_matrix", "most_equal_order", "multiply_factors"]

# The largest dense factor that a file may ask for.
LARGEST = 1024
# Tolerance on unit length of the rows of a factor; float32 factors are a hundred times more exact.
ORTHOGONAL = 1e-4

_TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]])


@dataclass(frozen=True)
class Hadamard:
    """Flip signs, then mix every block with a Hadamard matrix. `signs` holds one bit a channel, 1 for a flip."""

    size: int
    block: int
    core: int
    signs: UInt8[torch.Tensor, " bytes"]
    kind: ClassVar[str] = "hadamard"

    @classmethod
    def random(cls, size: int, block: int, generator: torch.Generator) -> "Hadamard":
        """Draw random signs. Raises FormatError for a block that does not divide the size or has no matrix."""
        spec = {"size": size, "block": block, "core": core_of(block)}
        cls.expected(spec, size)
        flips = torch.randint(0, 2, (1, size), generator=generator, dtype=torch.uint8)
        return cls(size, block, spec["core"], dense.pack(flips, 1)[0].contiguous())

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return self._mix(x * self.factors(x.dtype), transposed=False)

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return self._mix(x, transposed=True) * self.factors(x.dtype)

    def dual(self) -> "Hadamard":
        return self

    def spec(self) -> dict[str, Any]:
        return {"size": self.size, "block": self.block, "core": self.core}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"signs": self.signs}

    @staticmethod
    def expected(spec: Mapping[str, Any], size: int) -> Expected:
        if set(spec) != {"size", "block", "core"} or any(type(v) is not int or v < 1 for v in spec.values()):
            raise FormatError(f"a hadamard map needs size, block and core, integers of 1 or more, got {spec}.")
        block, core = spec["block"], spec["core"]
        if spec["size"] != size or size % block or block % core or not _is_power_of_two(block // core) or core > LARGEST:
            raise FormatError(
                f"a hadamard map of {spec['size']} in blocks of {block} = {core} * 2^m does not fit a width of {size}; "
                f"the block must divide the width, and the core must be at most {LARGEST}."
            )
        return {"signs": (torch.uint8, (dense.row_bytes(size, 1),))}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Hadamard":
        return cls(spec["size"], spec["block"], spec["core"], tensors["signs"])

    def check(self) -> None:
        if self.size % 8 and int(self.signs[-1]) >> self.size % 8:
            raise FormatError("a hadamard map has signs beyond its width; the file is damaged.")

    def factors(self, dtype: torch.dtype = torch.float32) -> Float[torch.Tensor, " n"]:
        """Return the signs as ones and minus ones."""
        return 1 - 2 * dense.unpack(self.signs[None], 1, self.size)[0].to(dtype)

    def _mix(self, x: Float[torch.Tensor, "... n"], *, transposed: bool) -> Float[torch.Tensor, "... n"]:
        core = hadamard_matrix(self.core)
        factors = [core.T if transposed else core, *_walsh_factors(self.block // self.core)]
        return (multiply_factors(x.reshape(-1, self.block), factors) / math.sqrt(self.block)).reshape(x.shape)


@dataclass(frozen=True)
class Factors:
    """Multiply by `left` across and by `right` along the rows of the vector seen as a matrix [a, b]. `called` and `beyond` are
    words of errors: the map, and what to use in place of wider factors."""

    left: Float[torch.Tensor, "a a"]
    right: Float[torch.Tensor, "b b"]
    kind: ClassVar[str]
    called: ClassVar[str]
    beyond: ClassVar[str]

    def apply(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return _mix(x, self.left, self.right)

    def apply_transposed(self, x: Float[torch.Tensor, "... n"]) -> Float[torch.Tensor, "... n"]:
        return _mix(x, self.left.T, self.right.T)

    def spec(self) -> dict[str, Any]:
        return {"left": self.left.shape[0]}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def expected(cls, spec: Mapping[str, Any], size: int) -> Expected:
        a = spec.get("left")
        if set(spec) != {"left"} or type(a) is not int or a < 1 or size % a:
            raise FormatError(f"{cls.called} needs the order `left`, a divisor of the width {size}, got {spec}.")
        b = size // a
        if max(a, b) > LARGEST:
            raise FormatError(f"{cls.called} of {a} by {b} has a factor above {LARGEST}; use {cls.beyond}.")
        return {"left": (torch.float32, (a, a)), "right": (torch.float32, (b, b))}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        return cls(tensors["left"], tensors["right"])


@dataclass(frozen=True)
class Kronecker(Factors):
    """Factors that are orthogonal."""

    kind: ClassVar[str] = "kronecker"
    called: ClassVar[str] = "a kronecker map"
    beyond: ClassVar[str] = "a hadamard map"

    @classmethod
    def random(cls, size: int, generator: torch.Generator) -> "Kronecker":
        """Draw two orthogonal matrices of the most equal orders, uniformly. Raises FormatError for a width without such orders."""
        a = most_equal_order(size)
        cls.expected({"left": a}, size)
        return cls(_random_orthogonal(a, generator), _random_orthogonal(size // a, generator))

    def dual(self) -> "Kronecker":
        return self

    def check(self) -> None:
        for name, factor in self.tensors().items():
            error = (factor.double() @ factor.T.double() - torch.eye(len(factor), device=factor.device)).abs().max()
            if not bool(error < ORTHOGONAL):
                raise FormatError(f"the factor {name} of a kronecker map is not orthogonal.")


def _mix(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return multiply_factors(x.reshape(-1, left.shape[0] * right.shape[0]), [left, right]).reshape(x.shape)


def most_equal_order(size: int) -> int:
    """Return the smaller of the two most equal whole numbers whose product is the size."""
    return max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)


def core_of(block: int) -> int:
    """Return the order of the dense factor of a block: 1 for a power of two, else the smallest Hadamard order, else the odd part."""
    odd = block // (block & -block)
    orders = [odd << shift for shift in range((block // odd).bit_length()) if odd << shift <= LARGEST]
    return next((order for order in orders if _paley_prime(order)), odd) if odd > 1 else 1


@lru_cache(maxsize=16)
def hadamard_matrix(order: int) -> Float[torch.Tensor, "order order"]:
    """Return a matrix with h h' = order * I: of ones and minus ones where Paley or Sylvester has one, else Hartley's."""
    if _is_power_of_two(order):
        h = torch.ones(1, 1)
        while len(h) < order:
            h = torch.kron(h, _TWO)
        return h
    prime = _paley_prime(order)
    if not prime:
        i = torch.arange(order)
        angle = 2 * math.pi * (i[:, None] * i % order).double() / order
        return (angle.cos() + angle.sin()).float()
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, prime))])
    at = torch.arange(prime)
    edged = torch.ones(prime + 1, prime + 1)
    edged[0, 0] = 0.0
    edged[1:, 1:] = character[(at[:, None] - at) % prime]
    eye = torch.eye(prime + 1)
    if prime % 4 == 3:
        edged[1:, 0] = -1.0
        return eye + edged
    return torch.kron(edged, _TWO) + torch.kron(eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))


def _paley_prime(order: int) -> int:
    """Return the prime q of Paley's first (order = q + 1, q = 3 mod 4) or second construction (2 q + 2, q = 1 mod 4), or 0."""
    if order % 4 == 0:
        if (order - 1) % 4 == 3 and _is_prime(order - 1):
            return order - 1
        if (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
            return order // 2 - 1
    return 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _walsh_factors(size: int) -> list[torch.Tensor]:
    """Return matrices of orders up to 64 whose Kronecker product is the Walsh matrix: few large products beat many small steps."""
    factors = []
    while size > 1:
        order = min(size, 64)
        factors.append(hadamard_matrix(order))
        size //= order
    return factors


def multiply_factors(x: Float[torch.Tensor, "rows n"], factors: Sequence[torch.Tensor]) -> Float[torch.Tensor, "rows n"]:
    """Return (f0 ⊗ f1 ⊗ ...) x for every row of `x`, the same to the last bit whether a gradient is wanted or not."""
    if x.requires_grad or any(factor.requires_grad for factor in factors):
        result: torch.Tensor = _Multiplied.apply(x, *factors)
        return result
    return _multiply(x, factors)


class _Multiplied(torch.autograd.Function):
    """torch folds axes into one product or not by whether a gradient is wanted, and rounds otherwise then."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *factors)
        return _multiply(x.detach(), [factor.detach() for factor in factors])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        leaves = [t.detach().requires_grad_(needed) for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)]
        with torch.enable_grad():
            y = _multiply(leaves[0], leaves[1:])
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], gradients[0]))
        return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def _multiply(x: Float[torch.Tensor, "rows n"], factors: Sequence[torch.Tensor]) -> Float[torch.Tensor, "rows n"]:
    """Multiply the last axis, which becomes the first, once for each factor."""
    rows = x.shape[0]
    for factor in reversed(factors):
        order = factor.shape[0]
        x = x.reshape(rows, -1, order) @ factor.T.to(device=x.device, dtype=x.dtype)
        x = x.transpose(1, 2) if order > 1 else x
    return x.reshape(rows, -1)


def _random_orthogonal(order: int, generator: torch.Generator) -> Float[torch.Tensor, "order order"]:
    """Draw one uniformly: the Q of a normal matrix, its signs fixed by R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    factor: torch.Tensor = q * r.diagonal().sign()
    return factor.float().contiguous()
