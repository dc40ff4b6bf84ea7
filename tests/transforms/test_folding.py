"""Folding: what folds where on every architecture, and that the block's function stays what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from bitpress.calibration.capture import Capture, Observed
from bitpress.errors import NumericsError, UsageError
from bitpress.transforms import Fold, apply_fold_, find_folds

TOKENS = 16
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts_per_tok": 2}
SLIDING = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GROUPED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8, layer_types=SLIDING),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=128,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "mixtral": lambda: transformers.MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[]
    ),
}

# 4 query heads of 8 channels share 2 value heads: heads 0 and 1 read values 0 to 7, heads 2 and 3 read 8 to 15.
GQA = [*range(8), *range(8), *range(8, 16), *range(8, 16)]

Where = tuple[str, str, tuple[int, int], list[int]]


def attention(norm: str, kind: str = "norm") -> dict[str, Where]:
    return {
        "self_attn.q_proj": (norm, kind, (0, 32), list(range(32))),
        "self_attn.o_proj": ("self_attn.v_proj", "rows", (0, 16), GQA),
    }


def gated(norm: str, kind: str = "norm") -> dict[str, Where]:
    return {
        "mlp.gate_proj": (norm, kind, (0, 32), list(range(32))),
        "mlp.down_proj": ("mlp.up_proj", "rows", (0, 64), list(range(64))),
    }


LLAMA = attention("input_layernorm") | gated("post_attention_layernorm")

# first weight of the group -> where its factors go; a group that is not named does not fold
EXPECTED: dict[str, dict[str, Where]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma3": attention("input_layernorm", "norm_plus_one") | gated("pre_feedforward_layernorm", "norm_plus_one"),
    "phi3": {
        "self_attn.qkv_proj": ("input_layernorm", "norm", (0, 32), list(range(32))),
        "self_attn.o_proj": ("self_attn.qkv_proj", "rows", (48, 64), GQA),
        "mlp.gate_up_proj": ("post_attention_layernorm", "norm", (0, 32), list(range(32))),
        "mlp.down_proj": ("mlp.gate_up_proj", "rows", (64, 128), list(range(64))),
    },
    "opt": {
        "self_attn.q_proj": ("self_attn_layer_norm", "norm", (0, 32), list(range(32))),
        "self_attn.out_proj": ("self_attn.v_proj", "rows", (0, 32), list(range(32))),
        "fc1": ("final_layer_norm", "norm", (0, 32), list(range(32))),
        "fc2": ("fc1", "rows", (0, 64), list(range(64))),
    },
    "gpt2": {
        "attn.c_attn": ("ln_1", "norm", (0, 32), list(range(32))),
        "attn.c_proj": ("attn.c_attn", "rows", (64, 96), list(range(32))),
        "mlp.c_fc": ("ln_2", "norm", (0, 32), list(range(32))),
    },
    # Queries, keys and values lie interleaved by head, so the values are no one range of rows; a GELU is before 4h_to_h.
    "gpt_neox": {
        "attention.query_key_value": ("input_layernorm", "norm", (0, 32), list(range(32))),
        "mlp.dense_h_to_4h": ("post_attention_layernorm", "norm", (0, 32), list(range(32))),
    },
    # The norm before the experts is read by the router too.
    "mixtral": attention("input_layernorm"),
    "qwen3_moe": attention("input_layernorm"),
}


class Stop(Exception):
    pass


class Bench:
    """A block with the input that its model gives it, and the groups of weights that share an input."""

    def __init__(self, block: torch.nn.Module, run: Callable[[], torch.Tensor]) -> None:
        self.block, self.run = block, run
        observed = []
        for path, module in block.named_modules():
            for leaf, value in module.named_parameters(recurse=False):
                if leaf == "weight" and isinstance(module, (torch.nn.Linear, Conv1D)):
                    observed.append(Observed(path, value, not isinstance(module, Conv1D)))
                elif value.ndim == 3:
                    observed += [Observed(f"{path}.{leaf}.{e}", view) for e, view in enumerate(value)]
        capture = Capture(observed, {"mean_abs"})
        with capture:
            run()
        by_name = {w.name: w for w in observed}
        self.groups = [[by_name[name] for name in names] for names in capture.groups()]

    def folds(self) -> dict[str, Fold]:
        """Return the folds by the name of the group's first weight."""
        return {self.groups[g][0].name: fold for g, fold in find_folds(self.block, self.run, self.groups).items()}


