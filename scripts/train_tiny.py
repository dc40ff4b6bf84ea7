"""Train the test models that ship inside the package, and a small Mamba that does not, from scratch on public-domain text, on one core.

    python scripts/train_tiny.py bitpress-tiny
    python scripts/train_tiny.py bitpress-tiny-moe
    python scripts/train_tiny.py bitpress-tiny-mamba

The same command goes on where a stopped run left off. On one kind of processor, a resumed run ends in the same weights, byte for
byte, as an uninterrupted one: the order of the windows and the rate of learning depend on nothing but the seed and the step. The
directory is written under `src/bitpress/tiny_models`, the curve under `benchmarks/results`; `scripts/draw_tiny.py` draws it. The Mamba and
its curve go into the cache, under `trained`; `benchmarks/schemes.py --models bitpress-tiny-mamba` measures it.
"""

import argparse
import csv
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scan import own_scan
from tiny_card import Facts, card
from tiny_texts import LEFT_OUT, TextKind, fetch_texts

from bitpress.calibration import builtin_texts
from bitpress.checkpoints.named import SHIPPED_MODELS
from bitpress.progress import Progress
from bitpress.screen import Screen
from bitpress.settings import cache_directory

__all__ = [
    "MODELS",
    "Plan",
    "Row",
    "balance",
    "batch_of",
    "build_model",
    "heldout_windows",
    "rate",
    "save",
    "train",
    "train_tokenizer",
]

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "src" / "bitpress" / "tiny_models"
RESULTS = ROOT / "benchmarks" / "results"
VOCABULARY = 4096
CONTEXT = 512
SEED = 20261127
BEGIN, END = "<|begin|>", "<|end|>"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Plan:
    """How a model is trained; `aux` weighs the loss that balances the experts.

    The rate of learning follows a cosine over `cosine_steps`; a run that ends earlier cools down in a line from `cool_from` on.
    """

    steps: int
    cosine_steps: int
    cool_from: int
    batch: int = 4
    length: int = CONTEXT
    peak_rate: float = 3e-3
    warm_steps: int = 60
    floor: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    aux: float = 0.0
    save_every: int = 50
    judge_every: int = 50
    seed: int = SEED


@dataclass(frozen=True)
class TinyModel:
    """A configuration class of transformers, its arguments, and how the model is trained."""

    config: str
    shape: dict[str, Any]
    plan: Plan


MODELS: dict[str, TinyModel] = {
    "bitpress-tiny": TinyModel(
        "LlamaConfig",
        {**_SHAPE, "num_hidden_layers": 6, "intermediate_size": 768},
        Plan(steps=950, cosine_steps=1500, cool_from=600),
    ),
    "bitpress-tiny-moe": TinyModel(
        "MixtralConfig",
        {
            **_SHAPE,
            "num_hidden_layers": 3,
            "intermediate_size": 256,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        Plan(steps=350, cosine_steps=350, cool_from=350, peak_rate=2e-3, aux=0.05),
    ),
    "bitpress-tiny-mamba": TinyModel(
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "expand": 2,
            "state_size": 16,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "initializer_range": 0.05,
        },
        Plan(steps=600, cosine_steps=1000, cool_from=350, length=256),
    ),
}


@dataclass(frozen=True)
class Row:
    """One point of the curve: losses in nats a token; seconds are those of the processor."""

    step: int
    tokens: int
    seconds: float
    loss: float
    heldout_loss: float | None


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> Any:
    """Train a byte-level BPE tokenizer that puts BEGIN before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def cut_windows(documents: list[str], tokenizer: Any, length: int) -> torch.Tensor:
    """Join documents with END between them and cut them into windows [windows, length] that open with BEGIN."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
    body = torch.tensor(ids, dtype=torch.int64)
    rows = body[: len(body) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)


def heldout_windows(tokenizer: Any, length: int, per_kind: int) -> dict[str, torch.Tensor]:
    """Return the first windows of every kind of the held-out built-in text."""
    return {kind: cut_windows([text], tokenizer, length)[:per_kind] for kind, text in builtin_texts("heldout").items()}


