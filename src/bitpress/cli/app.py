"""The commands.

Exit codes: 0 done, 1 some recipes of a comparison failed, or an unexpected error, 2 usage, 3 bad model file, 4 disk, 5 memory,
6 numeric gate, 75 stopped and resumable, 141 the reader of the output has gone.
"""

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from bitpress.cli import cache, compare_command, exchange, info, rotations, run
from bitpress.cli.failing import check_arguments, fail, interrupted
from bitpress.cli.options import (
    Activations,
    Cache,
    CalibrationText,
    DeviceMemory,
    DeviceName,
    Documents,
    Embeddings,
    Explain,
    ForRuntime,
    Head,
    InputFormat,
    Json,
    Length,
    Memory,
    Model,
    Output,
    OutputHead,
    PresetBits,
    PresetName,
    QuantizerName,
    RecipeFile,
    Requantize,
    Samples,
    SchemeName,
    Seed,
    Sets,
    Skip,
    Tasks,
    Tunings,
    Weights,
    Width,
    computing,
    is_set,
    refuse_idle,
)
from bitpress.cli.recipe_options import explain_preset, read_method
from bitpress.cli.screen import Screen, begin_output, out, print_json
from bitpress.runtime.native.options import EngineOptions
from bitpress.settings import share_cores, use_large_pages
from bitpress.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize a pretrained language model to few bits, measure what that costs, and run it.",
    epilog="Begin with: bitpress quantize smollm2-135m out/smollm2-4bit --bits 4, and then bitpress run out/smollm2-4bit",
)
_state = {"debug": False}


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    _state["debug"] = debug


@app.command(epilog="Example: bitpress quantize smollm2-135m out/smollm2-4bit --bits 4")
def quantize(
    model: Model,
    output: Output,
    weights: Weights = None,
    quantizer: QuantizerName = None,
    tune: Tunings = None,
    scheme: SchemeName = None,
    inputs: InputFormat = None,
    preset: PresetName = None,
    bits: PresetBits = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    skip: Skip = None,
    embeddings: Embeddings = None,
    head: OutputHead = None,
    runtime: ForRuntime = None,
    device: DeviceName = None,
    device_memory: DeviceMemory = None,
    strict: Annotated[bool, typer.Option("--strict", help="Any fallback is an error (exit 6).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another model or job of bitpress in OUT.")] = False,
    requantize: Requantize = False,
    proof_tokens: Annotated[int, typer.Option(help="Evaluation tokens of the final comparison; 0 leaves it out.")] = 8192,
    proof_text: Annotated[str, typer.Option(help="Evaluation text of the final comparison.")] = "builtin:heldout",
    max_kl: Annotated[float | None, typer.Option(help="Publish nothing above this KL divergence (exit 6).")] = None,
    explain: Explain = False,
    as_json: Json = False,
) -> None:
    """Quantize a model, measure what that cost, and publish it."""
    if explain:
        others = {"--for": runtime, "--requantize": requantize, "--weights": weights, "--quantizer": quantizer, "--set": sets}
        others |= {"--tune": tune, "--scheme": scheme, "--inputs": inputs, "--skip": skip}
        others |= {"--embeddings": embeddings, "--head": head}
        explain_preset(recipe, preset, bits, as_json, others)
        return
    from bitpress.cli.exchange import show_quantized
    from bitpress.pipeline.exporting import export_for, open_to_quantize
    from bitpress.pipeline.for_runtime import fit_to
    from bitpress.pipeline.quantize import Proof, quantize_directory

    text_options = (calibration, samples, length, seed)
    method = read_method(
        recipe, preset, bits, weights, quantizer, sets, *text_options, skip, embeddings, head, runtime, scheme, inputs, tune
    )
    proof = Proof(tokens=proof_tokens, text=proof_text, max_kl=max_kl)
    with computing(device, device_memory) as place, Screen() as screen:
        source = open_to_quantize(model, screen, requantize=requantize)
        method = fit_to(method, source, runtime)
        if not method.reads_text and any(v is not None for v in (calibration, samples, length, seed)):
            screen.note(
                f"{method.quantizer.name} needs no calibration: --calibration, --samples, --length and --seed change nothing."
            )
        report = quantize_directory(
            source, output, method, strict=strict, force=force, proof=proof, device=place, progress=screen
        )
        exported = None if runtime is None else export_for(output, runtime, screen)
    show_quantized(report, exported, output, as_json)


