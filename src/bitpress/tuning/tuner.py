"""The tuner: learn tensors of one span by the gradient of a loss, and keep what came out only where it is better on held-out text.

A paper is a `Tuning`: which tensors stand for a weight (`begin`, and beside its codes `begin_beside` and `begin_sides`), with the span, loss
and optimiser that it takes.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import NumericsError, UsageError
from bitpress.finite import all_finite
from bitpress.formats import CompressedWeight, InputFormat, Term
from bitpress.tuning.cayley import CayleySGD
from bitpress.tuning.learned import Leaf, Learned, LearnedTerm, LearnedWeight, Start, Value, learned_term
from bitpress.tuning.sides import LearnedSides

__all__ = ["OF_LOGITS", "Curve", "Objective", "Tuning", "begin_weight", "tune_"]

OptimizerName = Literal["adam", "sign", "cayley"]
ScheduleName = Literal["constant", "linear", "cosine"]
LossName = Literal["mse", "mae", "channels", "cosine", "kl-top", "cross-entropy"]
Span = Literal["layer", "block", "windows", "network"]
# Losses of what the whole model says; the others are of hidden states.
OF_LOGITS: tuple[LossName, ...] = ("kl-top", "cross-entropy")

# The points of a curve: averages over as many steps as that takes.
POINTS = 50


@dataclass(frozen=True, kw_only=True)
class Tuning(ABC):
    """One paper's way to learn. A parametrisation inherits these settings and gives defaults of its own.

    steps      of the optimiser, in each span
    batch      windows of calibration text a step; a span of one layer uses the statistics of all text in each
    rate       learning rate; None: 1 / steps
    span       what is learned together: the weights of a block by its output; every weight alone by its own (layer); those of blocks in a row
               by the output of the last of them (windows); those of all blocks by what the model says (network)
    window     of windows: so many blocks are learned together; `overlap` of them are compressed anew and learned again in the next window;
               `ahead` blocks behind them run uncompressed, and their outputs count too
    loss       mse, mae: squared and absolute error of the span's output; channels: squared distance of every channel's mean and deviation;
               cosine: squared error, and the logarithm of the mean cosine between tokens' outputs. Of the network: kl-top, the KL divergence
               over the tokens that the original finds likeliest; cross-entropy, of the text's next tokens
    targets    of a block. original: what the uncompressed model gives there; same: what the uncompressed block makes of the compressed one's
               input. A layer's target is always of the second kind
    norms      learning rate of norms and biases of the block, learned with the weights; 0: they stay as they are
    checks     how often held-out text is looked at; the best of these is kept, and the start if none is better
    seed       of the draw of windows

    summary, paper, serves as those of a quantizer: `serves` are names of formats whose codes it can learn; `adds_maps` says whether weights
    get maps that they did not have, and `moves_inputs` whether weights have other inputs afterwards, whose statistics are not those measured. `rotates`: its matrices are orthogonal, and only steps of `cayley` keep them so.
    """

    steps: int = 200
    batch: int = 8
    rate: float | None = None
    optimizer: OptimizerName = "adam"
    schedule: ScheduleName = "cosine"
    span: Span = "block"
    window: int = 1
    overlap: int = 0
    ahead: int = 0
    loss: LossName = "mse"
    targets: Literal["original", "same"] = "original"
    norms: float = 0.0
    checks: int = 4
    seed: int = 0

    summary: ClassVar[str]
    paper: ClassVar[str]
    serves: ClassVar[tuple[str, ...]] = ("*",)
    adds_maps: ClassVar[bool] = False
    moves_inputs: ClassVar[bool] = False
    rotates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: it is 1 or more.")
        if (self.optimizer == "cayley") != self.rotates:
            raise UsageError(f"optimizer={self.optimizer}: cayley takes steps of rotations, and spinquant's take no others.")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UsageError(f"rate={self.rate:g}: a learning rate is more than 0.")
        if not 0 <= self.norms < math.inf:
            raise UsageError(f"norms={self.norms:g}: a learning rate is 0 or more.")
        if self.span == "layer" and self.norms:
            raise UsageError(
                "norms are learned with a block (span=block): no layer's own output tells what they should be; give norms=0."
            )
        if self.span == "layer" and self.loss != "mse":
            raise UsageError(f"loss={self.loss} is one of a block's output; a layer alone is measured by mse.")
        if (self.span == "network") != (self.loss in OF_LOGITS):
            raise UsageError(
                f"loss={self.loss} does not measure span={self.span}: the network is learned by {' or '.join(OF_LOGITS)}, and nothing else is."
            )
        if self.span == "network" and self.targets != "original":
            raise UsageError(
                "targets=same is of blocks; what the network says is compared with the original (targets=original)."
            )
        _check_window(self)
        if not 0 <= self.seed < 1 << 24:
            raise UsageError(f"seed={self.seed}: it is a whole number from 0 to {(1 << 24) - 1}.")

    @property
    def learning_rate(self) -> float:
        return 1 / self.steps if self.rate is None else self.rate

    @abstractmethod
    def begin(self, start: Start) -> LearnedTerm | None:
        """Return what is learned of a weight's first term of codes, None if codes and parameters stay as they are."""

    def begin_beside(self, term: Term) -> LearnedTerm | None:
        """Return what is learned of a term beside that one, None if it stays."""
        return None

    def begin_sides(self, weight: CompressedWeight) -> LearnedSides | None:
        """Return the diagonals around a weight's maps that are learned, None if its maps stay."""
        return None

    def joined(self, capacities: Sequence[float]) -> list[range] | None:
        """Return which blocks in a row are learned together, by the size of what each can hold; None: `window` and `overlap` say so."""
        return None


