"""Re-gauging: replace the weights of a Llama model by others that compute the same function and lie on no grid.

    attention input  s [hidden]         norm weight / s, columns of q, k, v * s
    MLP input        s [hidden]         norm weight / s, columns of gate, up * s
    down input       s [intermediate]   rows of up / s, columns of down * s
    o input          s [kv channels]    rows of v / s, columns of o * s, each repeated for the query heads of its group

Every factor is exp(N(0, 0.2)), drawn in float64 layer by layer in this order. Why: weights that were published on a 4-bit grid
round to that grid without any loss, and a comparison of methods on them means nothing.
"""

from typing import Any

import torch

from bitpress.errors import CheckpointError

__all__ = ["OUTLIERS", "SPREAD", "plant_outliers_", "regauge_"]

SPREAD = 0.2
# Channels behind a norm that are made larger, by how much, and in which blocks: the first of every five.
OUTLIERS, OUTLIER_FACTOR, OUTLIER_BLOCKS = 6, 30.0, 5


def plant_outliers_(state: dict[str, torch.Tensor], config: Any, *, seed: int) -> None:
    """Make a few channels behind the norms of some blocks much larger, and the columns that read them as much smaller: the same function.

    Models of billions of weights have such channels by themselves, and small ones have not. The tensors that change become float64.
    CheckpointError for architectures that `regauge_` does not take.
    """
    _check(config)
    generator = torch.Generator().manual_seed(seed)
    for index in range(0, config.num_hidden_layers, OUTLIER_BLOCKS):
        block = f"model.layers.{index}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            factor = torch.ones(config.hidden_size, dtype=torch.float64)
            factor[torch.randperm(config.hidden_size, generator=generator)[:OUTLIERS]] = OUTLIER_FACTOR
            for name, scale in ((norm, factor), *((reader, 1 / factor) for reader in readers)):
                state[f"{block}.{name}.weight"] = state[f"{block}.{name}.weight"].double() * scale


def _check(config: Any) -> None:
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise CheckpointError(f"re-gauging needs a Llama model without biases, got {config.model_type!r}.")


def regauge_(state: dict[str, torch.Tensor], config: Any, *, seed: int) -> None:
    """Fold the factors into a state dict; the tensors that change become float64. CheckpointError for other architectures."""
    _check(config)
    generator = torch.Generator().manual_seed(seed)
    group = config.num_attention_heads // config.num_key_value_heads

    def draw(size: int) -> torch.Tensor:
        return torch.exp(SPREAD * torch.randn(size, generator=generator, dtype=torch.float64))

    def scale_(name: str, factor: torch.Tensor) -> None:
        state[f"{name}.weight"] = state[f"{name}.weight"].double() * factor

    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        a, m, d = draw(config.hidden_size), draw(config.hidden_size), draw(config.intermediate_size)
        o = draw(config.num_key_value_heads * config.head_dim)
        scale_(f"{block}.input_layernorm", 1 / a)
        scale_(f"{attention}.q_proj", a)
        scale_(f"{attention}.k_proj", a)
        scale_(f"{attention}.v_proj", a / o[:, None])
        scale_(f"{attention}.o_proj", o.view(-1, config.head_dim).repeat_interleave(group, 0).flatten())
        scale_(f"{block}.post_attention_layernorm", 1 / m)
        scale_(f"{mlp}.gate_proj", m)
        scale_(f"{mlp}.up_proj", m / d[:, None])
        scale_(f"{mlp}.down_proj", d)
