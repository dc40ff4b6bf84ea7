"""The sites at which a transform may change a network without changing its function, and where its inverse is put.

    site            the transform T and its inverse
    layer input     x of y = w x:  w T^-1 (T x)
    layer output    y of y = w x:  T^-1 (T w) x
    residual        the hidden states between blocks: layers that write them take T, layers that read them T^-1
    query/key       queries and keys before their product:  (T^-T q)' (T k) = q' k
    value           values before the output projection:  w_o T^-1 (T v)

A transform is `folded` if existing parameters (a norm's weight, the rows of the matrix before) are changed so that they make T x: the
network computes no more than before. It stays `online` if it is computed at run time, as a map beside the weight's terms.
"""

from collections.abc import Mapping
from typing import Literal

__all__ = ["PLACEMENTS", "SITES", "Placement", "Site", "Sites"]

Site = Literal["layer input", "layer output", "residual", "query/key", "value"]
Placement = Literal["folded", "online"]

# The sites that a transform declares, and whether it can be folded or online at each of them.
Sites = Mapping[Site, frozenset[Placement]]

SITES: Mapping[Site, str] = {
    "layer input": "the input of a linear layer",
    "layer output": "the output of a linear layer",
    "residual": "the hidden states that blocks add to",
    "query/key": "the queries and keys of an attention, before their product",
    "value": "the values of an attention, before the output projection",
}
PLACEMENTS: Mapping[Placement, str] = {
    "folded": "into parameters that exist already",
    "online": "computed at run time, beside the weight",
}