def build_block(name: str, dtype: torch.dtype = torch.float32) -> Bench:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():  # norms and biases too: fresh ones are all ones and zeros
        parameter.add_(torch.randn_like(parameter), alpha=0.25 if parameter.ndim == 1 else 0.1)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Stop

    handle = blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    with pytest.raises(Stop), torch.no_grad():
        model(input_ids=torch.randint(3, 128, (1, TOKENS)), use_cache=False)
    handle.remove()
    args, kwargs = seen[0]

    @torch.no_grad()
    def run() -> torch.Tensor:
        out = blocks[0](*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return Bench(blocks[0], run)


def compensate_(group: list[Observed], factor: torch.Tensor) -> None:
    for w in group:
        w.view.mul_(factor[None, :] if w.out_first else factor[:, None])


@pytest.mark.parametrize("name", CONFIGS)
def test_finds_where_every_architecture_folds_and_leaves_the_block_untouched(name: str) -> None:
    bench = build_block(name)
    before = {n: (p, p.data_ptr(), p.clone()) for n, p in bench.block.named_parameters()}
    folds = bench.folds()
    found = {first: (f.producer, f.kind, f.rows, f.channel_of.tolist()) for first, f in folds.items()}
    assert found == EXPECTED[name]
    after = dict(bench.block.named_parameters())
    assert after.keys() == before.keys()
    for n, (parameter, address, value) in before.items():
        assert after[n] is parameter
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bench.block.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_with_all_folds_applied_computes_what_it_did(name: str) -> None:
    bench = build_block(name)
    folds = bench.folds()
    output = bench.run()
    for group in bench.groups:
        fold = folds.get(group[0].name)
        if fold is None:
            continue
        s = torch.exp2(4 * torch.rand(fold.channels) - 2)  # 1/4 to 4, no powers of two
        factor = apply_fold_(bench.block, fold, s)
        torch.testing.assert_close(factor, s[fold.channel_of], rtol=1e-5, atol=0)
        uncompensated = (bench.run() - output).abs().max()
        compensate_(group, factor)
        # A fold perturbs an entry of a producer and of a consumer by at most 3 roundings of u = 2^-24 (quotient, factor, product;
        # a norm that adds one to its weight up to 4 more, as its channels here are above 1/4), and the products between them add
        # up n <= 64 terms in another order, n * u. Over at most 4 folds and the 6 products of a block that is
        # (4 * 7 + 6 * 64) * u = 2.5e-5 of sums of magnitudes, which in these blocks are within 4 times the largest output.
        allowed = 1e-4 * output.abs().max()
        assert (bench.run() - output).abs().max() <= allowed
        assert uncompensated > 100 * allowed


def test_few_runs_of_a_block_are_needed() -> None:
    bench = build_block("llama")
    runs = []

    def counted() -> torch.Tensor:
        runs.append(1)
        return bench.run()

    assert len(find_folds(bench.block, counted, bench.groups)) == 4
    # Two as it is, a trial and a check for each of four folds, and two digits of 4 for the 16 value channels.
    assert len(runs) == 2 + 4 * 2 + 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "opt", "gpt2"])
def test_bfloat16_blocks_fold_alike(name: str) -> None:
    folds = build_block(name, torch.bfloat16).folds()
    assert {first: (f.producer, f.kind, f.rows, f.channel_of.tolist()) for first, f in folds.items()} == EXPECTED[name]


