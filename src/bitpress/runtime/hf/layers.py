"""Layers that keep compressed weights inside a model of transformers and decode them at every product.

Only packed models have them: a decoded model is made of the original's own modules and parameters. A weight's tensors are buffers under
the names that they have in the file (`term0.codes`, `in.scale`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from bitpress.checkpoints.parameter import WeightParameter
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight
from bitpress.kernels import choose_kernel

__all__ = ["PackedLinear", "PackedParameter", "PackedWeight", "refuse_saving", "replace_"]


def refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise UsageError: the tensors of packed weights alone are no model."""
    raise UsageError(
        'a model on packed weights is not saved, pickled or copied: copy its directory, or load it with weights="decoded".'
    )


class PackedWeight(nn.Module):
    """The tensors of one compressed weight, as buffers, and the weight made of them."""

    def __init__(self, weight: CompressedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.spec = weight.spec()
        self.names = tuple(weight.tensors())
        for name, tensor in weight.tensors().items():
            owner: nn.Module = self
            *folders, leaf = name.split(".")
            for folder in folders:
                if folder not in owner._modules:
                    owner.add_module(folder, nn.Module())
                owner = owner._modules[folder]  # type: ignore[assignment]
            owner.register_buffer(leaf, tensor)
        self._weight: CompressedWeight | None = weight

    def weight_terms(self) -> CompressedWeight:
        """Return the weight, put together from the buffers again where they have moved."""
        if self._weight is None:
            self._weight = CompressedWeight.build(self.spec, {name: self.get_buffer(name) for name in self.names})
        return self._weight

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedWeight":
        """Move everything to another device; a new type is for the bias and the products, that of the codes is their format."""
        self._weight = None
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
    """A linear layer over a compressed weight: `y = x @ w_hat.T + bias`."""

    def __init__(self, weight: CompressedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.out_features, self.in_features = weight.shape
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The shape and type of the matrix, for code that looks at a layer's weight."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_terms()
        y = choose_kernel(weight, x.device).matmul(x, weight)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        kinds = " + ".join(str(term.get("format", term["kind"])) for term in self.spec["terms"])
        return f"{self.in_features} -> {self.out_features}, {kinds}"


class PackedParameter(PackedWeight):
    """Stands where a parameter stood whose module computes in its own way, such as the 3-d parameter of experts.

    One expert is decoded where it is indexed; whatever else torch does with a parameter, it does with the decoded whole.
    """

    def __init__(self, weight: CompressedWeight, parameter: WeightParameter, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.parameter = parameter

    def tensor(self) -> torch.Tensor:
        """Decode the whole parameter."""
        return self.parameter.restore(self.weight_terms().dequantize()).to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.parameter.parameter_shape)

    @property
    def device(self) -> torch.device:
        return self.get_buffer(self.names[0]).device

    def __getitem__(self, index: Any) -> torch.Tensor:
        is_one = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype != torch.bool)
        if not self.parameter.experts or self.parameter.flat or not is_one:
            return self.tensor()[index]
        expert = range(self.parameter.experts)[int(index)]  # from the end, and never outside
        rows = self.parameter.shape[0]
        matrix = self.weight_terms().row_slice(expert * rows, (expert + 1) * rows).dequantize().to(self.dtype)
        return matrix.T if self.parameter.transposed else matrix

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
        given = {name: _whole(value) for name, value in (kwargs or {}).items()}
        return function(*map(_whole, args), **given)


def _whole(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_whole, value))
    return value.tensor() if isinstance(value, PackedParameter) else value


def replace_(model: nn.Module, parameter: WeightParameter, weight: CompressedWeight, dtype: torch.dtype) -> PackedWeight:
    """Put a packed layer where the parameter's module is, or a packed parameter where its module is no plain linear layer.

    Returns what now stands there.
    """
    from transformers.pytorch_utils import Conv1D

    owner_name, _, leaf = parameter.name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if type(owner) in (nn.Linear, Conv1D) and leaf == "weight" and not parameter.experts:
        above, _, name = owner_name.rpartition(".")
        linear = PackedLinear(weight, owner._parameters["bias"], dtype)
        setattr(model.get_submodule(above), name, linear)
        return linear
    del owner._parameters[leaf]
    packed = PackedParameter(weight, parameter, dtype)
    owner.add_module(leaf, packed)
    return packed
