"""Folding: find by trial which parameters can absorb the division of an input by channel factors, in any architecture.

A group of weights shares the input x. If a producer (a norm's weight, rows of an earlier matrix) can absorb the division, then

    producer channel c / s[c]    and    consumers' column i * s[channel_of[i]]

leave the block's function unchanged. Nothing here knows a model: a candidate's channels are multiplied by random powers of
two, the block runs on a few tokens, and the group's input must be multiplied, channel by channel and on every token, by
these powers. Powers of two are exact in every floating type, so a right candidate fits almost to the bit and a wrong one (a
matrix before a GELU, queries before a softmax) fails at once. A many-to-one mapping (grouped queries: several inputs of the
output projection come from one value channel) is read digit by digit. Finally the consumers are compensated, and the block's
output must be unchanged: if a router or a residual path also reads the producer, it is not, and the fold is refused.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import NumericsError, UsageError

__all__ = ["Consumer", "Fold", "apply_fold_", "find_folds"]

Kind = Literal["norm", "norm_plus_one", "rows"]
_StandIn = tuple[torch.nn.Module, str, torch.Tensor]

# Probes multiply channels by 2^1 .. 2^4. 2^0 is not among them, so a channel that the producer does not reach is noticed at once.
# No probe makes a value smaller, so nothing underflows in half precision.
LEVELS = 4
SEED = 20230601

# The share of an input's channels that must show a value on the probe tokens before the mapping of the others is inferred.
ALIVE = 1 / 16


class Consumer(Protocol):
    """A weight that reads a group's input; `calibration.capture.Observed` is one."""

    @property
    def view(self) -> torch.Tensor:
        """The weight in the block's own memory."""
        ...

    @property
    def out_first(self) -> bool:
        """Whether `view` is [out, in] rather than [in, out]."""
        ...


@dataclass(frozen=True)
class Fold:
    """The parameters that absorb a group's channel factors.

    producer    path of the module within the block
    kind        "norm": a 1-d weight; "norm_plus_one": a norm that multiplies by 1 + weight; "rows": output rows of a matrix.
                A bias is divided with the weight.
    rows        the range of producer channels
    channel_of  producer channel of every input channel, relative to rows[0]
    out_first   whether the producer's matrix is stored [out, in]
    """

    producer: str
    kind: Kind
    rows: tuple[int, int]
    channel_of: Int[torch.Tensor, " in"]
    out_first: bool = True

    @property
    def channels(self) -> int:
        return self.rows[1] - self.rows[0]

    def per_channel(self, s: Float[torch.Tensor, " in"]) -> Float[torch.Tensor, " channels"]:
        """Return the factors of the producer's channels from those of the inputs; 1 for a channel that makes no input."""
        factors = torch.ones(self.channels, dtype=torch.float32, device=s.device)
        factors[self.channel_of.to(s.device)] = s.float()
        return factors


@torch.no_grad()
def apply_fold_(
    block: torch.nn.Module, fold: Fold, s_channel: Float[torch.Tensor, " channels"], stored: torch.dtype | None = None
) -> Float[torch.Tensor, " in"]:
    """Divide the producer's channels by `s_channel` in place; return the factor by which the input was really divided, float32.

    The factor is old / new after rounding to the parameter's type, by input channel: the consumers' columns times this factor
    undo the division. `stored` is the type in which norms and biases will be written, if that is smaller than the block's.
    A channel whose values would be rounded to 0 is left as it is, with the factor 1.
    Raises UsageError if the factors are not one positive finite number per channel.
    """
    if s_channel.shape != (fold.channels,) or not bool((torch.isfinite(s_channel) & (s_channel > 0)).all()):
        raise UsageError(f"{fold.producer}: folding needs {fold.channels} positive finite factors, one a channel.")
    target = _Target(fold.producer, block.get_submodule(fold.producer), fold.kind, fold.rows, fold.out_first)
    new, realised = target.divided(s_channel, stored)
    for leaf, value in new.items():
        target.module.get_parameter(leaf).copy_(value)
    return realised[fold.channel_of.to(realised.device)]