@pytest.mark.parametrize("kind", ["norm", "norm_plus_one"])
@pytest.mark.parametrize("stored", [None, torch.bfloat16])
def test_the_factor_is_what_the_norm_really_lost(kind: Any, stored: torch.dtype | None) -> None:
    torch.manual_seed(1)
    block = torch.nn.Sequential(torch.nn.RMSNorm(64)).requires_grad_(False)
    norm = block[0]
    if stored is None:
        block.to(torch.bfloat16)
    norm.weight.copy_(torch.randn(64))
    offset = 0.0 if kind == "norm" else 1.0
    norm.weight[3] = -offset  # a channel that is always zero takes any factor
    old = norm.weight.float() + offset
    s = torch.exp2(4 * torch.rand(64) - 2)
    factor = apply_fold_(block, Fold("0", kind, (0, 64), torch.arange(64)), s, stored)
    new = norm.weight.float() + offset
    assert torch.equal(norm.weight, norm.weight.to(torch.bfloat16).to(norm.weight.dtype))
    assert factor.dtype == torch.float32
    assert factor[3] == s[3]
    # old / new in float32, so a product with it is off by at most two roundings of 2^-24.
    torch.testing.assert_close(new * factor, torch.where(old == 0, new * factor, old), rtol=2**-22, atol=0)
    assert not torch.equal(factor, s)  # bfloat16 cannot hold the quotients