@app.command(epilog="Example: bitpress plan smollm2-135m --bits 4")
def plan(
    model: Model,
    weights: Weights = None,
    quantizer: QuantizerName = None,
    tune: Tunings = None,
    scheme: SchemeName = None,
    inputs: InputFormat = None,
    preset: PresetName = None,
    bits: PresetBits = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    skip: Skip = None,
    embeddings: Embeddings = None,
    head: OutputHead = None,
    runtime: ForRuntime = None,
    device: DeviceName = None,
    device_memory: DeviceMemory = None,
    requantize: Requantize = False,
    whole: Annotated[bool, typer.Option("--all", help="List every weight, not only the kinds of weights.")] = False,
    as_json: Json = False,
) -> None:
    """Print what quantize would do: formats, bytes, bits, memory, disk, time. No model is written."""
    from bitpress.calibration.samples import read_texts
    from bitpress.cli.exchange import show_division, show_targets, target_values
    from bitpress.cli.reports import plan_values, show_plan
    from bitpress.pipeline.device_memory import estimate_device
    from bitpress.pipeline.estimate import estimate_seconds
    from bitpress.pipeline.exporting import open_to_quantize
    from bitpress.pipeline.for_runtime import carriers, division, fit_to
    from bitpress.pipeline.oddities import notes_of
    from bitpress.pipeline.quantize import plan_run

    text_options = (calibration, samples, length, seed)
    method = read_method(
        recipe, preset, bits, weights, quantizer, sets, *text_options, skip, embeddings, head, runtime, scheme, inputs, tune
    )
    text = method.recipe.calibration.text
    if method.reads_text and not text.startswith("hf:"):
        read_texts(text)  # as quantize would; a data set of the hub is not fetched for a plan
    with computing(device, device_memory) as place, Screen() as screen:
        source = open_to_quantize(model, screen, requantize=requantize)
        method = fit_to(method, source, runtime).computed_on(place)
        planned, streamed, _ = plan_run(source, method, place)
        on_device = estimate_device(streamed, method, planned)
        seconds = estimate_seconds(streamed, method, planned.weights, planned.outer) if on_device is None else None
        for text in notes_of(planned, method):
            screen.note(text)
    leaves = carriers(planned.weights, method, streamed, planned.outer)
    divided = division(planned.weights, method, streamed, runtime)
    if as_json:
        print_json(plan_values(planned, method, seconds, on_device) | target_values(leaves, divided))
    else:
        show_plan(planned, method, seconds, on_device, whole=whole)
        show_targets(leaves, decoded=not planned.rounds)
        show_division(divided, runtime)


@app.command("eval", epilog="Example: bitpress eval out/smollm2-4bit --against smollm2-135m --tasks arc-easy,piqa --json")
def evaluate(
    context: typer.Context,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A directory that bitpress wrote, or any other model.")],
    against: Annotated[str | None, typer.Option(help="The original model, to measure the distance from it.")] = None,
    text: Annotated[str, typer.Option(help="builtin:heldout[:KIND], a .txt or .jsonl file, or hf:NAME.")] = "builtin:heldout",
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens.")] = 8192,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    tasks: Tasks = None,
    documents: Documents = 500,
    memory: Memory = None,
    width: Width = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Measure the runtime native, transformers or auto (which run would use); else the decoded weights in float32."
        ),
    ] = None,
    activations: Activations = None,
    cache: Cache = None,
    head: Head = None,
    device: DeviceName = None,
    device_memory: DeviceMemory = None,
    as_json: Json = False,
) -> None:
    """Measure a model: its perplexity, its distance from the original (--against), or its accuracy (--tasks)."""
    from bitpress.checkpoints.width import open_part
    from bitpress.cli.accuracy import accuracy_rows, parse_tasks
    from bitpress.cli.screen import figures_table
    from bitpress.evaluation.tasks import check_task
    from bitpress.measure.evaluation import evaluate as measure
    from bitpress.measure.evaluation import evaluate_alone
    from bitpress.measure.multiple_choice import evaluate_tasks
    from bitpress.pipeline.exporting import open_model

    names = parse_tasks(tasks)
    for name in names:
        check_task(name)
    engine = EngineOptions.of({"activations": activations, "cache": cache, "head": head})
    refuse_idle(context, "--against", against is None, ("runtime",))
    refuse_idle(context, "--runtime", runtime is None, ("activations", "cache", "head"))
    refuse_idle(context, "--tasks", not names, ("documents",))
    on_text = against is not None or not names or is_set(context, "text", "tokens", "length", "seed")
    with computing(device, device_memory) as place, Screen() as screen:
        given = open_model(directory, screen)
        original = None if against is None else open_model(against, screen)
        part = open_part(given, memory, width)
        how: dict[str, Any] = {"text": text, "tokens": tokens, "length": length, "seed": seed, "device": place}
        if original is not None:
            figures = measure(given, original, **how, checkpoint=part, runtime=runtime, engine=engine, progress=screen)
        else:
            figures = evaluate_alone(given, **how, checkpoint=part, progress=screen) if on_text else {}
        if names:
            asked: dict[str, Any] = {"documents": documents, "device": place, "progress": screen}
            figures["tasks"] = evaluate_tasks(given, names, checkpoint=part, **asked)
            if original is not None:
                figures["tasks_original"] = evaluate_tasks(original, names, **asked)
    print_json(figures) if as_json else figures_table(figures, accuracy_rows(figures))


app.add_typer(run.app)
app.add_typer(compare_command.app)
app.add_typer(rotations.app)
app.add_typer(exchange.app)
app.add_typer(info.app)
app.add_typer(cache.app)


def main() -> None:
    """Run the command line; every error is one line and its exit code. A closed pipe, as of `| head`, ends it without a word."""
    try:
        code = _run()
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        # rich and typer turn a closed pipe into an exit with code 1.
        if isinstance(end, BrokenPipeError) or isinstance(end.__context__, BrokenPipeError):
            _end_quietly()
        raise
    sys.exit(code)


def _end_quietly() -> NoReturn:
    """Exit with the code that a shell reports for a program ended by SIGPIPE; what is left in buffers goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    sys.exit(141)


def _run() -> int:
    share_cores()
    use_large_pages()
    begin_output()
    arguments = sys.argv[1:]
    try:
        check_arguments(arguments)
        code = app(args=arguments or ["--help"], standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the one place where every error ends, in one line
        fail(error, debug=_state["debug"], arguments=arguments)
    if code == 130:
        fail(interrupted(), debug=_state["debug"], arguments=arguments)
    return int(code or 0)
