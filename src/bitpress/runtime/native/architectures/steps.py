"""Steps: the operations of a layer of the native decoder, in their order.

A layer works on the residual stream and on named values. An *input* is rows that products read (a norm, attention or a gated product
makes one); an *output* is rows that products made. Every value is made once in a layer; an input is read by any number of products, an
output by one step. Linear layers and norms have their names in the checkpoint, without the name of their layer.

    Norm("input_layernorm", to="x")                                      x = norm(stream)
    Multiply("x", {"q": "self_attn.q_proj", "k": ..., "v": ...})         q = x @ q_proj.T + bias, and so on
    Attend("q", "k", "v", to="attended", rope=0, window=0)               rotate, join the cache, attend
    Gate("x", "mlp.gate_proj", "mlp.up_proj", to="acted")                acted = act(x @ gate_proj.T) * (x @ up_proj.T)
    Add("o", norm=None)                                                  stream += o, or its norm
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Add", "Attend", "Gate", "Multiply", "NativeStep", "Norm", "Step", "make_step", "map_linears"]

# A step with its weights, as the native model takes it; linear layers are objects of the native library.
NativeStep = dict[str, Any]


@dataclass(frozen=True)
class Norm:
    weight: str
    to: str


@dataclass(frozen=True)
class Multiply:
    of: str
    linears: Mapping[str, str]


@dataclass(frozen=True)
class Attend:
    """Causal attention. `rope` is the index of a rotation, or -1; `window` is the number of last positions that a token attends to, or 0 for all."""

    queries: str
    keys: str
    values: str
    to: str
    rope: int = 0
    window: int = 0
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True)
class Gate:
    of: str
    gate: str
    up: str
    to: str


@dataclass(frozen=True)
class Add:
    of: str
    norm: str | None = None


Step = Norm | Multiply | Attend | Gate | Add


def make_step(step: Step, linear: Callable[[str], Any], norm: Callable[[str], np.ndarray]) -> NativeStep:
    """Read the weights of a step by their names."""

    def optional(name: str | None) -> np.ndarray | None:
        return None if name is None else norm(name)

    if isinstance(step, Norm):
        return {"step": "norm", "weight": norm(step.weight), "to": step.to}
    if isinstance(step, Multiply):
        return {"step": "multiply", "of": step.of, "linears": {name: linear(stem) for name, stem in step.linears.items()}}
    if isinstance(step, Attend):
        values = {"queries": step.queries, "keys": step.keys, "values": step.values, "to": step.to}
        norms = {"q_norm": optional(step.q_norm), "k_norm": optional(step.k_norm)}
        return {"step": "attend", **values, **norms, "rope": step.rope, "window": step.window}
    if isinstance(step, Gate):
        return {"step": "gate", "of": step.of, "gate": linear(step.gate), "up": linear(step.up), "to": step.to}
    return {"step": "add", "of": step.of, "norm": optional(step.norm)}


def map_linears(step: Mapping[str, Any], change: Callable[[Any], Any]) -> NativeStep:
    """Return a native step with every linear layer changed: stored as arrays, or restored from them."""
    changed = dict(step)
    if "linears" in changed:
        changed["linears"] = {name: change(linear) for name, linear in changed["linears"].items()}
    if step["step"] == "gate":
        changed |= {name: change(step[name]) for name in ("gate", "up")}
    return changed
