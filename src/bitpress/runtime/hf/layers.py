"""Layers that keep compressed weights inside a model of transformers and decode them at every product.

Only packed models have them: a decoded model is made of the original's own modules and parameters. A layer's tensors are buffers under
the names that they have in the file (`term0.codes`, `in.scale`, `input.scale`). Its kernel is chosen when it is loaded, and again where its
tensors have moved to another device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int
from torch import nn

from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import CheckpointError, UsageError
from bitpress.formats import CompressedLayer, CompressedWeight
from bitpress.kernels import Kernel
from bitpress.kernels.product import LayerProduct
from bitpress.models.products import no_product

__all__ = ["PackedLinear", "PackedParameter", "PackedWeight", "refuse_saving", "replace_"]


def refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise UsageError: the tensors of packed weights alone are no model."""
    raise UsageError(
        'a model on packed weights is not saved, pickled or copied: copy its directory, or load it with weights="decoded".'
    )


class PackedWeight(nn.Module):
    """The tensors of one compressed layer, as buffers, and the layer made of them."""

    def __init__(self, layer: CompressedLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.spec, self.input_spec = layer.weight.spec(), layer.input_spec()
        self.names = tuple(layer.tensors())
        for name, tensor in layer.tensors().items():
            owner: nn.Module = self
            *folders, leaf = name.split(".")
            for folder in folders:
                if folder not in owner._modules:
                    owner.add_module(folder, nn.Module())
                owner = owner._modules[folder]  # type: ignore[assignment]
            owner.register_buffer(leaf, tensor)
        self._layer: CompressedLayer | None = layer

    def layer(self) -> CompressedLayer:
        """Return the layer, put together from the buffers again where they have moved."""
        if self._layer is None:
            tensors = {name: self.get_buffer(name) for name in self.names}
            self._layer = CompressedLayer.build(self.spec, tensors, self.input_spec)
        return self._layer

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedWeight":
        """Move everything to another device; a new type is for the bias and the products, that of the codes is their format."""
        self._layer = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def moved(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        for child in self.children() if recurse else ():
            child._apply(moved)
        super()._apply(fn, recurse=False)
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_saving()


class PackedLinear(PackedWeight):
    """A linear layer over a compressed weight: `y = x @ w_hat.T + bias`, its input rounded where the layer says so. With `keep` it holds the
    decoded weight beside the codes."""

    def __init__(self, layer: CompressedLayer, bias: nn.Parameter | None, dtype: torch.dtype, *, keep: bool = False) -> None:
        super().__init__(layer, dtype)
        self._keep = keep
        self.out_features, self.in_features = layer.shape
        self.bias = bias
        self._product: LayerProduct | None = LayerProduct(layer, keep=keep)

    @property
    def weight(self) -> torch.Tensor:
        """The shape and type of the matrix, for code that looks at a layer's weight."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product()(x, self.bias)

    def product(self) -> LayerProduct:
        """Return the layer's product, its kernel chosen again where its tensors have moved."""
        if self._product is None:
            self._product = LayerProduct(self.layer(), keep=self._keep)
        return self._product

    def kernel(self) -> Kernel:
        return self.product().kernel

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        self._product = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        kinds = " + ".join(str(term.get("format", term["kind"])) for term in self.spec["terms"])
        inputs = "" if self.input_spec is None else f", inputs {self.input_spec['format']} {self.input_spec['parameters']}"
        return f"{self.in_features} -> {self.out_features}, {kinds}{inputs}"


class PackedParameter(PackedWeight):
    """Stands where a parameter stood whose module computes in its own way, such as the 3-d parameter of experts.

    One expert is decoded where it is indexed, and of a table the rows that are looked up; whatever else torch does with a parameter, it
    does with the decoded whole.
    """

    def __init__(self, weight: CompressedWeight, parameter: WeightParameter, dtype: torch.dtype) -> None:
        super().__init__(CompressedLayer(weight), dtype)
        self.parameter = parameter

    def tensor(self) -> torch.Tensor:
        """Decode the whole parameter."""
        return self.parameter.restore(self.layer().weight.dequantize()).to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.parameter.parameter_shape)

    def size(self, axis: int | None = None) -> torch.Size | int:
        return self.shape if axis is None else self.shape[axis]

    @property
    def device(self) -> torch.device:
        return self.get_buffer(self.names[0]).device

    def __getitem__(self, index: Any) -> torch.Tensor:
        is_one = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if not self.parameter.experts or self.parameter.flat or not is_one:
            return self.tensor()[index]
        expert = range(self.parameter.experts)[int(index)]  # from the end, and never outside
        rows = self.parameter.shape[0]
        matrix = self.layer().weight.row_slice(expert * rows, (expert + 1) * rows).dequantize().to(self.dtype)
        return matrix.T if self.parameter.transposed else matrix

    def can_look_up(self, tokens: Any, table: Any, padding: Any = None, max_norm: Any = None, *rest: Any) -> bool:
        """Return whether rows can be taken one by one: with tokens that torch would take, and no norm to hold. Else torch has the whole."""
        plain = isinstance(tokens, torch.Tensor) and tokens.dtype in (torch.int32, torch.int64) and max_norm is None
        return plain and tokens.numel() > 0 and int(tokens.min()) >= 0 and int(tokens.max()) < self.shape[0]

    def look_up(self, tokens: Int[torch.Tensor, " *shape"]) -> Float[torch.Tensor, "*shape width"]:
        """Return the rows of tokens, of which `can_look_up` holds; no other row is decoded."""
        found, at = torch.unique(tokens, return_inverse=True)
        return self.layer().weight.rows(found).to(self.dtype)[at]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name not in dir(torch.Tensor):
                raise
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.nn.functional.embedding and isinstance(args[1], PackedParameter) and args[1].can_look_up(*args):
            return args[1].look_up(args[0])
        given = {name: _whole(value) for name, value in (kwargs or {}).items()}
        return function(*map(_whole, args), **given)


def _whole(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_whole, value))
    return value.tensor() if isinstance(value, PackedParameter) else value


