"""Every setting of every family that the native engine runs, changed once: its logits are transformers', or it refuses in one line.

The settings are those of the configuration classes of the installed transformers, so a later one adds its own here.
"""

import copy
import dataclasses
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitpress import native
from bitpress.errors import CheckpointError
from bitpress.models.skeleton import build_config
from bitpress.runtime.native import architectures as families
from bitpress.runtime.native.architectures import ARCHITECTURES, refusal
from bitpress.runtime.native.architectures.llama import FOLLOWED, LLAMA_FAMILY, LOOKED_FOR, NEUTRAL
from bitpress.runtime.native.assemble import assemble
from bitpress.runtime.native.engine import make_engine
from bitpress.runtime.native.options import EngineOptions

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

SLIDING, FULL = "sliding_attention", "full_attention"
CONTEXT = 48
# Keys and values are kept in half precision; a setting that is read another way changes logits by a tenth of the largest and more.
TOLERANCE = 0.01

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
GEMMA_ROPE = {FULL: {"rope_type": "default", "rope_theta": 500.0}, SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
# Of families whose settings have to differ.
BASES: dict[str, dict[str, Any]] = {
    "mistral": BASE | {"sliding_window": None},
    "qwen3": BASE | {"head_dim": 16},
    "gemma3_text": BASE | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "sliding_window_pattern": 2},
}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


# Values for settings of a known meaning; every other setting of the class gets a value of its type.
VALUES: dict[str, list[Any]] = {
    "vocab_size": [80],
    "hidden_size": [128],
    "intermediate_size": [160],
    "num_hidden_layers": [3],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [1, 4, None],
    "head_dim": [32, None, 16.0, 24, 0],
    "hidden_act": ["gelu_pytorch_tanh", "swish", "relu", "gelu", "nonsense"],
    "hidden_activation": ["silu", "gelu", "relu"],
    "max_position_embeddings": [64],
    "rms_norm_eps": [0.5, 1],
    "tie_word_embeddings": [True, None],
    "dtype": ["bfloat16", None],
    "sliding_window": [8, 1, 0, -3, None, 8.0, 4096],
    "use_sliding_window": [True, None],
    "max_window_layers": [1],
    "layer_types": [[SLIDING, FULL], [FULL] * 2, [SLIDING] * 2, [FULL] * 3, ["chunked_attention"] * 2, ["attention", FULL]],
    "no_rope_layers": [[0, 1], [0, 1, 0, 0], [1], [True, False]],
    "no_rope_layer_interval": [2, 0],
    "query_pre_attn_scalar": [64, 0, -4, 16.0],
    "final_logit_softcapping": [2.0, 0.0],
    "attn_logit_softcapping": [2.0],
    "use_bidirectional_attention": [True, None],
    "rope_parameters": [{}, None],
    "id2label": [{0: "a", 1: "b", 2: "c"}],
    "label2id": [{"a": 0}],
    "architectures": [["AnotherForCausalLM"]],
}
# Several settings at once, and names that the class does not have or had in the past.
TOGETHER: list[dict[str, Any]] = [
    rope("default", rope_theta=20.0),
    rope("default", partial_rotary_factor=0.5),
    {"partial_rotary_factor": 0.5},
    {"rope_theta": 20.0},
    {"rope_theta": 20, "rope_scaling": None},
    {"rope_theta": None},
    {"rope_theta": "20"},
    rope("default", rope_theta=0.0),
    rope("default", rope_theta=-5.0),
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 4, "rope_theta": 30}},
    rope("linear", factor=4.0),
    rope("linear", factor=4.0, partial_rotary_factor=0.5),
    rope("linear"),
    rope("linear", factor="4"),
    rope("linear", factor=0.0),
    rope("dynamic", factor=4.0),
    rope("dynamic", factor=4.0, original_max_position_embeddings=8),
    rope("yarn", factor=4.0, original_max_position_embeddings=12),
    rope(
        "yarn", factor=4.0, original_max_position_embeddings=12, attention_factor=0.5, beta_fast=8, beta_slow=2, truncate=False
    ),
    rope("yarn", factor=4.0, original_max_position_embeddings=12, mscale=0.7, mscale_all_dim=1.4),
    rope("yarn", factor=4.0, original_max_position_embeddings=12, partial_rotary_factor=0.5),
    rope("yarn", factor=4.0) | {"original_max_position_embeddings": 12},
    rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    rope("longrope", factor=4.0, long_factor=[2.0] * 8, short_factor=[1.5] * 8, original_max_position_embeddings=12),
    rope("longrope", factor=1.0, long_factor=[2.0] * 8, short_factor=[1.5] * 8, original_max_position_embeddings=CONTEXT),
    rope("proportional", partial_rotary_factor=0.5),
    rope("proportional", partial_rotary_factor=0.5, factor=2.0),
    rope("mrope", mrope_section=[2, 2, 4]),
    rope("axial"),
    rope("nonsense"),
    {"rope_parameters": {"rope_theta": 30.0}},
    {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 30.0}},
    {"rope_parameters": {kind: {"rope_type": "linear", "factor": 4.0, "rope_theta": 30.0} for kind in (SLIDING, FULL)}},
    {"rope_parameters": {SLIDING: {"rope_type": "default"}, FULL: {"rope_type": "yarn", "factor": 4.0}}},
    {"rope_parameters": {FULL: {"rope_type": "proportional", "rope_theta": 30.0, "partial_rotary_factor": 0.5}, SLIDING: None}},
    {"rope_parameters": GEMMA_ROPE},
    {"rope_local_base_freq": 20.0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL, SLIDING]},
    {"use_sliding_window": False, "sliding_window": 8, "layer_types": [FULL, SLIDING]},
    {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0]},
    {"sliding_window": 8, "layer_types": [FULL, SLIDING]},
    {"sliding_window": 8, "layer_types": [FULL] * 2},
    {"sliding_window_pattern": 3},
    {"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"},
    {"hidden_act": "silu", "hidden_activation": "relu"},
    {"query_pre_attn_scalar": 64},
    {"head_dim": 32},
    {"is_causal": False},
    {"is_causal": None},
    {"attention_chunk_size": 8},
    {"layer_types": [SLIDING] * 2},
    {"sliding_window": 8},
    {"kv_sharing_modes": ["reuse"] * 2},
    {"per_layer_config": {"1": {"hidden_act": "relu"}}},
    {"per_layer_config": {"1": {"intermediate_size": 64}}},
    {"attribute_map": {"rms_norm_eps": "initializer_range"}},
    {"text_config": {"hidden_size": 16}},
    {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0},
    {"torch_dtype": "bfloat16"},
    {"attn_implementation": "eager"},
    {"a_name_of_nobody": {"rope_theta": 3.0}},
]


