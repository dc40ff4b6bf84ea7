"""What can be rotated is found by what a network does: which axes are in the residual stream's basis, and why a stream has one only."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bitpress.errors import CheckpointError, NumericsError
from bitpress.models.axis_trace import AxisTrace
from bitpress.models.residual import Residual, Turn, find_residual
from bitpress.models.rotated import RotatedNetwork
from bitpress.models.rotating import find_rotated
from bitpress.transforms.rotate import Rotate

LAW = runpy.run_path(str(Path(__file__).parents[1] / "laws" / "architectures.py"))
WIDTH = 8

# Why not, by what is particular to the architecture. All of it is one line.
REFUSED = {
    "gemma2": r"layers\.0\.post_attention_layernorm: its gain is for each channel of the residual stream itself",  # norms of outputs
    "olmo2": r"layers\.0\.post_attention_layernorm: its gain is for each channel",
    "longcat_flash": r"post_attention_layernorm\.0: its gain is for each channel",  # experts that return what they are given
    "bloom": r"word_embeddings_layernorm: its gain is for each channel",
    "xglm": r"not given one residual stream",  # a table of constants is added
    "doge": r"its gain is for each channel",  # each residual has factors of its own
}
NO_VALUES = {
    "doge": r"dt_proj\.weight: depends on values in another way than through an attention",
    "qwen3_next": r"self_attn: its output is not the input of a product",  # gated
    "mamba": r"no attention was found",
}


def found_of(name: str, rotate: Rotate) -> RotatedNetwork:
    config = LAW["small_config"](name)
    return find_rotated(config.to_dict(), {}, rotate, "here")[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in REFUSED if name in LAW["names"]()])
def test_a_stream_that_has_one_basis_only_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"here: cannot be rotated: .*{REFUSED[name]}") as caught:
        found_of(name, Rotate(values=False))
    assert "\n" not in str(caught.value)
    assert "Leave rotate out, or rotate values alone" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NO_VALUES if name in LAW["names"]()])
def test_values_that_are_not_alone_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"here: value heads cannot be rotated: .*{NO_VALUES[name]}.*use values: false"):
        found_of(name, Rotate(residual=False))


def test_the_document_says_the_same() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "rotation.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| `")}
    for at, table in enumerate((REFUSED, NO_VALUES)):
        for name, why in table.items():
            assert re.search(why, rows[name][at]), name
    assert [rows[name][0] for name in ("llama", "gpt2", "mixtral", "deepseek_v3", "falcon_mamba")] == ["yes"] * 5


class Block(nn.Module):
    """Adds to a stream what it reads behind a norm; `twist` changes the stream besides."""

    def __init__(self, twist: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.twist = twist

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.down(torch.relu(self.up(h))) + self.experts[0](h)  # the second is for other texts
        return x if self.twist is None else self.twist(x)


class Network(nn.Module):
    def __init__(self, twist: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.config = None
        self.table = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block(twist) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 20, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TASK: Any = SimpleNamespace(
    trial=lambda config, samples, length: torch.arange(samples * length).reshape(samples, length),
    forward=lambda model, tokens: model(tokens),
)


def stream_of(twist: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Residual | str:
    model = Network(twist)
    trace = AxisTrace(model, TASK, list(model.blocks))
    trace.run()
    return find_residual(trace, "blocks")


def test_what_reads_and_what_writes_is_told_apart_and_an_unused_expert_is_like_its_neighbour() -> None:
    found = stream_of()
    assert isinstance(found, Residual)
    assert (found.width, found.centred) == (WIDTH, True)
    inside = [
        *(("norm.weight", turn) for turn in (("up.weight", 1), ("experts.0.weight", 1), ("experts.1.weight", 1))),
        *((None, turn) for turn in (("down.weight", 0), ("down.bias", 0))),
        *((None, (f"experts.{k}.{leaf}", 0)) for k in range(2) for leaf in ("weight", "bias")),
    ]
    wanted = {Turn("table.weight", 1), Turn("head.weight", 1, "norm.weight")}
    for i in range(2):
        wanted |= {Turn(f"blocks.{i}.{n}", a, None if g is None else f"blocks.{i}.{g}") for g, (n, a) in inside}
    assert set(found.turns) == wanted
    assert {norm.bias for norm in found.norms.values()} == {None, "norm.bias"}


def test_a_network_of_one_file_is_the_same_in_another_basis() -> None:
    model = Network().double()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for block in model.blocks:
        block.norm.weight.data[3] = 0.0  # a channel that nobody reads
    found = stream_of()
    assert isinstance(found, Residual)
    state = {name: p.data for name, p in model.named_parameters()}
    other = Network().double()
    network = RotatedNetwork(Rotate(kind="orthogonal"), found, ())
    turned = dict(state)
    network.apply_(turned)
    other.load_state_dict(turned)
    # Every expert runs where a text wants it.
    for of in (model, other):
        for block in of.blocks:
            block.experts = nn.ModuleList(reversed(list(block.experts)))
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        says, said = other(tokens), model(tokens)
    assert not torch.equal(other.table.weight, model.table.weight)
    assert (says - said).abs().max() < 1e-10 * said.abs().max()
    state["norm.weight"][2] = 0.0
    with pytest.raises(NumericsError, match=r"norm\.weight: is 0 for a channel to which norm\.bias adds"):
        network.apply_(state)


@pytest.mark.parametrize(
    ("twist", "why"),
    [
        (torch.tanh, "blocks.0: tanh works on single channels"),
        (lambda x: x * x.sigmoid(), "blocks.0: sigmoid works on single channels"),
        (lambda x: x + torch.arange(WIDTH), "blocks.0: what is in no basis is added"),
        (lambda x: x.flip(-1), "blocks.0: parts of the channels are taken apart"),
        (lambda x: torch.cat([x[..., 4:], x[..., :4]], -1), "blocks.0: parts of the channels are taken apart"),
        (lambda x: x * torch.arange(WIDTH), "blocks.0: values are multiplied channel by channel"),
        (lambda x: x.amax(-1, keepdim=True) + x, "blocks.0: amax works on single channels"),
        (lambda x: x.square() + x, "blocks.0: what is in no basis is added"),
        (lambda x: x @ x.mT @ x, "blocks.0: a product in another form"),
    ],
)
def test_what_works_on_single_channels_is_named(twist: Callable[[torch.Tensor], torch.Tensor], why: str) -> None:
    found = stream_of(twist)
    assert isinstance(found, str)
    assert why in found or "not given one residual stream" in found


@pytest.mark.parametrize(
    "twist",
    [
        lambda x: 2 * x / 3,
        lambda x: x * x.pow(2).mean(-1, keepdim=True).rsqrt(),
        lambda x: (x - x.mean(-1, keepdim=True)) * x.var(-1, keepdim=True).rsqrt(),
        lambda x: torch.zeros_like(x).index_add_(1, torch.arange(x.shape[1]), x),
        lambda x: torch.nn.functional.normalize(x, dim=-1).transpose(0, 1).cumsum(1).transpose(0, 1),
    ],
)
def test_what_is_the_same_in_every_basis_is_allowed(twist: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert isinstance(stream_of(twist), Residual)