def replace_(
    model: Any,
    parameter: WeightParameter,
    layer: CompressedLayer,
    dtype: torch.dtype,
    aliases: Mapping[str, str],
    *,
    keep: bool = False,
) -> list[PackedWeight]:
    """Put a packed layer where the parameter's module is, or a packed parameter where its module is no plain linear layer; `aliases` are
    the parameters that are tied, each with its original, and those of this one get the same codes. With `keep` a layer holds its decoded
    weight too.

    Returns what now stands there. Raises CheckpointError for a rounded input of a module that computes in its own way.
    """
    tied = [alias for alias, original in aliases.items() if original == parameter.name]
    if tied:  # nothing is left for transformers to tie
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in tied}
    return [_put_(model, replace(parameter, name=name), layer, dtype, keep) for name in (parameter.name, *tied)]


def _put_(model: nn.Module, parameter: WeightParameter, layer: CompressedLayer, dtype: torch.dtype, keep: bool) -> PackedWeight:
    owner_name, _, leaf = parameter.name.rpartition(".")
    owner = model.get_submodule(owner_name)
    why = no_product(owner, parameter.name)
    if why is None and not parameter.experts:
        above, _, name = owner_name.rpartition(".")
        linear = PackedLinear(layer, owner._parameters["bias"], dtype, keep=keep)
        setattr(model.get_submodule(above), name, linear)
        return linear
    if layer.input is not None:
        raise CheckpointError(
            f"{parameter.name}: its input is rounded ({layer.input.name}), and {why or 'it is a stack of experts'}; "
            "transformers cannot run this model."
        )
    del owner._parameters[leaf]
    packed = PackedParameter(layer.weight, parameter, dtype)
    owner.add_module(leaf, packed)
    return packed