def test_rows_are_divided_with_their_bias_and_only_in_their_range() -> None:
    torch.manual_seed(2)
    block = torch.nn.Sequential(torch.nn.Linear(8, 12)).requires_grad_(False)
    w, b = block[0].weight.clone(), block[0].bias.clone()
    fold = Fold("0", "rows", (8, 12), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    s = torch.tensor([2.0, 0.5, 4.0, 1.0])
    factor = apply_fold_(block, fold, s)
    assert torch.equal(factor, s.repeat_interleave(2))
    assert torch.equal(block[0].weight[:8], w[:8])
    assert torch.equal(block[0].bias[:8], b[:8])
    assert torch.equal(block[0].weight[8:] * s[:, None], w[8:])
    assert torch.equal(block[0].bias[8:] * s, b[8:])
    assert torch.equal(fold.per_channel(factor), s)


def test_low_precision_rows_give_the_factor_that_fits_them_best() -> None:
    torch.manual_seed(3)
    block = torch.nn.Sequential(torch.nn.Linear(64, 16, bias=False)).requires_grad_(False).to(torch.bfloat16)
    old = block[0].weight.double()
    s = torch.exp2(4 * torch.rand(16) - 2)
    factor = apply_fold_(block, Fold("0", "rows", (0, 16), torch.arange(16)), s).double()
    new = block[0].weight.double()

    def misfit(f: torch.Tensor) -> torch.Tensor:
        return (old - new * f[:, None]).square().sum(1)

    assert (misfit(factor) < misfit(factor * 1.0005)).all()
    assert (misfit(factor) < misfit(factor / 1.0005)).all()
    # Each entry is off by at most half a step of bfloat16, 2^-8 of itself, so the fitted factor is no further off than that.
    torch.testing.assert_close(factor, s.double(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", ["norm", "rows"])
def test_a_bias_takes_the_factor_of_its_weight_and_not_the_one_asked_for(kind: Any) -> None:
    torch.manual_seed(6)
    module = torch.nn.LayerNorm(64) if kind == "norm" else torch.nn.Linear(3, 64)
    block = torch.nn.Sequential(module).requires_grad_(False).to(torch.bfloat16)
    module.weight.copy_(torch.randn_like(module.weight))
    module.bias.copy_(torch.randn(64))
    old = module.bias.float()
    s = torch.exp2(4 * torch.rand(64) - 2)
    factor = apply_fold_(block, Fold("0", kind, (0, 64), torch.arange(64)), s)
    assert torch.equal(module.bias, (old / factor).bfloat16())
    assert not torch.equal(module.bias, (old / s).bfloat16())


def test_a_channel_that_would_be_rounded_away_is_left_alone() -> None:
    block = torch.nn.Sequential(torch.nn.RMSNorm(2)).requires_grad_(False).to(torch.float16)
    block[0].weight.copy_(torch.tensor([1.0, 2**-24]))
    factor = apply_fold_(block, Fold("0", "norm", (0, 2), torch.arange(2)), torch.tensor([4.0, 4.0]))
    assert factor.tolist() == [4.0, 1.0]
    assert block[0].weight.tolist() == [0.25, 2**-24]


@pytest.mark.parametrize("s", [[1.0], [1.0, -1.0], [1.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_factors_that_are_not_positive_numbers_are_refused(s: list[float]) -> None:
    block = torch.nn.Sequential(torch.nn.RMSNorm(2)).requires_grad_(False)
    with pytest.raises(UsageError, match="0: folding needs 2 positive finite factors"):
        apply_fold_(block, Fold("0", "norm", (0, 2), torch.arange(2)), torch.tensor(s))
    assert block[0].weight.tolist() == [1.0, 1.0]


class Toy(torch.nn.Module):
    """A norm, a matrix, whatever `between` does, a second matrix, and `beside` that may read the norm's output too."""

    def __init__(
        self,
        between: Callable[[torch.Tensor], torch.Tensor],
        beside: Callable[[torch.Tensor], torch.Tensor] = lambda h: 0 * h,
        inner: int = 24,
        width: int = 24,
    ) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.up, self.down = torch.nn.Linear(16, inner), torch.nn.Linear(width, 16)
        self.between, self.beside = between, beside
        self.requires_grad_(False)
        self.norm.weight.copy_(torch.randn(16))
        self.norm.bias.copy_(torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(self.between(self.up(h))) + self.beside(h)


def toy(between: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> Bench:
    torch.manual_seed(4)
    block = Toy(between, **options)
    x = torch.randn(TOKENS, 16)
    return Bench(block, lambda: block(x))


def test_any_fan_out_of_channels_is_read() -> None:
    torch.manual_seed(5)
    order = torch.cat([torch.randperm(24), torch.randperm(24)])
    folds = toy(lambda h: h[:, order], width=48).folds()
    assert folds["down"].channel_of.tolist() == order.tolist()
    assert (folds["down"].producer, folds["down"].rows) == ("up", (0, 24))


@pytest.mark.parametrize(
    ("between", "is_folded"),
    [
        (lambda h: h, True),
        (torch.relu, True),
        (torch.nn.functional.leaky_relu, True),
        (torch.nn.functional.gelu, False),
        (lambda h: torch.relu(h).square(), False),
        (lambda h: h + 1e-3 * h.mean(1, keepdim=True), False),
        (torch.zeros_like, False),
    ],
)
def test_only_what_passes_factors_through_is_folded(between: Callable[[torch.Tensor], torch.Tensor], is_folded: bool) -> None:
    assert ("down" in toy(between).folds()) == is_folded


def test_channels_that_a_relu_kept_shut_follow_the_others_in_place() -> None:
    bench = toy(torch.relu)
    bench.block.up.bias[:8] = -100.0
    assert (bench.block.between(bench.block.up(torch.randn(TOKENS, 16)))[:, :8] == 0).all()
    assert bench.folds()["down"].channel_of.tolist() == list(range(24))
    bench.block.up.bias[:23] = -100.0  # one channel of 24 is no evidence
    assert "down" not in bench.folds()


@pytest.mark.parametrize("share", [1.0, 1e-2])
def test_a_norm_with_a_second_reader_is_refused(share: float) -> None:
    assert "up" in toy(torch.relu).folds()
    assert "up" not in toy(torch.relu, beside=lambda h: share * torch.tanh(h)).folds()


def test_a_second_group_on_the_same_norm_is_refused() -> None:
    other = torch.nn.Linear(16, 16).requires_grad_(False)
    bench = toy(torch.relu, beside=lambda h: other(h + 0))
    bench.groups.append([Observed("other", other.weight)])
    assert "up" not in bench.folds()


def test_a_block_that_is_not_deterministic_is_an_error() -> None:
    bench = toy(lambda h: torch.dropout(h, 0.5, True))
    with pytest.raises(UsageError, match="evaluation mode"):
        bench.folds()


def test_a_block_without_finite_output_is_an_error() -> None:
    bench = toy(torch.relu)
    bench.block.down.bias[0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        bench.folds()


def test_a_run_that_fails_leaves_the_block_as_it_was() -> None:
    bench = toy(torch.relu)
    before = dict(bench.block.named_parameters())
    calls = []

    def failing() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # two runs of the block as it is, then with stand-ins
            raise Stop
        return bench.block(torch.ones(TOKENS, 16).cumsum(0).cos())

    with pytest.raises(Stop):
        find_folds(bench.block, failing, bench.groups)
    after = dict(bench.block.named_parameters())
    assert all(after[n] is p for n, p in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bench.block.modules())
