"""Layers that hold compressed weights inside a model of transformers.

A weight's tensors are buffers under the names that they have in the file (`term0.codes`, `in.scale`), so that any loader that goes by
names can fill them. `decode_` turns a layer into its decoded matrix in the model's own type: as fast as the original and as large.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bitpress.checkpoints.parameter import WeightParameter
from bitpress.formats import CompressedWeight
from bitpress.kernels import choose_kernel

__all__ = ["PackedExperts", "PackedLinear", "PackedWeight", "replace_"]


class PackedWeight(nn.Module):
    """The tensors of one compressed weight, as buffers, and the weight made of them; `decoded` is its matrix, once it is."""

    decoded: torch.Tensor | None

    def __init__(self, spec: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("decoded", None, persistent=False)
        self.spec = dict(spec)
        self.names = tuple(CompressedWeight.expected(spec))
        for name, (dtype, shape) in CompressedWeight.expected(spec).items():
            owner: nn.Module = self
            *folders, leaf = name.split(".")
            for folder in folders:
                if folder not in owner._modules:
                    owner.add_module(folder, nn.Module())
                owner = owner._modules[folder]  # type: ignore[assignment]
            owner.register_buffer(leaf, torch.empty(shape, dtype=dtype, device="meta"))

    def weight_terms(self) -> CompressedWeight:
        """Put the weight together from the buffers, with every check of content."""
        if not hasattr(self, "_weight"):
            self._weight = CompressedWeight.build(self.spec, {name: self.get_buffer(name) for name in self.names})
        return self._weight

    def _hold_(self, decoded: torch.Tensor) -> None:
        """Keep the decoded matrix and let the codes go."""
        self.decoded = decoded.to(self.dtype)
        self.__dict__.pop("_weight", None)
        self._modules.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedWeight":
        """Move everything to another device; a new type is for the bias and the decoded matrix, that of the codes is their format."""
        self.__dict__.pop("_weight", None)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def moved(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        for child in self.children() if recurse else ():
            child._apply(moved)
        super()._apply(fn, recurse=False)
        return self


class PackedLinear(PackedWeight):
    """A linear layer over a compressed weight: `y = x @ w_hat.T + bias`."""

    def __init__(self, spec: Mapping[str, Any], bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.out_features, self.in_features = spec["shape"]
        self.bias = bias

    def decode_(self) -> None:
        self._hold_(self.weight_terms().dequantize())

    @property
    def weight(self) -> torch.Tensor:
        """Give code that looks at a layer's weight (for its type, or to initialise it) the matrix, or its shape while packed."""
        if self.decoded is not None:
            return self.decoded
        shown = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        shown._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves alone what bears this mark
        return shown

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.decoded is not None:
            return nn.functional.linear(x, self.decoded.to(x.dtype), self.bias)
        weight = self.weight_terms()
        y = choose_kernel(weight, x.device).matmul(x, weight)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        kinds = " + ".join(str(term.get("format", term["kind"])) for term in self.spec["terms"])
        return f"{self.in_features} -> {self.out_features}, {kinds}"


class PackedExperts(PackedWeight):
    """Stands where a parameter of experts stood; indexing it decodes that expert's matrix, any other product decodes all of them."""

    def __init__(self, spec: Mapping[str, Any], parameter: WeightParameter, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self.parameter = parameter
        self.shape = torch.Size(parameter.parameter_shape)

    def decode_(self) -> None:
        self._hold_(self.parameter.restore(self.weight_terms().dequantize()))

    def whole(self) -> torch.Tensor:
        """Give the parameter that this stands for."""
        if self.decoded is not None:
            return self.decoded
        return self.parameter.restore(self.weight_terms().dequantize()).to(self.dtype)

    def __getitem__(self, expert: Any) -> torch.Tensor:
        if self.decoded is not None or self.parameter.flat:
            return self.whole()[expert]
        rows = self.parameter.shape[0]
        e = int(expert)
        matrix = self.weight_terms().row_slice(e * rows, (e + 1) * rows).dequantize().to(self.dtype)
        return matrix.T if self.parameter.transposed else matrix

    def view(self, *shape: Any) -> torch.Tensor:
        return self.whole().view(*shape)

    def transpose(self, first: int, second: int) -> torch.Tensor:
        return self.whole().transpose(first, second)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let torch's functions take this for the parameter."""

        def plain(value: Any) -> Any:
            return value.whole() if isinstance(value, PackedExperts) else value

        return func(*map(plain, args), **{key: plain(value) for key, value in (kwargs or {}).items()})


def replace_(model: nn.Module, parameter: WeightParameter, spec: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Put a packed layer where the parameter's module (of experts, the parameter itself) is."""
    if parameter.experts:
        owner_name, _, leaf = parameter.name.rpartition(".")
        owner = model.get_submodule(owner_name)
        del owner._parameters[leaf]
        owner.add_module(leaf, PackedExperts(spec, parameter, dtype))
        return
    owner_name, _, leaf = parameter.stem.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = owner.get_submodule(leaf)
    bias = getattr(old, "bias", None)
    setattr(owner, leaf, PackedLinear(spec, bias, dtype))