def build_model(config: str, shape: dict[str, Any], seed: int) -> Any:
    """Make a model of random weights from a seed."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**shape), dtype=torch.float32)
    return model.train()


def rate(plan: Plan, step: int) -> float:
    """Return the rate of learning of a step: a linear rise, a cosine, and from `cool_from` a line down to `floor` of the peak."""
    if step < plan.warm_steps:
        return plan.peak_rate * (step + 1) / plan.warm_steps
    if step > plan.cool_from:
        left = (plan.steps - step) / (plan.steps - plan.cool_from)
        return left * _cosine(plan, plan.cool_from) + (1 - left) * plan.floor * plan.peak_rate
    return _cosine(plan, step)


def _cosine(plan: Plan, step: int) -> float:
    gone = (step - plan.warm_steps) / max(plan.cosine_steps - plan.warm_steps, 1)
    return plan.peak_rate * (plan.floor + (1 - plan.floor) * 0.5 * (1 + math.cos(math.pi * gone)))


def batch_of(windows: torch.Tensor, plan: Plan, step: int) -> torch.Tensor:
    """Return the windows of a step: each round over the text has an order of its own, drawn from the seed."""
    per_round = len(windows) // plan.batch
    turn, at = divmod(step, per_round)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(plan.seed + turn))
    return windows[order[at * plan.batch : (at + 1) * plan.batch]]


def judge(model: Any, windows: torch.Tensor) -> float:
    """Return the mean loss of the next token over windows, in nats."""
    model.eval()
    with torch.no_grad():
        losses = [_loss(model(input_ids=rows, use_cache=False).logits, rows).item() * len(rows) for rows in windows.split(4)]
    model.train()
    return sum(losses) / len(windows)


def balance(routed: Sequence[torch.Tensor], choices: int) -> torch.Tensor:
    """Return the sum over layers of what unequal use of the experts costs: 1 a layer at equal use.

    The `aux_loss` of transformers pools the layers: where one of them never uses an expert, another one can make up for it.
    """
    total = torch.zeros(())
    for logits in routed:
        experts = logits.shape[-1]
        chosen = torch.bincount(logits.topk(choices, dim=-1).indices.flatten(), minlength=experts) / (len(logits) * choices)
        total = total + experts * (chosen * logits.softmax(-1).mean(0)).sum()
    return total


def train(model: Any, windows: torch.Tensor, heldout: torch.Tensor, plan: Plan, folder: Path, progress: Progress) -> list[Row]:
    """Train `model` in place to the end of the plan, from the checkpoint in `folder` if there is one; return the curve."""
    optimizer = _optimizer(model, plan)
    rows = _resume(model, optimizer, folder)
    first, before, started = len(rows), rows[-1].seconds if rows else 0.0, time.process_time()
    progress.begin("training", plan.steps, done=first)
    for step in range(first, plan.steps):
        inputs = batch_of(windows, plan, step)
        for group in optimizer.param_groups:
            group["lr"] = rate(plan, step)
        output = model(input_ids=inputs, **({"output_router_logits": True} if plan.aux else {}))
        loss = _loss(output.logits, inputs)
        (loss + plan.aux * balance(output.router_logits, model.config.num_experts_per_tok) if plan.aux else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        judged = judge(model, heldout) if done % plan.judge_every == 0 or done in (1, plan.steps) else None
        rows.append(Row(done, done * inputs.numel(), before + time.process_time() - started, loss.item(), judged))
        if done % plan.save_every == 0 or done == plan.steps:
            _keep(model, optimizer, rows, folder)
        progress.advance(f"step {done}", loss=rows[-1].loss, **({} if judged is None else {"held_out": judged}))
    return rows


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the model in bf16 and its tokenizer, elsewhere first, and rename the directory into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(made)
    tokenizer.save_pretrained(made)
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)


def _loss(logits: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())


def _optimizer(model: Any, plan: Plan) -> torch.optim.AdamW:
    """Make AdamW, which decays matrices and leaves norms alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.95), fused=True)


def _resume(model: Any, optimizer: torch.optim.AdamW, folder: Path) -> list[Row]:
    path = folder / "state.pt"
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [Row(**row) for row in state["rows"]]


