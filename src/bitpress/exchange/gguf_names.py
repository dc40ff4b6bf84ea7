"""Names of llama.cpp's tensors for every architecture that goes in or out, and what differs between the two sides.

{}   the number of the block; {e} the number of the expert, where llama.cpp stores all experts of a block in one tensor
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Integer as Int

__all__ = ["ARCHITECTURES", "Architecture", "GgufName", "order_from_pairs", "order_to_pairs"]

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
}
_HEAD_NORMS = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_NORMS = {
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
}
_MLP = {
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_EXPERTS = {
    "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.mlp.experts.{e}.gate_proj",
    "blk.{}.ffn_up_exps": "model.layers.{}.mlp.experts.{e}.up_proj",
    "blk.{}.ffn_down_exps": "model.layers.{}.mlp.experts.{e}.down_proj",
}
_SHARED_EXPERT = {
    "blk.{}.ffn_gate_inp_shexp": "model.layers.{}.mlp.shared_expert_gate",
    "blk.{}.ffn_gate_shexp": "model.layers.{}.mlp.shared_expert.gate_proj",
    "blk.{}.ffn_up_shexp": "model.layers.{}.mlp.shared_expert.up_proj",
    "blk.{}.ffn_down_shexp": "model.layers.{}.mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "blk.{}.ffn_gate_inp": "model.layers.{}.block_sparse_moe.gate",
    "blk.{}.ffn_gate_exps": "model.layers.{}.block_sparse_moe.experts.{e}.w1",
    "blk.{}.ffn_up_exps": "model.layers.{}.block_sparse_moe.experts.{e}.w3",
    "blk.{}.ffn_down_exps": "model.layers.{}.block_sparse_moe.experts.{e}.w2",
}
_AROUND = {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}


@dataclass(frozen=True)
class GgufName:
    """Where a parameter stands: the tensor and, if experts are stacked in it, which of them."""

    tensor: str
    expert: int | None = None


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    models   transformers' names of the models that it runs
    names    its names of tensors and transformers', both without `.weight` and `.bias`
    paired   rows of queries and keys stand in pairs, as rotations take them there: 0, d/2, 1, d/2 + 1, ... of every head
    shifted  norms hold their gain plus 1
    """

    models: tuple[str, ...]
    names: Mapping[str, str]
    paired: bool = False
    shifted: bool = False
    _patterns: list[tuple[re.Pattern[str], str]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for ours, theirs in ((b, a) for a, b in self.names.items()):
            pattern = re.escape(ours).replace(r"\{\}", "(?P<block>[0-9]+)").replace(r"\{e\}", "(?P<expert>[0-9]+)")
            self._patterns.append((re.compile(pattern), theirs))

    def theirs(self, parameter: str) -> GgufName | None:
        """Return where a parameter of transformers stands; None if llama.cpp has no such tensor."""
        stem, _, leaf = parameter.rpartition(".")
        for pattern, tensor in self._patterns:
            found = pattern.fullmatch(stem)
            if found is not None and leaf in ("weight", "bias"):
                groups = found.groupdict()
                expert = groups.get("expert")
                return GgufName(f"{tensor.format(groups.get('block'))}.{leaf}", None if expert is None else int(expert))
        return None

    def ours(self, tensor: str) -> str | None:
        """Return the parameter, with `{e}` for the expert, of a tensor; None for a tensor that does not."""
        stem, _, leaf = tensor.rpartition(".")
        block = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", stem)
        general = stem if block is None else f"blk.{{}}.{block[2]}"
        if general not in self.names or leaf not in ("weight", "bias"):
            return None
        name = self.names[general] if block is None else self.names[general].replace("{}", block[1])
        return f"{name}.{leaf}"

    def moves_rows(self, tensor: str) -> bool:
        """Whether the rows of a tensor stand in pairs."""
        return self.paired and bool(re.fullmatch(r"blk\.[0-9]+\.attn_[qk]\.(weight|bias)", tensor))

    def routes(self, tensor: str) -> bool:
        """Whether a tensor chooses experts, which llama.cpp's own files hold in float32."""
        return tensor.split(".")[-2] in ("ffn_gate_inp", "ffn_gate_inp_shexp")

    def shifts(self, tensor: str) -> bool:
        return self.shifted and tensor.endswith("_norm.weight")


def order_from_pairs(rows: int, heads: int) -> Int[torch.Tensor, " rows"]:
    """Return which row of llama.cpp's is each row of transformers'."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def order_to_pairs(rows: int, heads: int) -> Int[torch.Tensor, " rows"]:
    """Return which row of transformers' is each row of llama.cpp's."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


_LLAMA = {**_OUTER, **_ATTENTION, **_NORMS, **_MLP}
_GEMMA_NORMS = {
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    **_AROUND,
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama", "mistral", "mixtral"), {**_LLAMA, **_MIXTRAL}, paired=True),
    "smollm3": Architecture(("smollm3",), _LLAMA, paired=True),
    "qwen2": Architecture(("qwen2",), _LLAMA),
    "qwen3": Architecture(("qwen3",), {**_LLAMA, **_HEAD_NORMS}),
    "qwen2moe": Architecture(("qwen2_moe",), {**_LLAMA, **_EXPERTS, **_SHARED_EXPERT}),
    "qwen3moe": Architecture(("qwen3_moe",), {**_LLAMA, **_HEAD_NORMS, **_EXPERTS}),
    "olmoe": Architecture(("olmoe",), {**_LLAMA, **_HEAD_NORMS, **_EXPERTS}),
    "gemma3": Architecture(("gemma3_text",), {**_OUTER, **_ATTENTION, **_HEAD_NORMS, **_GEMMA_NORMS, **_MLP}, shifted=True),
    "phi3": Architecture(
        ("phi3",),
        {
            **_OUTER,
            **_NORMS,
            "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
            "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
            "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
            "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        },
    ),
    "olmo2": Architecture(("olmo2",), {**_OUTER, **_ATTENTION, **_HEAD_NORMS, **_AROUND, **_MLP}),
}