@torch.no_grad()
def find_folds(
    block: torch.nn.Module, run: Callable[[], torch.Tensor], groups: Sequence[Sequence[Consumer]]
) -> dict[int, Fold]:
    """Return, by group index, the folds of the groups (weights that share an input) whose channel factors can be folded.

    `run` runs the block on fixed tokens and returns its output `[..., hidden]`; about 16 tokens are enough. Groups with an expert, or with
    a weight that is not a module's own 2-d `weight`, are left out. The block's parameters are never written: trial values stand
    in for them during a run. Raises UsageError when the block is not deterministic, NumericsError when it is not finite.
    """
    sites = _find_sites(block, groups)
    if not sites:
        return {}
    targets = _list_targets(block, sites)
    probe = _Probe(run, {g: site.modules[0] for g, site in sites.items()}, {t.module for t in targets})
    base, again = probe.read(), probe.read()
    if not bool(torch.isfinite(base.output).all()):
        raise NumericsError("the block's output on the probe tokens holds a NaN or an infinity.")
    if bool(((again.output - base.output).abs() > _tolerance(base.output) * base.output.abs().amax()).any()):
        raise UsageError("the block gives another output when it runs again; put it into evaluation mode.")
    folds: dict[int, Fold] = {}
    generator = torch.Generator().manual_seed(SEED)
    # The nearest producer first: it is nearly always the right one.
    for target in sorted(targets, key=lambda t: -base.order.get(t.module, -1)):
        open_sites = {g: site for g, site in sites.items() if g not in folds and target.may_feed(site)}
        wanted = [g for g in open_sites if base.precedes(target.module, g)]
        if not wanted:
            continue
        exponents = torch.randint(1, LEVELS + 1, (target.channels,), generator=generator)
        trial = probe.try_powers(target, exponents)
        for g in wanted:
            channel_of = _find_channels(probe, base, trial, target, g)
            if channel_of is not None and _preserves(probe, base, trial, sites[g], channel_of):
                folds[g] = Fold(target.path, target.kind, target.rows, channel_of.cpu(), target.out_first)
    return folds


@dataclass(frozen=True)
class _Site:
    """A group whose weights are all modules' own matrices."""

    modules: tuple[torch.nn.Module, ...]
    out_first: tuple[bool, ...]

    @property
    def in_features(self) -> int:
        return _matrix(self.modules[0]).shape[1 if self.out_first[0] else 0]


@dataclass(frozen=True)
class _Target:
    """A range of channels of one module that may take a factor."""

    path: str
    module: torch.nn.Module
    kind: Kind
    rows: tuple[int, int]
    out_first: bool = True
    inputs: frozenset[int] = frozenset()

    @property
    def channels(self) -> int:
        return self.rows[1] - self.rows[0]

    def may_feed(self, site: _Site) -> bool:
        return site.in_features in self.inputs and self.module not in site.modules

    def divided(
        self, by: Float[torch.Tensor, " channels"], stored: torch.dtype | None = None
    ) -> tuple[dict[str, torch.Tensor], Float[torch.Tensor, " channels"]]:
        """Return the module's new parameters, and old / new of every channel after rounding."""
        weight = _matrix(self.module)
        by = by.to(weight.device, torch.float32)
        start, stop = self.rows
        if self.kind == "rows":
            old = (weight if self.out_first else weight.T)[start:stop]
            new = (old.float() / by[:, None]).to(old.dtype)
            realised = by
            if old.element_size() < by.element_size():
                # Every entry of a row is rounded separately; the single factor that fits a row best is the projection of old on new.
                was, now = old.float(), new.float()
                realised = torch.where((was == 0).all(1), by, torch.linalg.vecdot(was, now) / torch.linalg.vecdot(now, now))
        else:
            offset = 1.0 if self.kind == "norm_plus_one" else 0.0
            old, shown = weight, weight.float() + offset
            new = (shown / by - offset).to(stored or old.dtype).to(old.dtype)
            realised = torch.where(shown == 0, by, shown / (new.float() + offset))
        lost = ~torch.isfinite(realised) | (realised <= 0)
        realised = torch.where(lost, 1.0, realised)
        whole = weight.clone()
        (whole if self.out_first else whole.T)[start:stop] = torch.where(lost[:, None] if old.ndim == 2 else lost, old, new)
        changed = {"weight": whole}
        bias = getattr(self.module, "bias", None)
        if isinstance(bias, torch.nn.Parameter):
            changed["bias"] = bias.clone()
            changed["bias"][start:stop] = (bias[start:stop].float() / realised).to(stored or bias.dtype).to(bias.dtype)
        return changed, realised


@dataclass(frozen=True)
class _Reading:
    """The record of one run: the output, the groups' inputs `[tokens, in]`, and which modules had run before each group."""

    output: torch.Tensor
    inputs: Mapping[int, torch.Tensor]
    order: Mapping[Any, int]

    def precedes(self, module: torch.nn.Module, group: int) -> bool:
        return module in self.order and group in self.order and self.order[module] < self.order[group]


