"""Uses: what a model does with each of its matrices, found by running its own code once without any weight.

The model runs on two short texts. Every product with a parameter is answered with random numbers of the right shape, so no weight is
read and the largest model takes the memory of its activations. Roles follow from what is seen, never from a size or a name:

  orientation   the axis of the parameter that is summed over, by the strides of the view that the product was called with
  router        a product of which indices are made (top-k, argmax, sort) that something later uses, over a range that does not
                grow with the text; or one number per token that other values are multiplied by: the gate of a shared expert

What a value was made of is tracked by storage, back to the nearest product: those before it do not count.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bitpress.errors import CheckpointError
from bitpress.exhaustion import is_out_of_memory
from bitpress.models.hollow import BREAKS, buffers_on_host
from bitpress.models.task import Task

__all__ = ["Axis", "Product", "Use", "as_meta", "find_uses", "tensors_in", "weightless", "written_argument"]

aten = torch.ops.aten

# product -> positions of its two operands; the left one is summed over its last axis, the right one over its last but one
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.mv: (0, 1),
    aten.addmv: (1, 2),
    aten.dot: (0, 1),
}
_NOTHING: frozenset[str] = frozenset()
# Of different lengths, so that a choice among tokens differs from one among experts; short, so that it costs little.
_LENGTHS = (5, 8)


class Axis(NamedTuple):
    """An axis of a view of a parameter."""

    stride: int
    size: int


@dataclass(frozen=True)
class Product:
    """A view of a parameter as a product takes it: the axis summed over, the one of outputs, and where the view begins."""

    summed: Axis
    outputs: Axis
    start: int = 0


@dataclass
class Use:
    """What a model does with a parameter of two or more axes.

    products    views that values were multiplied by
    computed    products in another way: with something that is computed from the parameter first, on the left, a convolution
    others      names of the other functions it went into together with values
    router      it says which experts run, or how much of a shared one
    """

    products: set[Product] = field(default_factory=set)
    computed: bool = False
    others: set[str] = field(default_factory=set)
    router: bool = False

    @property
    def multiplies(self) -> bool:
        return bool(self.products) or self.computed


def find_uses(model: torch.nn.Module, task: Task) -> dict[str, Use]:
    """Find what a model does with every parameter of two or more axes, by name. No weight is read or kept.

    Raises CheckpointError when the model's code cannot be run on short inputs.
    """
    first = _Trace(model, task)
    first.run(_LENGTHS[0])
    if first.choices:
        second = _Trace(model, task)
        second.run(_LENGTHS[1])
        for name, sizes in first.choices.items():
            # A choice among tokens, as sparse attention makes it, has another range in a longer text.
            if sizes & second.choices.get(name, set()):
                first.uses[name].router = True
    for name in first.gates:
        first.uses[name].router = True
    return first.uses


class _Trace(TorchDispatchMode):
    """One run of a model without weights; notes the uses of its parameters while it goes."""

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.uses: dict[str, Use] = {name: Use() for name, p in model.named_parameters() if p.ndim >= 2}
        self.choices: dict[str, set[int]] = {}
        self.gates: set[str] = set()
        self._random = torch.Generator().manual_seed(0)
        # By address of a storage. A weak reference keeps the address from being given to another one.
        self._parameters: dict[int, str] = {}
        self._computed: dict[int, frozenset[str]] = {}
        self._sources: dict[int, frozenset[str]] = {}
        self._chosen: dict[int, tuple[frozenset[str], int]] = {}
        self._storages: dict[int, StorageWeakRef] = {}

    def run(self, length: int) -> None:
        config: Any = self.model.config
        inputs = self.task.trial(config, 1, length)
        with weightless(self.model) as parameters, torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.ndim >= 2:
                    self._parameters[self._address(parameter)] = name
            try:
                with self:
                    self.task.forward(self.model, inputs)
            except BREAKS as error:
                if is_out_of_memory(error):
                    raise
                raise CheckpointError(
                    f"{type(self.model).__name__}: its code does not run on short inputs: {' '.join(str(error).split())[:200]}"
                ) from error

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        weights = [t for t in tensors if t.is_meta]
        if weights and len(weights) == len(tensors):
            return self._of_weights(func, args, kwargs, weights)
        if kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cpu")
        if weights:
            return self._mixed(func, args, kwargs, tensors)
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, tensors, out)
        return out

    def _of_weights(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weights: Sequence[torch.Tensor]) -> Any:
        """Compute something of parameters alone, which stays without values."""
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        out = func(*args, **kwargs)
        names = _NOTHING.union(*(self._names(w) for w in weights))
        for made in tensors_in(out):
            address = self._address(made)
            if address not in self._parameters:  # a view of a parameter is that parameter
                self._computed[address] = names | self._computed.get(address, _NOTHING)
        return out

    def _mixed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]) -> Any:
        """Answer a function of values and parameters by random numbers in the shape of its result."""
        values = [t for t in tensors if not t.is_meta]
        operands = _PRODUCTS.get(func.overloadpacket)
        made_of = _NOTHING.union(*(self._sources_of(t) for t in values))
        used = {name for t in tensors if t.is_meta for name in self._names(t)}
        if operands is not None:
            left, right = (args[at] for at in operands)
            weight = left if left.is_meta else right
            if weight.is_meta and not (left.is_meta and right.is_meta):
                made_of = frozenset(self._names(weight))
                self._note_product(weight, weight is left)
                used -= made_of
        function = _name_of(func, args)
        for name in used:
            if function == "convolution":
                self.uses[name].computed = True
            else:
                self.uses[name].others.add(function)
        written = written_argument(func, args, kwargs)
        if written is not None and not written.is_meta:
            self._set_sources(written, made_of | self._sources_of(written))
            return written
        shapes = func(*tree_map(as_meta, args), **tree_map(as_meta, kwargs))
        out = tree_map(self._draw, shapes)
        for made in tensors_in(out):
            self._set_sources(made, made_of)
        return out

    def _note_product(self, weight: torch.Tensor, is_left: bool) -> None:
        # Calibration looks for the weight on the right.
        seen = self._is_plain(weight) and not is_left
        axes = [Axis(stride, size) for stride, size in zip(weight.stride(), weight.shape, strict=True)]
        if weight.ndim == 1:
            axes.insert(0 if is_left else 1, Axis(0, 1))
        summed, outputs = (axes[-1], axes[-2]) if is_left else (axes[-2], axes[-1])
        for name in self._names(weight):
            if seen:
                self.uses[name].products.add(Product(summed, outputs, int(weight.storage_offset())))
            else:
                self.uses[name].computed = True

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor], out: Any
    ) -> None:
        """Carry on what values are made of; note indices that are made of products, and that they are used."""
        addresses = [self._address(t) for t in tensors]
        for address in addresses:
            if address in self._chosen:
                names, size = self._chosen[address]
                for name in names:
                    self.choices.setdefault(name, set()).add(size)
        sources = [self._sources.get(address, _NOTHING) for address in addresses]
        made_of = _NOTHING.union(*sources)
        if not made_of:
            return
        if func.overloadpacket in (aten.mul, aten.mul_):
            self._note_gates(tensors)
        for made in tensors_in(out):
            address = self._address(made)
            if made.dtype == torch.int64:
                chooser = next((t for t, of in zip(tensors, sources, strict=True) if of and t.is_floating_point()), None)
                if chooser is not None and (size := _range_of(func, args, kwargs, chooser)) > 1:
                    self._chosen[address] = (self._sources_of(chooser), size)
            self._sources[address] = made_of | self._sources.get(address, _NOTHING)

    def _note_gates(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != 2 or any(t.ndim == 0 for t in tensors):
            return
        gate, gated = sorted(tensors, key=lambda t: t.shape[-1])
        if gate.shape[-1] == 1 < gated.shape[-1]:
            for name in self._sources_of(gate):
                views = self.uses[name].products
                if views and all(view.outputs.size == 1 for view in views):
                    self.gates.add(name)

    def _names(self, weight: torch.Tensor) -> frozenset[str]:
        address = self._address(weight)
        if address in self._parameters:
            return frozenset({self._parameters[address]}) & self.uses.keys()
        return self._computed.get(address, _NOTHING)

    def _is_plain(self, weight: torch.Tensor) -> bool:
        return self._address(weight) in self._parameters

    def _sources_of(self, value: torch.Tensor) -> frozenset[str]:
        return self._sources.get(self._address(value), _NOTHING)

    def _set_sources(self, value: torch.Tensor, names: frozenset[str]) -> None:
        self._sources[self._address(value)] = names

    def _address(self, t: torch.Tensor) -> int:
        storage = t.untyped_storage()
        address: int = storage._cdata
        if address not in self._storages:
            self._storages[address] = StorageWeakRef(storage)
        return address

    def _draw(self, shape: Any) -> Any:
        if not isinstance(shape, torch.Tensor):
            return shape
        if not shape.is_floating_point():
            return torch.zeros(shape.shape, dtype=shape.dtype)
        # The same for every token, so that all choose the same few experts: a model may run through hundreds of them.
        last = shape.shape[-1:]
        return torch.randn(last, generator=self._random).to(shape.dtype).expand(shape.shape).contiguous()


@contextmanager
def weightless(model: torch.nn.Module) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Put parameters without values into a model, and ones for vectors; put its own back afterwards."""
    made: dict[int, torch.nn.Parameter] = {}
    names: dict[str, torch.nn.Parameter] = {}
    own: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    try:
        for path, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    empty = torch.empty if parameter.ndim >= 2 else torch.ones
                    device = "meta" if parameter.ndim >= 2 else "cpu"
                    value = empty(parameter.shape, dtype=parameter.dtype, device=device)
                    made[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
                    names[f"{path}.{leaf}".removeprefix(".")] = made[id(parameter)]
                own.append((module, leaf, parameter))
        for module, leaf, parameter in own:
            module._parameters[leaf] = made[id(parameter)]
        with buffers_on_host(model):
            yield names
    finally:
        for module, leaf, parameter in own:
            module._parameters[leaf] = parameter


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def as_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def written_argument(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the argument that a function changes in its place."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            return value if isinstance(value, torch.Tensor) else None
    return None


def _range_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: torch.Tensor) -> int:
    """Return the number of values among which a function chooses; 0 where it does not choose along an axis."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            dim = args[at] if at < len(args) else kwargs.get("dim", argument.default_value)
            return source.shape[dim] if isinstance(dim, int) and source.ndim else source.numel()
    return 0


def _name_of(func: Any, args: tuple[Any, ...]) -> str:
    name = str(func.overloadpacket).rpartition(".")[2].strip("_")
    if name == "convolution":
        # convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
        return "convolution of each channel" if args[8] == args[0].shape[1] else name
    return name
