"""`bitpress run`: one answer, or a chat."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitpress.cli.options import (
    Activations,
    Cache,
    Context,
    Head,
    Json,
    MaxTokens,
    Memory,
    MinP,
    Packed,
    Prompt,
    Raw,
    RepetitionPenalty,
    Runtime,
    SamplingSeed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    Width,
)
from bitpress.cli.screen import err, print_json
from bitpress.errors import UsageError
from bitpress.runtime.native.options import EngineOptions
from bitpress.runtime.sampling import SamplingRequest

if TYPE_CHECKING:
    from bitpress.cli.request import Request

__all__ = ["app"]

app = typer.Typer()


@app.command(epilog='Example: bitpress run out/smollm2-4bit --prompt "What is a Hadamard matrix?"')
def run(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A directory that bitpress wrote, or any other model as it is.")],
    prompt: Prompt = None,
    max_tokens: MaxTokens = 256,
    stop: Stop = None,
    raw: Raw = False,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: SamplingSeed = 0,
    runtime: Runtime = "auto",
    threads: Threads = None,
    activations: Activations = None,
    cache: Cache = None,
    head: Head = None,
    context: Context = None,
    packed: Packed = False,
    memory: Memory = None,
    width: Width = None,
    as_json: Json = False,
) -> None:
    """Generate text with a compressed model, or with any other as it is.

    Sampling settings in the model's generation_config.json apply at a temperature above 0, unless you set them here.
    """
    from bitpress.cli.plain import find_model
    from bitpress.cli.request import Request

    if prompt is None and (as_json or raw):
        raise UsageError(f"{'--json' if as_json else '--raw'} needs a --prompt.")
    engine = {"activations": activations, "cache": cache, "head": head, "context": context, "threads": threads}
    request = Request(
        max_tokens=max_tokens,
        sampling=SamplingRequest(temperature, seed, top_k, top_p, min_p, repetition_penalty),
        stop=tuple(stop or ()),
        runtime=runtime,
        packed=packed,
        memory=memory,
        width=width,
        engine=EngineOptions.of(engine),
    )
    directory = find_model(model)
    if prompt is None:
        from bitpress.cli.chat import chat

        chat(directory, request)
    else:
        _answer(directory, prompt, request, raw=raw, as_json=as_json)


def _answer(directory: Path, prompt: str, request: "Request", *, raw: bool, as_json: bool) -> None:
    from bitpress.cli.chat import answer_once

    answer, facts = answer_once(directory, prompt, request, raw=raw, stream=not as_json)
    if as_json:
        print_json({**answer.as_dict(), **facts})
        return
    speed = answer.prefill_tokens_per_second
    before = "" if speed is None else f"{answer.prompt_tokens} tokens read, {speed:.1f} tokens/s; "
    err.print(f"[dim]{before}{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s[/dim]")
