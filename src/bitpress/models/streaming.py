"""Streaming: run a model block by block, with one block's weights in memory.

The model's own code does everything outside the blocks. Its blocks are told to step aside (`forward` replaced on the instance):
once to learn what the model passes to each of them, and later to feed stored hidden states into the norm and the head. So nothing
here depends on an architecture.

A model computes on one device, where its loaded parts and what blocks are given are. Inputs and hidden states may be anywhere: results
are where the hidden states (in `embed`, the inputs) were. Where more than hidden states goes from block to block, or what blocks are given depends on the text,
the "hidden states" that are stored and passed on here are the states of carried.py.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float

from bitpress.devices import CPU
from bitpress.errors import CheckpointError
from bitpress.formats import AttentionOperands, CompressedLayer
from bitpress.models.attention import HeadSizes, attention_as_it_is, find_attentions, forget_attention_, round_attention_
from bitpress.models.carried import Carried
from bitpress.models.find_carried import choose_stack, find_carried
from bitpress.models.hollow import BREAKS, Stop, hollow, stand_ins
from bitpress.models.parameter_loader import ParameterLoader
from bitpress.models.products import products_as_they_are, products_instead, set_products_
from bitpress.models.skeleton import build_skeleton, move_buffers_, restore_ties_, set_parameter_
from bitpress.models.task import Inputs
from bitpress.models.tasks.table import find_task
from bitpress.models.uses import Use, find_uses

__all__ = ["StreamedModel"]


class StreamedModel:
    """A skeleton of the task that its configuration belongs to, with its outer parts loaded; blocks come and go.

    `where` stands in errors for the configuration.
    """

    def __init__(
        self,
        config: Any,
        loader: ParameterLoader | None,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
        where: str = "config.json",
    ) -> None:
        self.dtype, self.device = dtype, device
        self.task = find_task(config, where)
        self._loader = loader
        self.model = build_skeleton(config, dtype, where=where)
        self.stack, self.blocks = choose_stack(self.model, self.task)
        self._check_apart()
        # What blocks are given beside hidden states: by the shape of the inputs, and by that of the hidden states.
        self._seen: set[torch.Size] = set()
        self._arguments: dict[torch.Size, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._wraps_in_tuple: bool | None = None
        self._width = 0
        self._carried: Carried | None = None
        self._outer_products: list[str] = []

    @property
    def loader(self) -> ParameterLoader:
        if self._loader is None:
            raise CheckpointError("this model has no source of parameters.")
        return self._loader

    @loader.setter
    def loader(self, loader: ParameterLoader) -> None:
        self._loader = loader

    @cached_property
    def uses(self) -> dict[str, Use]:
        """What the model does with each of its matrices."""
        return find_uses(self.model, self.task)

    @cached_property
    def attentions(self) -> dict[str, HeadSizes]:
        """The modules of the blocks that compute an attention, with the heads of each operand. Raises CheckpointError."""
        found = find_attentions(self.model, self.task)
        inside = {name: sizes for name, sizes in found.items() if name.startswith(f"{self.stack}.")}
        if not inside:
            raise CheckpointError(
                f"{type(self.model).__name__}: no attention of its blocks goes through transformers' interface."
            )
        return inside

    def block_name(self, i: int) -> str:
        return f"{self.stack}.{i}"

    def load_outer_(self) -> dict[str, torch.Tensor]:
        """Load everything that is in no block (embeddings, norms, head) and give it as stored, on the host."""
        move_buffers_(self.model, self.device)
        tensors = self.loader.load("", exclude=f"{self.stack}.")
        self.fill_outer_(tensors, self.loader.load_products("", exclude=f"{self.stack}."))
        return tensors

    def fill_outer_(
        self, tensors: Mapping[str, torch.Tensor], products: Mapping[str, CompressedLayer] = MappingProxyType({})
    ) -> None:
        """Set parameters that are in no block, and those that are tied to them; let `products` compute those with their weights."""
        self.fill_(tensors)
        restore_ties_(self.model)
        self.set_products_(products)
        self._outer_products += products

    def drop_outer_(self) -> None:
        """Return the memory of everything outside the blocks back."""
        for name in self._outer_products:
            self.model.get_submodule(name.rpartition(".")[0]).__dict__.pop("forward", None)
        self._outer_products = []
        for name, value in list(self.model.named_parameters()):
            if not name.startswith(f"{self.stack}."):
                set_parameter_(self.model, name, torch.empty_like(value, device="meta"))
        move_buffers_(self.model, CPU)

    def load_block_(self, i: int) -> dict[str, torch.Tensor]:
        """Load one block and give its tensors as stored, on the device."""
        tensors = {name: value.to(self.device) for name, value in self.loader.load(f"{self.block_name(i)}.").items()}
        self.fill_(tensors)
        self.set_products_(self.loader.load_products(f"{self.block_name(i)}."))
        self.set_attention_(self.loader.load_attention(f"{self.block_name(i)}."))
        return tensors

    def fill_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set parameters, floating ones in the type that the model computes in."""
        for name, value in tensors.items():
            set_parameter_(self.model, name, value.to(self.device, self.dtype if value.is_floating_point() else None))

    def set_products_(self, layers: Mapping[str, CompressedLayer]) -> None:
        """Let these layers compute the products with their weights, until the block is dropped. Raises CheckpointError where a module
        computes in a way of its own."""
        set_products_(self.model, layers, self.device)

    def set_attention_(self, operands: Mapping[str, AttentionOperands]) -> None:
        """Let modules round the operands of their attention until their block is dropped. Raises CheckpointError."""
        round_attention_(self.model, operands)

    @contextmanager
    def unrounded(self, i: int) -> Iterator[None]:
        """Let a block compute with its parameters as they are in the meantime, nothing rounded."""
        with products_as_they_are(self.blocks[i]), attention_as_it_is(self.blocks[i]):
            yield

    def drop_block_(self, i: int) -> None:
        """Return the block's memory back."""
        forget_attention_(self.blocks[i])
        for module in self.blocks[i].modules():
            if module is not self.blocks[i]:
                module.__dict__.pop("forward", None)
        for name, value in list(self.blocks[i].named_parameters()):
            set_parameter_(self.blocks[i], name, torch.empty_like(value, device="meta"))

    @property
    def value_columns(self) -> int | None:
        """How many of the first columns of what goes from block to block are values, where others number the tokens; None for all."""
        return None if self._carried is None else self._carried.value_columns

    @property
    def width(self) -> int:
        """Values that are stored between blocks for each position, as far as that can be said before the inputs are seen."""
        self._look_()
        return self._width if self._carried is None else self._carried.width

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> Float[torch.Tensor, "samples positions hidden"]:
        """Return the first block's input, and note what the model passes to every block for this shape."""
        self._look_()
        return self._embed(inputs.to(self.device)).to(inputs.device)

    def _embed(self, inputs: torch.Tensor) -> torch.Tensor:
        arguments = None
        if self._carried is None and inputs.shape not in self._seen:
            arguments = self._learn_arguments(inputs)
            # What depends on the inputs would be wrong for the next batch: ask again with others and compare.
            if not _same(arguments, self._learn_arguments(self.task.vary(inputs, self.model.config))):
                self._carried = find_carried(self.model, self.task, self.blocks, self.dtype)
        if self._carried is not None:
            return self._carried.begin(inputs)

        def stop(*args: Any, **kwargs: Any) -> torch.Tensor:
            raise Stop(args, kwargs)

        with stand_ins(self.blocks, [stop] + [_never] * (len(self.blocks) - 1)):
            hidden = self._until_stop(inputs)
        if arguments is not None:
            self._seen.add(inputs.shape)
            self._arguments[hidden.shape[:2]] = arguments
        return hidden

    @torch.no_grad()
    def run_block(
        self, i: int, hidden: Float[torch.Tensor, "samples positions hidden"]
    ) -> Float[torch.Tensor, "samples positions hidden"]:
        """Run one loaded block on hidden states of a shape that `embed` has seen."""
        return self._run_block(i, hidden.to(self.device)).to(hidden.device)

    def _run_block(self, i: int, hidden: torch.Tensor) -> torch.Tensor:
        if self._carried is not None:
            return self._carried.run(self.model, self.blocks, i, hidden)
        args, kwargs = self._arguments[hidden.shape[:2]][i]
        out = self.blocks[i](hidden, *args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return result

    def run_block_with(
        self,
        i: int,
        hidden: Float[torch.Tensor, "samples positions hidden"],
        values: Mapping[str, torch.Tensor | CompressedLayer],
    ) -> Float[torch.Tensor, "samples positions hidden"]:
        """Run one loaded block with other values for some of its parameters, by their names; a gradient reaches these. A layer in a weight's place
        computes the product with it, and rounds its input as it says."""
        prefix = f"{self.block_name(i)}."
        layers = {name: value for name, value in values.items() if isinstance(value, CompressedLayer)}
        inside = {
            f"block.{name.removeprefix(prefix)}": value.to(self.dtype)
            for name, value in values.items()
            if not isinstance(value, CompressedLayer)
        }
        with products_instead(self.model, layers):
            out: torch.Tensor = torch.func.functional_call(_Runner(self, i), inside, (hidden,))
        return out

    @torch.no_grad()
    def outputs(
        self, inputs: Inputs, hidden: Float[torch.Tensor, "samples positions hidden"]
    ) -> Float[torch.Tensor, "samples ..."]:
        """Return what the model says of the inputs (a language model: logits), from the last block's output."""
        return self._outputs(inputs.to(self.device), hidden.to(self.device)).to(hidden.device)

    def says(
        self, inputs: Inputs, hidden: Float[torch.Tensor, "samples positions hidden"]
    ) -> Float[torch.Tensor, "samples ..."]:
        """Return what `outputs` does, on the device, with a gradient by the hidden states."""
        return self._outputs(inputs.to(self.device), hidden.to(self.device))

    def loss_gradient(
        self,
        inputs: Inputs,
        hidden: Float[torch.Tensor, "samples positions hidden"],
        loss: Callable[[torch.Tensor], torch.Tensor],
    ) -> Float[torch.Tensor, "samples positions hidden"]:
        """Return the gradient, by the last block's output, of a loss of what the model says, which is on the device."""
        with torch.enable_grad():
            leaf = hidden.detach().to(self.device).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(self._outputs(inputs.to(self.device), leaf)), leaf)
        return gradient.to(hidden.device)

    def block_gradients(
        self,
        i: int,
        hidden: Float[torch.Tensor, "samples positions hidden"],
        gradient: Float[torch.Tensor, "samples positions hidden"],
        parameters: Sequence[str],
    ) -> tuple[Float[torch.Tensor, "samples positions hidden"], list[torch.Tensor]]:
        """Run a loaded block again and give the loss's gradients by its input and by parameters, from that by its output.

        Those by parameters are on the device.
        """
        leaves = [self.model.get_parameter(name) for name in parameters]
        for leaf in leaves:
            leaf.requires_grad_(True)
        try:
            with torch.enable_grad():
                start = hidden.detach().to(self.device).requires_grad_()
                out = self._run_block(i, start)
                by_input, *found = torch.autograd.grad(out, [start, *leaves], gradient.to(self.device), allow_unused=True)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        given = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        return (torch.zeros_like(start) if by_input is None else by_input).to(hidden.device), given

    def _outputs(self, inputs: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self._carried is not None:
            return self._carried.finish(self.model, self.blocks, inputs, hidden)

        def replace(_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._wraps_in_tuple else hidden

        def keep(given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (given,) if self._wraps_in_tuple else given

        with stand_ins(self.blocks, [keep] * (len(self.blocks) - 1) + [replace]):
            return self.task.forward(self.model, inputs)

    def _until_stop(self, inputs: torch.Tensor) -> torch.Tensor:
        try:
            self.task.forward(self.model, inputs)
        except Stop as stop:
            hidden: torch.Tensor = stop.args_seen[0]
            return hidden
        raise CheckpointError(f"{type(self.model).__name__} does not run its blocks at {self.stack} in order.")

    def _learn_arguments(self, inputs: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            if len(seen) == len(self.blocks):
                raise Stop((hidden,))
            return (hidden,) if self._wraps_in_tuple else hidden

        with stand_ins(self.blocks, [note] * len(self.blocks)):
            self._until_stop(inputs)
        return seen

    def _check_apart(self) -> None:
        """Raise CheckpointError when blocks share a weight: it would be compressed twice, differently."""
        for alias, original in dict(self.model.all_tied_weights_keys).items():
            if alias.startswith(f"{self.stack}.") and original.startswith(f"{self.stack}."):
                raise CheckpointError(
                    f"{type(self.model).__name__}: {alias} and {original} are one weight; blocks that share weights "
                    "cannot be compressed one by one."
                )

    def _look_(self) -> None:
        """Find out, once, how blocks return their hidden states, or what else they carry. Raises CheckpointError."""
        if self._carried is not None or self._wraps_in_tuple is not None:
            return
        with torch.no_grad(), hollow(self.model):
            plain = next((wrap for wrap in (False, True) if self._steps_aside(wrap)), None)
        if plain is None:
            self._carried = find_carried(self.model, self.task, self.blocks, self.dtype)
            if self._carried.is_plain:  # a mapping was passed along, and nobody uses it
                self._wraps_in_tuple = isinstance(self._carried.form, (tuple, list))
                self._width, self._carried = self._carried.plain_width, None
        else:
            self._wraps_in_tuple = plain

    def _steps_aside(self, wrap: bool) -> bool:
        """Whether the model runs when blocks return their hidden states alone, or in a tuple, and gives them the same for any inputs."""
        samples, length = 3, 4  # three samples: two would unpack as hidden states and something else
        inputs = self.task.trial(self.model.config, samples, length)
        shape = (samples, self.task.positions(self.model.config, length))
        given: list[tuple[int, torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def step_aside(i: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            given.append((i, hidden, args, kwargs))
            return (hidden,) if wrap else hidden

        with stand_ins(self.blocks, [partial(step_aside, i) for i in range(len(self.blocks))]):
            try:
                outputs = self.task.forward(self.model, inputs)
                self.task.forward(self.model, self.task.vary(inputs, self.model.config))
            except BREAKS:
                return False
        first, other = given[: len(self.blocks)], given[len(self.blocks) :]
        self._width = given[0][1].shape[-1] if given else 0
        return (
            [i for i, *_ in given] == 2 * list(range(len(self.blocks)))
            and all(hidden.ndim == 3 and hidden.shape[:2] == shape for _, hidden, *_ in given)
            and not any(_may_be_shared(v) for _, _, args, kwargs in given for v in (*args, *kwargs.values()))
            and _same([g[2:] for g in first], [g[2:] for g in other])
            and self.task.fits(outputs, inputs)
        )


class _Runner(torch.nn.Module):
    """A block as a module of its own, whose forward takes hidden states alone."""

    def __init__(self, model: StreamedModel, i: int) -> None:
        super().__init__()
        self.block = model.blocks[i]
        self._run = partial(model._run_block, i)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._run(hidden)


def _may_be_shared(value: Any) -> bool:
    return isinstance(value, MutableMapping) and not value


def _never(*args: Any, **kwargs: Any) -> Any:
    raise CheckpointError("a block ran before the first one.")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    return True