def _check_window(tuning: Tuning) -> None:
    """Raise UsageError for windows that make no sense, and for settings of windows beside another span."""
    window, overlap, ahead = tuning.window, tuning.overlap, tuning.ahead
    if min(window - 1, overlap, ahead) < 0 or overlap >= window:
        raise UsageError(
            f"window={window}, overlap={overlap}, ahead={ahead}: a window has 1 block or more, fewer of them overlap, and 0 or more are ahead."
        )
    if tuning.span == "windows" and window == 1 and not ahead:
        raise UsageError("span=windows needs window=2 or more, or blocks ahead; a block alone is span=block.")
    if tuning.span != "windows" and (window > 1 or ahead):
        raise UsageError(f"window={window}, ahead={ahead}: these are settings of span=windows, and span is {tuning.span}.")


def begin_weight(
    tuning: Tuning,
    weight: CompressedWeight,
    original: Float[torch.Tensor, "out in"],
    *,
    transposed: bool = False,
    input: InputFormat | None = None,
) -> LearnedWeight | None:
    """Return a compressed weight as it is learned, None where nothing of it is. Its codes are in a format that the tuning serves; `input` is
    how the input of its product is rounded."""
    at, codes = learned_term(weight), None
    if at is not None:
        start, at = LearnedWeight.start(weight, original)
        codes = tuning.begin(start)
    found = {k: tuning.begin_beside(term) for k, term in enumerate(weight.terms) if k != at}
    beside = {k: term for k, term in found.items() if term is not None}
    sides = tuning.begin_sides(weight)
    if codes is None and not beside and sides is None:
        return None
    return LearnedWeight(weight, codes, at, beside=beside, sides=sides, transposed=transposed, input=input)


class Objective(Protocol):
    """What the tensors of a span are learned by."""

    windows: int

    def loss(self, values: Mapping[str, Value], rows: Int[torch.Tensor, " batch"]) -> Float[torch.Tensor, ""]:
        """Return the loss on some windows of the calibration text, with a gradient by the values."""
        ...

    def held_out(self, values: Mapping[str, Value]) -> float:
        """Return the loss on held-out windows."""
        ...


@dataclass(frozen=True)
class Curve:
    """How a span was learned: losses relative to the energy of the targets.

    calibration  the loss over the steps, as at most `POINTS` means
    before       on held-out text, of the start; `after` of the best state seen
    steps        that were done
    failed       why learning ended early, None if it did not
    """

    calibration: tuple[float, ...]
    before: float
    after: float
    steps: int
    failed: str | None = None

    @property
    def better(self) -> bool:
        return self.after < self.before


