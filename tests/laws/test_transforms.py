"""Laws of transforms, over every row of the table and every architecture of the tests: the model's function stays what it was.

Nothing is rounded to few bits here: a transform alone changes the model, folded into its parameters or online in its layers, as the
row declares. Factors and maps are float32, so every weight and every input may be off by some 2^-24 of its size; errors of single
products add up at random. In float64 logits then move by about 1e-7 of the largest; 1e-6 is the limit.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bitpress.calibration import Stats
from bitpress.calibration.capture import Capture, Observed
from bitpress.checkpoints.named import NAMED_MODELS, resolve_model
from bitpress.errors import CheckpointError
from bitpress.formats import (
    ActivationFormat,
    AttentionOperands,
    ChannelFormat,
    CompressedLayer,
    CompressedWeight,
    Scale,
    parse_format,
)
from bitpress.kernels.reference import Reference
from bitpress.models.attention import round_attention_, watching
from bitpress.models.rotating import find_rotated
from bitpress.models.skeleton import build_config, build_skeleton
from bitpress.transforms import Fold, apply_fold_, find_folds
from bitpress.transforms.basis import Maps, into_basis, with_maps
from bitpress.transforms.disassemble import Disassemble
from bitpress.transforms.equalize import row_sizes
from bitpress.transforms.shift import Shift
from bitpress.transforms.shift_folds import find_shift_folds, layer_bias, norm_bias
from bitpress.transforms.sites import PLACEMENTS, SITES, Placement, Site
from bitpress.transforms.table import (
    ATTENTION_CHANGES,
    BASIS_CHANGES,
    CHANNEL_CHANGES,
    NETWORK_CHANGES,
    SCALE_SEARCHES,
    TARGETS,
    TRANSFORMS,
)

# Beside the architectures of the tests: a trained model, for a release.
MORE_SPINES = [pytest.param("smollm2-135m", marks=pytest.mark.release)]
LIMIT = 1e-6
FMT = parse_format("int4-g16")
INPUTS = parse_format("int4-row")
TOKENS = torch.arange(6, 38).reshape(2, 16)
# Few exponents, and settings beside the defaults that reach every site of a row.
SETTINGS: Mapping[str, Sequence[dict[str, Any]]] = {
    "awq-scale": ({"grid": 4},),
    "smooth-plus": ({"alpha": 0.5},),
    "aqas": ({"grid": 2},),
    "qqq-smooth": ({"grid": 3},),
    "dgq-smooth": ({"share": 0.25},),
    "hadamard": ({}, {"block": "group", "outputs": True}),
    "klt": ({"parts": 4}, {"whole": True}),
}
# Each of its norms is read by experts too, whose weights are left alone.
NOTHING_FOLDS = ("jetmoe",)
# Between the products of a state space there is a scan, so factors fold into norms alone, and `equalize` pairs two products.
NO_PAIR = ("mamba", "mamba2")
# Searches that are tried online on every run: there all do the same with their factors, wherever these come from.
ONLINE = ("awq-scale", "smooth-plus", "smoothquant")
SEARCHES = [
    pytest.param(name, settings, placement, marks=pytest.mark.release if placement == "online" and name not in ONLINE else ())
    for name, row in SCALE_SEARCHES.items()
    for settings in SETTINGS.get(name, ({},))
    for placement in sorted(row.sites["layer input"])
]
# Rows that change the function before anything is rounded, and the largest change of logits, relative to the largest of them, on networks of random
# weights, whose channels are all unlike: as far as a paper's method is approximate, it says so.
APPROXIMATE = {"reassemble": 1.0}
CHANGES = [(name, settings) for name in BASIS_CHANGES if name not in APPROXIMATE for settings in SETTINGS.get(name, ({},))]


@dataclass
class Spine:
    """A model in float64, the groups of plain weights that share an input, their statistics and their folds."""

    model: Any
    logits: torch.Tensor
    blocks: int
    groups: list[tuple[str, list[str], Fold | None]] = field(default_factory=list)  # block, its modules, and where factors go
    stats: dict[str, Stats] = field(default_factory=dict)


@dataclass(frozen=True)
class Exact:
    """A term that is its weight, in whatever type."""

    value: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        return self.value


class Online(nn.Module):
    """A linear layer between maps, computed by the reference."""

    def __init__(self, weight: CompressedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.layer, self.bias = CompressedLayer(weight), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = Reference().matmul(x, self.layer)
        return y if self.bias is None else y + self.bias


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> Callable[[str], Spine]:
    made: dict[str, Spine] = {}

    def make(architecture: str) -> Spine:
        if architecture not in made:
            path = resolve_model(architecture) if architecture in NAMED_MODELS else tiny_model(architecture)
            made[architecture] = look_at(path)
        return made[architecture]

    return make


@torch.no_grad()
def look_at(path: Path) -> Spine:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():  # norms and biases too: fresh ones are all ones and zeros
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.25)
    model.double()
    depth = model.config.num_hidden_layers
    stack, blocks = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    spine = Spine(model, run(model), depth)
    observed = [
        Observed(f"{stack}.{i}.{path}", module.weight, not isinstance(module, Conv1D))
        for i, block in enumerate(blocks)
        for path, module in block.named_modules()
        if type(module) in (nn.Linear, Conv1D)  # a router may be a subclass that returns more
    ]
    capture = Capture(observed, {"gram", "mean_abs", "max_abs", "sample"})
    capture.run(lambda: run(model), whole=True)
    spine.stats = capture.finish()
    by_name = {w.name: w for w in observed}
    for i, block in enumerate(blocks):
        mine = [names for names in capture.groups() if names[0].startswith(f"{stack}.{i}.")]
        folds = find_folds(block, one_block(model, block), [[by_name[n] for n in names] for names in mine])
        spine.groups += [(f"{stack}.{i}", names, folds.get(g)) for g, names in enumerate(mine)]
    return spine


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


def one_block(model: Any, block: nn.Module) -> Callable[[], torch.Tensor]:
    """Return what runs a block on the input that it has in the model."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    run(model)
    handle.remove()
    args, kwargs = seen[0]

    def again() -> torch.Tensor:
        out = block(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return again


def observed(model: Any, name: str) -> Observed:
    module = model.get_submodule(name)
    return Observed(name, module.weight, not isinstance(module, Conv1D))


def matrix(module: Any) -> torch.Tensor:
    """Return a module's own weight as [out, in], sharing memory."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def put_online_(model: Any, name: str, weight: CompressedWeight) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, Online(weight, model.get_submodule(name).bias))


def moved(model: Any, spine: Spine) -> float:
    """Return how far the logits are from the original's, relative to the largest."""
    return float((run(model) - spine.logits).abs().max() / spine.logits.abs().max())


def rescale_(model: Any, spine: Spine, search: Any, placement: Placement, *, whole: bool = True) -> int:
    """Scale every group that can be, and return how many; without `whole` the consumers are left as they were."""
    done = 0
    for block, names, fold in spine.groups:
        if placement == "folded" and fold is None:
            continue
        weights = [matrix(model.get_submodule(name)) for name in names]
        channel_of = fold.channel_of if placement == "folded" and fold is not None else None
        made_by = fold if placement == "folded" else None
        producer = None if made_by is None else row_sizes(model.get_submodule(block), made_by)
        factor = search.plan([w.float() for w in weights], spine.stats[names[0]], FMT, channel_of, INPUTS, producer)
        done += bool((factor != 1).any())
        if placement == "folded":
            assert fold is not None
            factor = apply_fold_(model.get_submodule(block), fold, fold.per_channel(factor))
        for name, w in zip(names, weights, strict=True):
            if placement == "online":
                put_online_(model, name, CompressedWeight((Exact(w * factor.double()),), Scale(1 / factor)))
            elif whole:
                w.mul_(factor.double())
    return done


@pytest.mark.parametrize(("name", "settings", "placement"), SEARCHES)
def test_channel_factors_keep_the_function(
    name: str, settings: dict[str, Any], placement: Placement, spine: str, models: Callable[[str], Spine]
) -> None:
    of = models(spine)
    model = copy.deepcopy(of.model)
    done = rescale_(model, of, SCALE_SEARCHES[name](**settings), placement)
    nothing = spine in NOTHING_FOLDS or (name == "equalize" and spine in NO_PAIR)
    assert bool(done) != (placement == "folded" and nothing)
    assert moved(model, of) < LIMIT


def test_a_fold_that_is_not_made_up_for_is_seen(models: Callable[[str], Spine]) -> None:
    of = models("llama")
    model = copy.deepcopy(of.model)
    rescale_(model, of, SCALE_SEARCHES["smooth-plus"](alpha=0.5), "folded", whole=False)
    assert moved(model, of) > 1000 * LIMIT


def change_(model: Any, spine: Spine, change: Any) -> set[Site]:
    """Put every plain weight into its basis, and return the sites at which there is a map then."""
    reached: set[Site] = set()
    for _, names, _ in spine.groups:
        for name in names:
            w = matrix(model.get_submodule(name))
            maps: Maps = change.plan(w.float(), spine.stats[name], FMT)
            put_online_(model, name, with_maps(CompressedWeight((Exact(into_basis(w, maps)),)), maps))
            sides: tuple[Site, Site] = ("layer input", "layer output")
            reached |= {site for site, side in zip(sides, maps, strict=True) if side is not None}
    return reached


@pytest.mark.parametrize(("name", "settings"), CHANGES)
def test_changes_of_basis_keep_the_function(
    name: str, settings: dict[str, Any], spine: str, models: Callable[[str], Spine]
) -> None:
    of = models(spine)
    model = copy.deepcopy(of.model)
    reached = change_(model, of, BASIS_CHANGES[name](**settings))
    assert reached
    assert reached <= set(BASIS_CHANGES[name].sites)
    assert moved(model, of) < LIMIT


@pytest.mark.parametrize("name", APPROXIMATE)
def test_an_approximate_change_moves_the_function_and_says_so(name: str, models: Callable[[str], Spine]) -> None:
    of, row = models("llama"), BASIS_CHANGES[name]
    assert "approximate" in row.summary
    model = copy.deepcopy(of.model)
    assert change_(model, of, row(share=0.1, bits=2)) == {"layer input"}
    assert LIMIT < moved(model, of) < APPROXIMATE[name]


@pytest.mark.parametrize("name", BASIS_CHANGES)
def test_every_site_that_a_row_declares_is_reached(name: str, models: Callable[[str], Spine]) -> None:
    row, of = BASIS_CHANGES[name], models("llama")
    assert all(placements == {"online"} for placements in row.sites.values())
    reached = [change_(copy.deepcopy(of.model), of, row(**settings)) for settings in SETTINGS.get(name, ({},))]
    assert set().union(*reached) == set(row.sites)


def test_the_laws_know_every_site_that_is_declared() -> None:
    """A row at another site needs a law of its own before it may be in the table."""
    assert list(SITES) == list(get_args(Site))
    assert list(PLACEMENTS) == list(get_args(Placement))
    for name, row in TRANSFORMS.items():
        assert bool(row.sites) == (name not in TARGETS), name
        known = {"residual", "value"} if name in NETWORK_CHANGES else {"layer input", "layer output"}
        known = {"query/key"} if name in ATTENTION_CHANGES else known
        assert set(row.sites) <= known, name
        assert all(placements and placements <= set(PLACEMENTS) for placements in row.sites.values()), name


@pytest.mark.parametrize("name", ATTENTION_CHANGES)
def test_rotations_of_scores_keep_the_function(name: str, spine: str, models: Callable[[str], Spine]) -> None:
    """Queries and keys are turned, and nothing is rounded, wherever transformers' interface computes the attention."""
    of = models(spine)
    model = copy.deepcopy(of.model)
    seen: dict[str, list[torch.Tensor]] = {}
    watched = {n: {"keys": seen.setdefault(n, []).append} for n, _ in model.named_modules()}
    if spine.startswith("mamba"):  # no attention, and so no such interface
        with pytest.raises(CheckpointError, match="in a way of its own"), watching(model, watched):
            run(model)
        return
    with watching(model, watched):
        run(model)
    rows = {n: found[0].shape[-1] for n, found in seen.items() if found}
    assert len(rows) == 2
    change = ATTENTION_CHANGES[name]()
    round_attention_(model, {n: AttentionOperands(rotation=change.plan(row)) for n, row in rows.items()})
    turned: dict[str, list[torch.Tensor]] = {n: [] for n in rows}
    with watching(model, {n: {"keys": turned[n].append} for n in rows}):
        assert moved(model, of) < LIMIT
    assert not any(torch.allclose(turned[n][0], seen[n][0]) for n in rows)


@pytest.mark.parametrize("name", CHANNEL_CHANGES)
def test_changes_of_channels_keep_the_function(name: str, spine: str, models: Callable[[str], Spine]) -> None:
    """The product sees its input itself if nothing is rounded between `enter` and `leave`."""
    of = models(spine)
    model, reached = copy.deepcopy(of.model), 0
    for _, names, _ in of.groups:
        for module in names:
            stats, w = of.stats[module], matrix(model.get_submodule(module)).float()
            if name == "shift":
                fmt = ChannelFormat(ActivationFormat(INPUTS), shift=Shift().plan(stats))
                reached += bool((fmt.tensors["shift"] != 0).any())
            else:
                copies = Disassemble(share=0.5).plan(
                    stats.sample, w, lambda x, n: ChannelFormat(ActivationFormat(INPUTS), copies=n).round(x)
                )
                fmt = ChannelFormat(ActivationFormat(INPUTS), copies=copies)
                reached += bool((copies > 1).any())
            of_layer = model.get_submodule(module)
            of_layer.register_forward_pre_hook(lambda _, x, fmt=fmt: (fmt.leave(fmt.enter(x[0])),))
    assert reached
    assert moved(model, of) < LIMIT


# Architectures whose norms, and the layers behind them, have biases.
BIASED = {"opt": 4, "gpt2": 4}


@torch.no_grad()
def test_folded_shifts_keep_the_function(spine: str, models: Callable[[str], Spine]) -> None:
    of = models(spine)
    model, done = copy.deepcopy(of.model), 0
    before = copy.deepcopy(model)
    for block_name, groups in itertools.groupby(of.groups, key=lambda group: group[0]):
        own, block = list(groups), model.get_submodule(block_name)
        views = [[observed(model, name) for name in names] for _, names, _ in own]
        folds = {g: fold for g, (_, _, fold) in enumerate(own) if fold is not None}
        for g, found in find_shift_folds(block, one_block(model, block), views, folds).items():
            shift = Shift().plan(of.stats[own[g][1][0]]).double()
            norm = block.get_submodule(found.producer)
            bias, taken = norm_bias(norm.bias.detach(), shift)
            norm.bias.data.copy_(bias)
            for name in found.consumers:
                layer: Any = block.get_submodule(name)
                layer.bias.data.copy_(layer_bias(layer.bias.detach(), matrix(layer), taken))
            assert float((norm.bias - before.get_submodule(f"{block_name}.{found.producer}").bias).abs().max()) > 0
            done += 1
    assert done == BIASED.get(spine, 0)
    assert moved(model, of) < LIMIT


# What of a network has one basis only, and why: norms of what blocks add to the stream; attentions whose experts read them.
ONE_BASIS = {
    ("gemma3", "residual"): "post_attention_layernorm: its gain",
    ("jetmoe", "values"): "is not the input of a product",
    ("mamba", "values"): "no attention was found",
    ("mamba2", "values"): "no attention was found",
}


@pytest.mark.parametrize("name", NETWORK_CHANGES)
@pytest.mark.parametrize(("site", "kind"), [("residual", "hadamard"), ("values", "orthogonal")])
def test_changes_of_the_network_keep_the_function(
    name: str, site: str, kind: str, spine: str, models: Callable[[str], Spine]
) -> None:
    of = models(spine)
    change = NETWORK_CHANGES[name](kind=kind, residual=site == "residual", values=site == "values")  # type: ignore[arg-type]
    config, ties = of.model.config.to_dict(), dict(of.model.all_tied_weights_keys)
    if (spine, site) in ONE_BASIS:
        with pytest.raises(CheckpointError, match=ONE_BASIS[spine, site]):
            find_rotated(config, ties, change, spine)
        return
    rotated, values = find_rotated(config, ties, change, spine)
    tensors = {key: p.detach().clone() for key, p in of.model.named_parameters()}
    before = dict(tensors)
    rotated.apply_(tensors)
    turned = {turn.parameter for turn in rotated.heads}
    if rotated.residual is not None:
        turned |= {turn.parameter for turn in rotated.residual.turns}
        norms = rotated.residual.norms.values()
        assert all(bool((tensors[norm.weight] + norm.offset == 1).all()) for norm in norms)
        assert len(norms) == 1 + of.blocks * (1 if spine in NO_PAIR else 2)
    assert not [key for key in turned if torch.equal(tensors[key], before.get(key, before[ties.get(key, key)]))]
    model = build_skeleton(build_config(values), torch.float64)
    for key, buffer in of.model.named_buffers():
        model.get_buffer(key).copy_(buffer)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    assert not any(p.is_meta for p in model.parameters())
    assert moved(model, of) < LIMIT


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_the_weight_where_inputs_are_the_originals(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    w, x = torch.randn(24, 32, generator=generator), torch.randn(200, 32, generator=generator)
    same = Stats(200, x.T @ x / 200, x.abs().mean(0), cross=torch.zeros(32, 32))
    aimed, fallbacks = TARGETS[name]().aim(w, same)
    assert torch.equal(aimed, w)
    assert fallbacks == ()
    other = Stats(200, x.T @ x / 200, x.abs().mean(0), cross=0.1 * x.T @ x / 200)
    assert not torch.equal(TARGETS[name]().aim(w, other)[0], w)