def _keep(model: Any, optimizer: torch.optim.AdamW, rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".state-{os.getpid()}.pt"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": [asdict(row) for row in rows]}
    torch.save(state, part)
    part.rename(folder / "state.pt")


def write_curve(path: Path, rows: list[Row], device: str) -> None:
    """Write a point for every tenth step: the mean loss of its ten steps, and the held-out loss where there is one."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "tokens", "seconds", "loss", "heldout_loss", "device"])
        for row in rows:
            if row.step == 1 or row.step % 10 == 0:
                part = [other.loss for other in rows[max(row.step - 10, 0) : row.step]]
                judged = "" if row.heldout_loss is None else f"{row.heldout_loss:.4f}"
                writer.writerow([row.step, row.tokens, f"{row.seconds:.1f}", f"{sum(part) / len(part):.4f}", judged, device])


def expert_shares(model: Any, windows: torch.Tensor) -> list[tuple[float, float]]:
    """Return the least and the largest share of the router's choices that an expert has, by layer."""
    model.eval()
    with torch.no_grad():
        routed = model(input_ids=windows, output_router_logits=True).router_logits
    shares = []
    for logits in routed:
        chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten()
        counts = torch.bincount(chosen, minlength=logits.shape[-1]) / len(chosen)
        shares.append((counts.min().item(), counts.max().item()))
    return shares


def directory_of(name: str) -> Path:
    """Return where a trained model is written: inside the package, or in the cache if it does not ship."""
    return (SHIPPED if name in SHIPPED_MODELS else cache_directory() / "trained") / name


def write_card(name: str, tokenizer: Any, rows: list[Row], texts: list[TextKind], text_tokens: int, device: str) -> None:
    """Judge the weights as they are stored, on more text than the curve, and write the card beside them."""
    from transformers import AutoModelForCausalLM

    tiny = MODELS[name]
    model = AutoModelForCausalLM.from_pretrained(directory_of(name), dtype=torch.float32)
    by_kind = heldout_windows(tokenizer, tiny.plan.length, 16)
    losses = {kind: judge(model, windows) for kind, windows in by_kind.items()}
    shares = expert_shares(model, torch.cat([windows[:4] for windows in by_kind.values()])) if tiny.plan.aux else []
    facts = Facts(
        name=name,
        class_name=type(model).__name__,
        parameters=model.num_parameters(),
        shape={key: value for key, value in tiny.shape.items() if value is not None and not key.endswith("_id")},
        steps=rows[-1].step,
        tokens=rows[-1].tokens,
        text_tokens=text_tokens,
        seconds=rows[-1].seconds,
        device=device,
        heldout=losses | {"all": sum(losses.values()) / len(losses)},
        heldout_tokens=sum(windows.numel() for windows in by_kind.values()),
        shares=shares,
        texts=[(kind.kind, kind.source, len(kind.documents), kind.nbytes) for kind in texts],
        left_out=LEFT_OUT,
        seed=tiny.plan.seed,
    )
    (directory_of(name) / "README.md").write_text(card(facts), encoding="utf-8")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())


def main() -> None:
    """Train one model, or finish a run that was stopped, and write its directory, its card and its curve."""
    parser = argparse.ArgumentParser(description="Train a test model.")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--work", type=Path, default=cache_directory() / "training", help="folder for checkpoints")
    arguments = parser.parse_args()
    name, tiny, folder = arguments.name, MODELS[arguments.name], arguments.work / arguments.name
    torch.set_num_threads(1)
    texts = fetch_texts()
    documents = [document for kind in texts for document in kind.documents]
    tokenizer = train_tokenizer(documents)
    windows = cut_windows(documents, tokenizer, tiny.plan.length)
    heldout = torch.cat(list(heldout_windows(tokenizer, tiny.plan.length, 4).values()))
    model = build_model(tiny.config, tiny.shape, tiny.plan.seed)
    with Screen() as progress, own_scan():
        rows = train(model, windows, heldout, tiny.plan, folder, progress)
    save(model, tokenizer, directory_of(name))
    write_card(name, tokenizer, rows, texts, windows.numel(), processor())
    curves = RESULTS if name in SHIPPED_MODELS else directory_of(name)
    write_curve(curves / f"{name}-loss.csv", rows, processor())


if __name__ == "__main__":
    main()