@dataclass(frozen=True)
class _Trial:
    """A run with a target's channels multiplied by `gain`, and the parameters that were used."""

    reading: _Reading
    gain: Float[torch.Tensor, " channels"]
    changed: list[_StandIn]


class _Probe:
    """Run the block with other values in place of some parameters, and record the groups' inputs."""

    def __init__(
        self, run: Callable[[], torch.Tensor], readers: Mapping[int, torch.nn.Module], producers: set[torch.nn.Module]
    ) -> None:
        self._run, self._readers, self._producers = run, readers, producers

    def read(self, changed: Sequence[_StandIn] = ()) -> _Reading:
        seen: dict[int, list[torch.Tensor]] = {}
        order: dict[Any, int] = {}

        def note_input(group: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
            def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
                if args:
                    order.setdefault(group, len(order))
                    seen.setdefault(group, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

            return hook

        def note_run(module: torch.nn.Module, _: tuple[Any, ...], __: Any) -> None:
            order.setdefault(module, len(order))

        hooks = [module.register_forward_pre_hook(note_input(g)) for g, module in self._readers.items()]
        hooks += [module.register_forward_hook(note_run) for module in self._producers]
        try:
            with _stand_ins(changed):
                output = self._run()
        finally:
            for handle in hooks:
                handle.remove()
        return _Reading(output.reshape(-1, output.shape[-1]).clone(), {g: torch.cat(x) for g, x in seen.items()}, order)

    def try_powers(self, target: _Target, exponents: Int[torch.Tensor, " channels"]) -> _Trial:
        """Run with every channel of the target multiplied by its power of two."""
        new, realised = target.divided(torch.exp2(-exponents.float()))
        changed = [(target.module, leaf, value) for leaf, value in new.items()]
        return _Trial(self.read(changed), 1.0 / realised, changed)


@contextmanager
def _stand_ins(changed: Sequence[_StandIn]) -> Iterator[None]:
    """Use other values in place of parameters; the parameters themselves are not changed."""
    kept = [(module, leaf, module._parameters[leaf]) for module, leaf, _ in changed]
    try:
        for module, leaf, value in changed:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, leaf, parameter in kept:
            module._parameters[leaf] = parameter


def _find_sites(block: torch.nn.Module, groups: Sequence[Sequence[Consumer]]) -> dict[int, _Site]:
    owners: dict[int, torch.nn.Module] = {}
    for module in block.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2:
            owners[weight.data_ptr()] = module
    sites = {}
    for g, group in enumerate(groups):
        modules = [owners.get(c.view.data_ptr()) for c in group]
        found = tuple(m for m in modules if m is not None)
        if found and len(found) == len(modules):
            sites[g] = _Site(found, tuple(c.out_first for c in group))
    return sites


def _list_targets(block: torch.nn.Module, sites: Mapping[int, _Site]) -> list[_Target]:
    """List the candidates for a factor: norms of a group's width, as weight and as 1 + weight, and ranges of rows of matrices."""
    widths = {site.in_features for site in sites.values()}
    oriented = {m: first for site in sites.values() for m, first in zip(site.modules, site.out_first, strict=True)}
    targets: list[_Target] = []
    for path, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if weight.ndim == 1 and weight.numel() in widths:
            rows, inputs = (0, weight.numel()), frozenset({weight.numel()})
            kinds: tuple[Kind, Kind] = ("norm", "norm_plus_one")
            targets += [_Target(path, module, kind, rows, True, inputs) for kind in kinds]
        elif weight.ndim == 2 and (isinstance(module, torch.nn.Linear) or module in oriented):
            out_first = oriented.get(module, True)
            out = weight.shape[0 if out_first else 1]
            ranges: dict[tuple[int, int], set[int]] = {}
            for width in widths:
                for rows in _row_ranges(out, width):
                    ranges.setdefault(rows, set()).add(width)
            targets += [_Target(path, module, "rows", rows, out_first, frozenset(w)) for rows, w in ranges.items()]
    return targets


def _row_ranges(out: int, width: int) -> list[tuple[int, int]]:
    """Return the ranges of a matrix's rows that may make an input of `width` channels.

    All rows; the last or first `width` (gate and up in one matrix); the values after `width` queries and as many keys.
    """
    ranges = [(0, out)]
    if out > width:
        ranges += [(out - width, out), (0, width), (out - (out - width) // 2, out)]
    return [r for r in dict.fromkeys(ranges) if r[0] < r[1] and width % (r[1] - r[0]) == 0]


def _find_channels(probe: _Probe, base: _Reading, trial: _Trial, target: _Target, g: int) -> Int[torch.Tensor, " in"] | None:
    """Return the producer channel of every input channel, or None if the input does not follow the target's factors."""
    ratio = _ratios(base, trial.reading, g)
    if ratio is None:
        return None
    alive = ratio != 0

    def agrees(channel_of: torch.Tensor) -> bool:
        return bool(((ratio / trial.gain[channel_of] - 1).abs() <= _tolerance(base.inputs[g]))[alive].all())

    if ratio.numel() == target.channels:
        in_place = torch.arange(ratio.numel(), device=ratio.device)
        if agrees(in_place):
            return in_place
    # A channel that was zero on all probe tokens (after a ReLU) shows nothing: without it only a one-to-one mapping is accepted.
    if target.kind != "rows" or not bool(alive.all()) or _levels(ratio) is None:
        return None
    channel_of = torch.zeros(ratio.numel(), dtype=torch.int64, device=ratio.device)
    for digit in range(math.ceil(math.log(target.channels, LEVELS) - 1e-9)):
        place = LEVELS**digit
        told = probe.try_powers(target, 1 + torch.arange(target.channels) // place % LEVELS)
        digit_ratio = _ratios(base, told.reading, g)
        levels = None if digit_ratio is None else _levels(digit_ratio)
        if levels is None:
            return None
        channel_of += levels * place
    return channel_of if int(channel_of.max()) < target.channels and agrees(channel_of) else None


def _ratios(base: _Reading, other: _Reading, g: int) -> Float[torch.Tensor, " in"] | None:
    """Return the factor by which each input channel was multiplied, 0 where it is always 0; None if a factor is not constant."""
    x, y = base.inputs[g].float(), other.inputs[g].float()
    peak, at = x.abs().max(0)
    ratio = y.gather(0, at[None])[0] / torch.where(peak == 0, 1.0, x.gather(0, at[None])[0])
    allowed = _tolerance(base.inputs[g]) * peak * ratio.abs()
    # A NaN compares as false; a channel that was 0 must still be 0.
    constant = bool(((y - x * ratio).abs() <= allowed).all())
    return ratio if constant and float((peak > 0).float().mean()) >= ALIVE else None


def _levels(ratio: Float[torch.Tensor, " in"]) -> Int[torch.Tensor, " in"] | None:
    """Read ratios as 2^(1 + level); None if one is not such a power."""
    exponent = torch.log2(ratio.clamp(min=2.0**-20))
    level = exponent.round() - 1
    fits = (ratio > 0) & ((exponent - exponent.round()).abs() < 0.05) & (level >= 0) & (level < LEVELS)
    return level.long() if bool(fits.all()) else None


def _preserves(probe: _Probe, base: _Reading, trial: _Trial, site: _Site, channel_of: torch.Tensor) -> bool:
    """Return whether the block's output is restored if the consumers' columns are divided by the gain of the input."""
    loss = 1.0 / trial.gain[channel_of]
    changed = list(trial.changed)
    for module, out_first in zip(site.modules, site.out_first, strict=True):
        weight = _matrix(module)
        changed.append((module, "weight", (weight.float() * (loss[None, :] if out_first else loss[:, None])).to(weight.dtype)))
    output = base.output.float()
    error = (probe.read(changed).output.float() - output).abs().amax(0)
    change = (trial.reading.output.float() - output).abs().amax(0).nan_to_num(0.0, 0.0, 0.0)
    # Per output channel, compared with the change that the same factors make uncompensated, so that a large residual stream
    # hides nothing: a thousandth is far above the rounding of compensated weights (1 + weight is no exact multiple) and far below what any other
    # reader of the producer would leave. The second summand is the rounding of the output itself.
    eps = torch.finfo(base.output.dtype).eps
    allowed = max(1e-3, 4 * eps) * change + 4 * eps * output.abs().amax(0)
    return bool((change > 0).any()) and bool((error <= allowed).all())


def _tolerance(x: torch.Tensor) -> float:
    """Return the relative noise between runs that differ by powers of two: only a few roundings, in sums of another order."""
    return max(1e-4, 4 * torch.finfo(x.dtype).eps)


def _matrix(module: torch.nn.Module) -> torch.Tensor:
    return module.get_parameter("weight").detach()
