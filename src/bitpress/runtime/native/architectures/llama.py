"""Llama's family: one block with variations, read from transformers' own configuration object.

The table below lists the model types and how each differs from Llama; `describe` reads everything else (head size, norms of queries
and keys, biases, windows, rotations). Settings that the decoder does not support are refused by name; the model then runs in transformers.

Every setting is classified: `describe` follows it, or it changes no logits, or `refusal` names it unless it has its class's default. So a
setting that a later transformers adds is never ignored in silence. A name that the class does not have is ignored, as in transformers,
except for the few that transformers' shared code looks for in every configuration (`LOOKED_FOR`).
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import numpy as np

from bitpress.runtime.native.architectures.layout import Layout, Names, Rotation
from bitpress.runtime.native.architectures.steps import Add, Attend, Gate, Multiply, Norm, Step

__all__ = ["FOLLOWED", "LLAMA_FAMILY", "LOOKED_FOR", "NEUTRAL", "Llama"]

ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}
# Rotary embeddings whose frequencies do not depend on the length of the text, up to the model's own limit.
ROTATIONS = ("default", "linear", "dynamic", "llama3", "yarn", "proportional")
FULL, SLIDING = "full_attention", "sliding_attention"

# Settings of every type that `describe` reads, or that the configuration class turns into those.
FOLLOWED = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "dtype",
    }
)
# Settings that change no logits: of training, of files, of returned values.
NEUTRAL = frozenset(
    {
        "initializer_range",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "attention_dropout",
        "pretraining_tp",
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
    }
)
# Names that transformers' shared code looks for in a configuration of any class, and the value that changes nothing.
LOOKED_FOR: dict[str, Any] = {
    "attention_chunk_size": None,
    "attribute_map": None,
    "decoder": None,
    "generator": None,
    "is_causal": True,
    "kv_sharing_modes": None,
    "layer_types": None,
    "sliding_window": None,
    "text_config": None,
}


@dataclass(frozen=True)
class Llama:
    """How one model type differs from Llama.

    own              settings that this type has in addition to `FOLLOWED`; biases are found in the weights themselves
    one_plus         norms multiply by 1 + weight
    out_norms        norms after attention and MLP as well as before them
    head_norms       norms of every query and key head
    scaled           embeddings are multiplied by sqrt(hidden size)
    activation       the setting that names the activation
    windows          which layers have the window: none, all, or those of the kind sliding_attention
    ropes            every kind of layer has a rotation of its own
    partly_rotated   no_rope_layers says which layers are rotated
    query_scalar     scores are scaled by query_pre_attn_scalar in place of the head size
    """

    own: frozenset[str]
    one_plus: bool = False
    out_norms: bool = False
    head_norms: bool = False
    scaled: bool = False
    activation: str = "hidden_act"
    windows: Literal["none", "all", "by kind"] = "none"
    ropes: bool = False
    partly_rotated: bool = False
    query_scalar: bool = False

    def names(self) -> Names:
        return Names()

    def norm_offset(self) -> float:
        return 1.0 if self.one_plus else 0.0

    def layer(self, layout: Layout, index: int) -> list[Step]:
        behind = "post_attention_layernorm"
        return [
            Norm("input_layernorm", to="to attention"),
            Multiply("to attention", {part: f"self_attn.{part}_proj" for part in ("q", "k", "v")}),
            Attend(
                "q",
                "k",
                "v",
                to="attended",
                rope=layout.rope[index],
                window=layout.window[index],
                q_norm="self_attn.q_norm" if self.head_norms else None,
                k_norm="self_attn.k_norm" if self.head_norms else None,
            ),
            Multiply("attended", {"o": "self_attn.o_proj"}),
            Add("o", norm=behind if self.out_norms else None),
            Norm("pre_feedforward_layernorm" if self.out_norms else behind, to="to mlp"),
            Gate("to mlp", "mlp.gate_proj", "mlp.up_proj", to="acted"),
            Multiply("acted", {"down": "mlp.down_proj"}),
            Add("down", norm="post_feedforward_layernorm" if self.out_norms else None),
        ]

    def refusal(self, config: Any) -> str | None:
        if getattr(config, "is_heterogeneous", False):
            return "layers with settings of their own (per_layer_config)"
        if (reason := _unanswered(config, self.own)) is not None:
            return reason
        act = getattr(config, self.activation)
        if act not in ACTIVATIONS:
            return f"activation {act!r} is not among {', '.join(ACTIVATIONS)}"
        head = _head(config)
        if not isinstance(head, int) or head % 16 or not 0 < head <= 512:
            return f"heads of {head} elements; a multiple of 16 up to 512 is needed"
        if self.query_scalar and not config.query_pre_attn_scalar > 0:
            return f"query_pre_attn_scalar is {config.query_pre_attn_scalar!r}"
        return _refused_layers(config, self) or _refused_rotations(config, self)

    def describe(self, config: Any) -> Layout:
        import torch

        head = _head(config)
        layers = int(config.num_hidden_layers)
        kinds = _kinds(config, self)
        names = list(_rope_parameters(config, self))
        by_layer = [names.index(kind) if self.ropes else 0 for kind in kinds]
        if self.partly_rotated:
            by_layer = [index if used else -1 for index, used in zip(by_layer, config.no_rope_layers[:layers], strict=True)]
        scale = config.query_pre_attn_scalar if self.query_scalar else head
        # transformers rounds this factor to the embedding's own type before it multiplies.
        embedding_scale = (
            float(torch.tensor(config.hidden_size**0.5, dtype=config.dtype or torch.float32)) if self.scaled else 1.0
        )
        return Layout(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head=head,
            layers=layers,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            eps=config.rms_norm_eps,
            attention_scale=float(scale) ** -0.5,
            embedding_scale=embedding_scale,
            tanh_gelu=ACTIVATIONS[getattr(config, self.activation)],
            tied=bool(config.tie_word_embeddings),
            rotations=tuple(_rotation(config, self, name) for name in names),
            rope=tuple(by_layer),
            window=tuple(int(config.sliding_window) if kind == SLIDING else 0 for kind in kinds),
        )


def _unanswered(config: Any, own: frozenset[str]) -> str | None:
    """Name a setting that is neither followed nor without effect and differs from its class's default."""
    known = {field.name: field for field in fields(config)}
    for name in sorted(known.keys() - FOLLOWED - own - NEUTRAL):
        field = known[name]
        value = getattr(config, name)
        usual = field.default_factory() if field.default_factory is not MISSING else field.default
        # A switch that is off may be written as an explicit null.
        if value != usual and not (value is None and usual is False):
            return f"{name} is {_short(value)}, which is not followed"
    for name, usual in LOOKED_FOR.items():
        if name not in known and name in vars(config) and vars(config)[name] != usual:
            return f"{name} is {_short(vars(config)[name])}, which is no setting of {config.model_type}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refused_layers(config: Any, family: Llama) -> str | None:
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = _kinds(config, family)
    if len(kinds) != layers:
        return f"layer_types names {len(kinds)} layers of {layers}"
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            return f"layers of the kind {kind!r}"
    if SLIDING in kinds and (window is None or window < 1):
        return f"layers of sliding attention with a sliding_window of {window}"
    if family.partly_rotated and len(config.no_rope_layers) < layers:
        return f"no_rope_layers names {len(config.no_rope_layers)} layers of {layers}"
    return None