def base(family: str) -> dict[str, Any]:
    """Return the settings of a family's small model."""
    return copy.deepcopy(BASES.get(family, BASE))


@cache
def usual(family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return transformers' logits of the unchanged model, and its weights."""
    config = build_config({"model_type": family, **base(family)})
    model = filled(config)
    return logits(model, config), model.state_dict()


def filled(config: Any, like: dict[str, torch.Tensor] | None = None) -> Any:
    """Build a model of transformers with random weights that half precision holds; those that fit are another model's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            same = None if like is None else like.get(name)
            if same is not None and same.shape == parameter.shape:
                parameter.data.copy_(same)
            elif parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
            parameter.data.copy_(parameter.data.bfloat16())
    return model.eval()


def ids(config: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(2, 60, (min(CONTEXT, config.max_position_embeddings),), generator=generator)


@torch.no_grad()
def logits(model: Any, config: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids(config)[None], use_cache=False, return_dict=True).logits[0]
    return result


def engine_logits(model: Any, config: Any) -> torch.Tensor:
    """Run the same weights in the engine, with nothing rounded but the cache."""
    plain = {
        name: value for name, value in model.state_dict().items() if not (config.tie_word_embeddings and "lm_head" in name)
    }
    compressed = SimpleNamespace(
        plain=plain,
        tensors={name: (value,) for name, value in plain.items()},
        manifest=SimpleNamespace(weights={}, prompt_cost=None),
        root=".",
    )
    parts = assemble(compressed, config, "keep", lambda text: None)  # type: ignore[arg-type]
    made = make_engine(parts, EngineOptions(activations="none", threads=1))
    return made.forward(ids(config).tolist(), "all")


@cache
def defaults(family: str) -> dict[str, Any]:
    """Return the settings of a family's class with their default values."""
    made: dict[str, Any] = {}
    for field in dataclasses.fields(CONFIG_MAPPING[family]):
        has_factory = field.default_factory is not dataclasses.MISSING
        made[field.name] = field.default_factory() if has_factory else field.default
    return made


def other_values(name: str, usual_value: Any) -> list[Any]:
    """Return values for a setting: those of the table, or some of the type that its default has."""
    if name in VALUES:
        return VALUES[name]
    if isinstance(usual_value, bool):
        return [not usual_value, None]
    if isinstance(usual_value, (int, float)):
        return [usual_value + 1, usual_value * 2 + 0.25, None]
    if isinstance(usual_value, str):
        return ["another", None]
    return [True, 3, 0.5, "another", [1, 2, 3, 4], {"a": 1}]


VERDICTS = ("no configuration", "refused", "not run", "equal, changed", "equal, the same")


def judge(family: str, change: dict[str, Any]) -> str:
    """Say what becomes of a model with one change: one of VERDICTS ("not run": by transformers), or what is wrong."""
    try:
        config = build_config({"model_type": family, **base(family), **copy.deepcopy(change)})
    except CheckpointError:
        return "no configuration"
    reason = refusal(config)
    if reason is not None:
        return "refused" if len(reason.splitlines()) == 1 and len(reason) < 200 else f"a long refusal: {reason}"
    before, weights = usual(family)
    try:
        model = filled(config, weights)
        want = logits(model, config)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return "not run"
    made = engine_logits(model, config)
    if not bool((made - want).abs().max() <= TOLERANCE * want.abs().max()):
        return "different"
    moved = want.shape != before.shape or (want - before).abs().max() > 10 * TOLERANCE * before.abs().max()
    return "equal, changed" if moved else "equal, the same"


@pytest.fixture(autouse=True)
def _weights_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitpress.runtime.native.assemble.read_tensor", lambda value: value)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_setting_that_is_changed_is_followed_or_refused(family: str) -> None:
    own = [(name, value) for name, default in defaults(family).items() for value in other_values(name, default)]
    # One layer is enough to see that a setting does nothing.
    neutral = [{name: value, "num_hidden_layers": 1} for name, value in own if name in NEUTRAL]
    changes = [*({name: value} for name, value in own if name not in NEUTRAL), *TOGETHER]
    found = {repr(change): judge(family, change) for change in changes}
    wrong = {**found, **{repr(change): judge(family, change) for change in neutral}}
    assert not {change: verdict for change, verdict in wrong.items() if verdict not in VERDICTS}
    assert sum(verdict == "equal, changed" for verdict in found.values()) >= 25, "settings that matter are what is compared"


@pytest.mark.parametrize("family", LLAMA_FAMILY)
def test_every_setting_of_the_installed_class_has_an_answer(family: str) -> None:
    """At the locked version none is left to the default answer but those that are refused on purpose."""
    refused = {"is_encoder_decoder", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"}
    assert defaults(family).keys() >= LLAMA_FAMILY[family].own - {"head_dim"}
    unanswered = sorted(defaults(family).keys() - FOLLOWED - LLAMA_FAMILY[family].own - NEUTRAL - refused)
    assert not unanswered, f"llama.py has to say of each whether {family} follows it (own) or it changes no logits (NEUTRAL)"


@pytest.mark.parametrize("family", LLAMA_FAMILY)
def test_names_that_shared_code_looks_for_have_an_answer(family: str) -> None:
    """A name that the class does not have can matter only where transformers looks for it while a model is built and run."""
    about_other_things = {
        *("base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan", "sub_configs"),
        *("quantization_config", "gradient_checkpointing", "name_or_path", "output_attentions", "return_dict_in_generate"),
        *("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"),
        *("is_heterogeneous", "per_layer_config", "per_layer_attributes", "head_dim"),
    }
    config = build_config({"model_type": family, **base(family)})
    given = type(config)
    seen: set[str] = set()

    class Observed(given):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            seen.add(name)
            return super().__getattribute__(name)

    config.__class__ = Observed
    model = AutoModelForCausalLM._model_mapping[given](config).eval()
    model(input_ids=ids(config)[None, :8], use_cache=True)
    assert "num_hidden_layers" in seen
    looked_for = {name for name in seen if not name.startswith("_") and not callable(getattr(given, name, None))}
    unanswered = looked_for - defaults(family).keys() - LOOKED_FOR.keys() - about_other_things
    generation = {
        name for name in unanswered if hasattr(GenerationConfig(), name)
    }  # taken out of a configuration when it is read
    assert not unanswered - generation


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_of_other_architectures_are_left_out_as_transformers_leaves_them_out(family: str) -> None:
    others: dict[str, Any] = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for name, default in defaults(model_type).items() if model_type in CONFIG_MAPPING else ():
            if isinstance(default, (bool, int, float, str)) and not name.endswith("_config"):
                others.setdefault(name, not default if isinstance(default, bool) else default)
    for name in (*defaults(family), *LOOKED_FOR, "head_dim", "sliding_window_pattern", "rope_theta", "partial_rotary_factor"):
        others.pop(name, None)
    assert len(others) > 100
    assert judge(family, others) == "equal, the same"


def test_a_setting_that_is_read_another_way_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge("llama", {}) == "equal, the same"
    describe = families.describe
    for mistake in ({"attention_scale": 0.3}, {"window": (8,) * 2}, {"rope": (-1,) * 2}, {"eps": 0.05}):
        monkeypatch.setattr(
            "bitpress.runtime.native.assemble.describe", lambda c, m=mistake: dataclasses.replace(describe(c), **m)
        )
        assert judge("llama", {}) == "different"