def tune_(
    objective: Objective,
    learned: Mapping[str, Learned],
    tuning: Tuning,
    salt: int = 0,
    check_stop: Callable[[], None] = lambda: None,
    note: Callable[[int, float], None] = lambda step, loss: None,
    *,
    lazily: bool = False,
) -> Curve:
    """Learn; leave every leaf in the state that was best on held-out text, or where none was better than the start, as it was at first.

    A loss or a gradient that is not finite, or parameters that cannot be stored, end it early. `salt` keeps the draws of spans apart; `note`
    hears of every step's loss. Nothing is random but the draw of windows, from a generator on the CPU. `lazily`: a parameter is made where the
    objective reads it, and again when it reads it again, so that a span of many blocks need not hold all of them.
    """
    values = _Values if lazily else _made
    leaves = [leaf for one in learned.values() for leaf in one.leaves()]
    best = [leaf.tensor.detach().clone() for leaf in leaves]
    before = after = objective.held_out(values(learned, lambda one: one.start_value()))
    if not leaves:
        return Curve((), before, before, 0)
    losses: list[float] = []
    failed = None
    rows = _draw(objective.windows, min(tuning.batch, objective.windows), tuning.seed, salt)
    optimizer = _optimizer(leaves, tuning)
    start = [group["lr"] for group in optimizer.param_groups]
    checks = {tuning.steps * (k + 1) // tuning.checks for k in range(tuning.checks)}
    for step in range(tuning.steps):
        check_stop()
        for group, rate in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = rate * _faded(tuning.schedule, step / tuning.steps)
        progress = step / tuning.steps
        try:
            told, gradients = _gradients(objective, learned, leaves, progress, next(rows), values)
            losses.append(told)
            note(step + 1, told)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.tensor.grad = gradient
            optimizer.step()
            _bound_(leaves)
            if step + 1 in checks:
                found = objective.held_out(values(learned, lambda one: one.hard_value()))
                if found < after:
                    after, best = found, [leaf.tensor.detach().clone() for leaf in leaves]
        except NumericsError as error:
            failed = f"step {step + 1}: {error}"
            break
    for leaf, tensor in zip(leaves, best, strict=True):
        leaf.tensor.grad = None
        leaf.tensor.data.copy_(tensor)
    return Curve(_means(losses), before, after, len(losses), failed)


def _gradients(
    objective: Objective,
    learned: Mapping[str, Learned],
    leaves: Sequence[Leaf],
    progress: float,
    rows: Int[torch.Tensor, " batch"],
    values: "Reader",
) -> tuple[float, list[torch.Tensor | None]]:
    """Return the loss on some windows and the gradients of it and of all penalties. Raises NumericsError unless all are finite."""
    with torch.enable_grad():
        loss = total = objective.loss(values(learned, lambda one: one.value(progress)), rows)
        for one in learned.values():
            penalty = one.penalty(progress)
            total = total if penalty is None else total + penalty
        told = float(loss.detach())
        if not math.isfinite(told) or not math.isfinite(float(total.detach())):
            raise NumericsError(f"the loss is {told:g}.")
        gradients = torch.autograd.grad(total, [leaf.tensor for leaf in leaves], allow_unused=True)
    if not all(all_finite(gradient) for gradient in gradients if gradient is not None):
        raise NumericsError("a gradient of the loss is not finite.")
    return told, list(gradients)


Reader = Callable[[Mapping[str, Learned], Callable[[Learned], Value]], Mapping[str, Value]]


def _made(learned: Mapping[str, Learned], read: Callable[[Learned], Value]) -> dict[str, Value]:
    return {name: read(one) for name, one in learned.items()}


class _Values(Mapping[str, Value]):
    """Parameters that are made when they are read."""

    def __init__(self, learned: Mapping[str, Learned], read: Callable[[Learned], Value]) -> None:
        self.learned, self.read = learned, read

    def __getitem__(self, name: str) -> Value:
        return self.read(self.learned[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.learned)

    def __len__(self) -> int:
        return len(self.learned)


class SignDescent(torch.optim.Optimizer):
    """Step by the sign of the gradient, as SignRound does."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


def _optimizer(leaves: list[Leaf], tuning: Tuning) -> torch.optim.Optimizer:
    rate = tuning.learning_rate
    groups: list[dict[str, object]] = [{"params": [leaf.tensor], "lr": rate * leaf.rate} for leaf in leaves]
    if tuning.optimizer == "cayley":
        return CayleySGD(groups)
    return SignDescent(groups) if tuning.optimizer == "sign" else torch.optim.Adam(groups)


def _faded(schedule: ScheduleName, progress: float) -> float:
    if schedule == "linear":
        return 1 - progress
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def _bound_(leaves: list[Leaf]) -> None:
    for leaf in leaves:
        if leaf.low is not None or leaf.high is not None:
            leaf.tensor.clamp_(leaf.low, leaf.high)


def _draw(windows: int, batch: int, seed: int, salt: int) -> Iterator[Int[torch.Tensor, " batch"]]:
    """Yield the windows of one step after the other: every window once before any comes again, as far as whole batches go."""
    # torch's generator uses 32 bits of a seed, so both values are mixed into 32 bits.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {salt}".encode()))
    while True:
        order = torch.randperm(windows, generator=generator)
        for at in range(0, windows - batch + 1, batch):
            yield order[at : at + batch].sort().values


def _means(losses: list[float]) -> tuple[float, ...]:
    size = max(-(-len(losses) // POINTS), 1)
    return tuple(math.fsum(losses[a : a + size]) / len(losses[a : a + size]) for a in range(0, len(losses), size))