def _refused_rotations(config: Any, family: Llama) -> str | None:
    for kind, parameters in _rope_parameters(config, family).items():
        if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
            return "rope_parameters of another form than this architecture has"
        rope_type = parameters.get("rope_type")
        if rope_type not in ROTATIONS:
            return f"rotary embedding {rope_type!r}, which is not among {', '.join(ROTATIONS)}"
        try:
            rotation = _rotation(config, family, kind)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"rope_parameters of type {rope_type!r} that do not give frequencies ({type(error).__name__})"
        if rotation.frequencies.shape != (_head(config) // 2,):
            return f"a rotation of {2 * len(rotation.frequencies)} of the {_head(config)} elements of a head"
        if not (np.isfinite(rotation.frequencies).all() and math.isfinite(rotation.factor)):
            return f"rope_parameters of type {rope_type!r} that give frequencies which are not finite"
    return None


def _head(config: Any) -> Any:
    given = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if given is None else given


def _kinds(config: Any, family: Llama) -> list[str]:
    """Return the kind of attention of every layer."""
    if family.windows == "by kind":
        return list(config.layer_types)
    windowed = family.windows == "all" and config.sliding_window is not None
    return [SLIDING if windowed else FULL] * config.num_hidden_layers


def _rope_parameters(config: Any, family: Llama) -> dict[str, Any]:
    """Return the settings of every rotation by the kind of layer that it serves; a family with a single rotation has the kind "all"."""
    if not family.ropes:
        return {"all": config.rope_parameters}
    return {kind: config.rope_parameters.get(kind) for kind in sorted(set(config.layer_types))}


def _rotation(config: Any, family: Llama, kind: str) -> Rotation:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = _rope_parameters(config, family)[kind]
    rope_type = parameters["rope_type"]
    if rope_type != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](
            config, torch.device("cpu"), layer_type=kind if family.ropes else None
        )
        return Rotation(frequencies.float().numpy(), float(factor))
    # These families rotate whole heads: their own default leaves partial_rotary_factor out.
    exponent = torch.arange(0, _head(config), 2, dtype=torch.int64).float() / _head(config)
    return Rotation((1.0 / (parameters["rope_theta"] ** exponent)).numpy(), 1.0)


_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "layer_types"})

LLAMA_FAMILY: dict[str, Llama] = {
    "llama": Llama(own=frozenset({"hidden_act", "head_dim", "attention_bias", "mlp_bias"})),
    "mistral": Llama(own=frozenset({"hidden_act", "head_dim", "sliding_window"}), windows="all"),
    "qwen2": Llama(own=_WINDOWS | {"hidden_act", "max_window_layers"}, windows="by kind"),
    "qwen3": Llama(
        own=_WINDOWS | {"hidden_act", "head_dim", "attention_bias", "max_window_layers"}, head_norms=True, windows="by kind"
    ),
    "smollm3": Llama(
        own=_WINDOWS | {"hidden_act", "attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
        windows="by kind",
        partly_rotated=True,
    ),
    "gemma3_text": Llama(
        own=frozenset(
            {"hidden_activation", "head_dim", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"}
        ),
        one_plus=True,
        out_norms=True,
        head_norms=True,
        scaled=True,
        activation="hidden_activation",
        windows="by kind",
        ropes=True,
        query_scalar=True,
    ),
}
