"""What every function of a network does to axes: the rules by which `axis_trace` follows them.

Functions that keep a value's last axis as it is, or that are linear along others, are in the tables below; sums join the axes of what they
add; products with parameters lead from the parameter's one axis to its other; everything else pins its operands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from bitpress.models.axes import Gain
from bitpress.models.axis_facts import Fact, Facts, ProductSeen
from bitpress.models.uses import tensors_in

__all__ = ["Rule"]

aten = torch.ops.aten

# product -> positions of its two operands
_PRODUCTS: dict[Any, tuple[int, int]] = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}
# The result's last axis is that of the first operand, if it is as long and no `dim` names it.
_KEEP = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.expand, aten.repeat, aten.unsqueeze, aten.squeeze),
    *(aten.clone, aten._to_copy, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh, aten.permute, aten.transpose),
    *(aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.chunk, aten.narrow, aten.index_select),
    *(aten.neg, aten.cumsum, aten.roll, aten.flip, aten.constant_pad_nd, aten.as_strided),
}
_SUMS = {aten.sum, aten.mean}
_SPREADS = {aten.var, aten.std, aten.var_mean, aten.linalg_vector_norm}
_ADDS = {aten.add, aten.add_, aten.sub, aten.sub_}
_MULTIPLIES = {aten.mul, aten.mul_, aten.div, aten.div_}
_EMPTY = {aten.zeros, aten.new_zeros, aten.zeros_like, aten.empty, aten.new_empty, aten.empty_like, aten.zero_}
_PUTS = {aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_, aten.index_put, aten.index_put_, aten.copy_}


class Rule:
    """One call of a function, and what it means for the axes of its operands and its result."""

    def __init__(
        self,
        known: Facts,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Any,
        facts: Mapping[int, Fact | None],
    ) -> None:
        self.known, self.axes, self.args, self.kwargs, self.out, self.facts = known, known.axes, args, kwargs, out, facts
        self.op, self.schema = func.overloadpacket, func._schema

    def apply(self) -> None:
        """Note the call; a function that no table has pins its operands."""
        op = self.op
        if op in _PRODUCTS:
            self._product()
        elif op in _EMPTY:
            self._result(Fact(self.axes.new(), "zero"))
        elif not any(self.facts.values()):
            self._result(None)
        elif op in _KEEP:
            self._keep()
        elif op is aten.index:
            self._keep(len(self.args[1]) < self.args[0].ndim)
        elif op in (aten.embedding, aten.gather):
            self._look_up()
        elif op in _ADDS:
            self._add(self.args[0], self.args[1])
        elif op in _MULTIPLIES:
            self._multiply(self.args[0], self.args[1])
        elif op in (aten.pow, aten.square) and (op is aten.square or self.args[1] == 2):
            self._square(self.args[0])
        elif op in _SUMS | _SPREADS:
            self._sum()
        elif op in (aten.native_layer_norm, aten._fused_rms_norm):
            self._norm()
        elif op in (aten.cat, aten.stack):
            ends = self._dims(self.out.ndim)
            self._together(self.args[0]) if self.out.ndim - 1 not in ends else self._pin("put side by side")
        elif op in _PUTS:
            self._put()
        elif op in (aten.where, aten.masked_fill, aten.masked_fill_):
            self._mask()
        else:
            self._pin(f"{str(op).rpartition('.')[2].strip('_')} works on single channels")

    def _fact(self, value: Any) -> Fact | None:
        return self.facts.get(id(value)) if isinstance(value, torch.Tensor) else None

    def _result(self, fact: Fact | None) -> None:
        for made in tensors_in(self.out if isinstance(self.out, (tuple, list)) else (self.out,)):
            self.known.know(made, fact)

    def _pin(self, why: str) -> None:
        for fact in self.facts.values():
            if fact is not None:
                self.axes.pin(fact.node, f"{self.known.where}: {why}")
        self._result(None)

    def _argument(self, name: str) -> Any:
        for at, argument in enumerate(self.schema.arguments):
            if argument.name == name:
                return self.args[at] if at < len(self.args) else self.kwargs.get(name, argument.default_value)
        return None

    def _dims(self, ndim: int) -> set[int]:
        """Return the axes that the call names, counted from 0; all of them where it names none but could."""
        found: set[int] = set()
        names = {argument.name for argument in self.schema.arguments}
        for name in ("dim", "dims", "dim0", "dim1"):
            value = self._argument(name)
            if name in names and value is None:
                return set(range(ndim))
            found |= {d % ndim for d in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(d, int)}
        return found

    def _keep(self, fine: bool = True) -> None:
        value = self.args[0]
        fact, ndim = self._fact(value), value.ndim
        if self.op is aten.permute:
            fine = self.args[1][-1] % ndim == ndim - 1
        elif self.op is aten.as_strided or self.op is aten.constant_pad_nd:
            fine = self.op is aten.constant_pad_nd and all(pad == 0 for pad in self.args[1][:2])
        elif self.op not in (aten.unsqueeze, aten.squeeze, aten.index):
            fine = ndim - 1 not in self._dims(ndim)
        outs = tensors_in(self.out if isinstance(self.out, (tuple, list)) else (self.out,))
        if fact is None or not fine or any(o.ndim == 0 or o.shape[-1] != value.shape[-1] for o in outs):
            self._pin("parts of the channels are taken apart")
        else:
            self._result(fact)

    def _look_up(self) -> None:
        rows = self.op is aten.embedding  # or the same of every channel
        if rows or (self.args[1] % self.args[0].ndim != self.args[0].ndim - 1 and self.args[2].stride(-1) == 0):
            self._result(self._fact(self.args[0]))
        else:
            self._pin("channels are picked")

    def _is_number(self, value: Any) -> bool:
        """Whether a value is one number, or one for every token, be it as often as there are channels."""
        return not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[-1] == 1 or value.stride(-1) == 0

    def _add(self, a: Any, b: Any) -> None:
        if self._is_number(a) or self._is_number(b):
            other, number = (b, a) if self._is_number(a) else (a, b)
            fact = self._fact(other)
            if fact is None:
                self._pin("what is in no basis is added")
            elif fact.kind == "vector":
                if isinstance(number, (int, float)) and self.op is aten.add:
                    self._result(replace(fact, offset=fact.offset + number))
                else:
                    self._pin("a parameter is computed with")
            elif fact.kind == "square":
                self._pin("squares are computed with")
            else:
                self.axes.centre(fact.node, self.known.where)
                self._result(fact)
            return
        self._together((a, b))

    def _together(self, values: Sequence[Any]) -> None:
        """The values are added up, or put below each other: their channels are in one basis."""
        facts = [self._fact(value) for value in values]
        known = [fact for fact in facts if fact is not None]
        if len(known) < len(facts) or any(f.kind == "square" or f.offset for f in known):
            self._pin("what is in no basis is added")
            return
        node = known[0].node
        for fact in known[1:]:
            node = self.axes.join(node, fact.node)
        self._result(Fact(node, "zero" if all(f.kind == "zero" for f in known) else "plain"))

    def _multiply(self, a: Any, b: Any) -> None:
        divides = self.op in (aten.div, aten.div_)
        if self._is_number(b) or (self._is_number(a) and not divides):
            fact = self._fact(a if self._is_number(b) else b)
            if fact is None or fact.kind == "vector":
                self._pin("a parameter is computed with")
            else:
                self._result(fact)
            return
        x, y = self._fact(a), self._fact(b)
        if a is b and x is not None and x.kind == "plain" and not divides:
            self._square(a)
        elif x is not None and y is not None and {x.kind, y.kind} == {"plain", "vector"} and not divides:
            value, vector = (x, y) if y.kind == "vector" else (y, x)
            self._gain(value, vector, None)
        else:
            self._pin("values are multiplied channel by channel")

    def _gain(self, value: Fact, vector: Fact, bias: str | None) -> None:
        result = self.axes.new()
        self.axes.gains.append(Gain(value.node, result, vector.parameter, vector.offset, bias, self.known.where))
        self._result(Fact(result))

    def _square(self, value: torch.Tensor) -> None:
        fact = self._fact(value)
        if fact is None or fact.kind != "plain":
            self._pin("values are squared")
        else:
            self._result(replace(fact, kind="square"))

    def _sum(self) -> None:
        value = self.args[0]
        fact, dims = self._fact(value), self._dims(value.ndim)
        if fact is None or fact.kind == "vector":
            self._pin("a parameter is computed with")
        elif value.ndim - 1 not in dims:
            self._result(fact) if self.op in _SUMS else self._pin("channels are compared")
        elif dims != {value.ndim - 1}:
            self._pin("channels and tokens are summed up")
        elif self.op is aten.linalg_vector_norm:
            self._result(None) if self._argument("ord") == 2 and fact.kind == "plain" else self._pin("channels are summed up")
        else:
            if fact.kind != "square":
                self.axes.centre(fact.node, self.known.where)
            elif self.op in _SPREADS:
                self._pin("squares are computed with")
            self._result(None)

    def _norm(self) -> None:
        value, shape, weight = self.args[:3]
        bias = self.args[3] if self.op is aten.native_layer_norm else None
        fact = self._fact(value)
        if fact is None or fact.kind != "plain" or len(shape) != 1:
            self._pin("channels are normed in another way")
            return
        if self.op is aten.native_layer_norm:
            self.axes.centre(fact.node, self.known.where)
        gain, shift = self._fact(weight), self._fact(bias)
        if weight is None and bias is None:
            self._result(fact)
        elif gain is not None and gain.kind == "vector" and (bias is None or (shift is not None and shift.offset == 0)):
            self._gain(fact, gain, None if shift is None else shift.parameter)
        else:
            self._pin("its norm has no gain of its own")

    def _put(self) -> None:
        target = self.args[0]
        last = target.ndim - 1
        if self.op is aten.copy_:
            source, fine = self.args[1], True
        elif self.op in (aten.index_put, aten.index_put_):
            source, fine = self.args[2], len(self.args[1]) < target.ndim
        else:
            source, fine = self.args[3], self.args[1] % target.ndim != last
            if self.op in (aten.scatter_add, aten.scatter_add_):
                fine = fine and self.args[2].stride(-1) == 0
        if fine and isinstance(source, torch.Tensor) and source.ndim and source.shape[-1] == target.shape[-1]:
            self._together((target, source))
            if self._fact(target) is not None and self._fact(source) is not None:
                self.known.know(target, replace(self._fact(target) or Fact(0), kind="plain"))
        else:
            self._pin("channels are written one by one")

    def _mask(self) -> None:
        values = [v for v in ((self.args[1], self.args[2]) if self.op is aten.where else (self.args[0],))]
        mask = self.args[0] if self.op is aten.where else self.args[1]
        filled = self.args[2] if self.op is not aten.where else 0
        zeros = [v for v in values if not isinstance(v, torch.Tensor) or (v.numel() == 1 and not bool(v))]
        rest = [v for v in values if not any(v is z for z in zeros)]
        number = float(filled) if isinstance(filled, (int, float)) or filled.numel() == 1 else 1.0
        if number == 0 and self._is_number(mask) and all(not isinstance(z, (int, float)) or z == 0 for z in zeros):
            self._together(rest)
        else:
            self._pin("single channels are masked")

    def _product(self) -> None:
        at = _PRODUCTS[self.op]
        left, right = (self.args[i] for i in at)
        summed, written = self.known.axis_of(right, -2), self.known.axis_of(right, -1)
        if left.is_meta or not right.is_meta or summed is None or written is None or summed == written:
            if right.is_meta and not left.is_meta and summed is not None and right.shape[-1] == 1:
                self._read(left, summed)  # one number a token
                self._result(None)
                return
            self._pin("a product in another form")
            return
        self._read(left, summed)
        node = self.axes.of(*written)
        self.axes.written.add(written)
        bias = self._fact(self.args[0]) if at == (1, 2) else None
        if at == (1, 2):
            if bias is None or bias.offset:
                self.axes.pin(node, f"{self.known.where}: what is in no basis is added")
            else:
                node = self.axes.join(node, bias.node)
        self._result(Fact(node))
        if left.numel():  # an expert may have no token
            x = left.reshape(-1, left.shape[-1])[0]
            self.known.heard(
                ProductSeen(summed[0], summed[1], written[1], None if bias is None else bias.parameter, x, self.out)
            )

    def _read(self, value: torch.Tensor, summed: tuple[str, int]) -> None:
        fact = self._fact(value)
        if fact is None:
            self.axes.pin(self.axes.of(*summed), f"{self.known.where}: it reads what is in no basis")
        elif fact.kind in ("plain", "zero"):
            self.axes.join(fact.node, self.axes.of(*summed))
        else:
            self.axes.pin(fact.node, f"{self.known.where}: a product of squares")
