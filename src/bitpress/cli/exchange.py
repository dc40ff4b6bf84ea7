"""The commands that take models to other runtimes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from bitpress.cli.options import Json
from bitpress.cli.screen import Screen, out, print_json, size, table

if TYPE_CHECKING:
    from bitpress.pipeline.for_runtime import Division

__all__ = ["app", "show_division", "show_export", "show_quantized", "show_targets", "target_values"]

app = typer.Typer()

Given = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory that bitpress wrote, or a model that another tool quantized.")
]
Written = Annotated[Path, typer.Argument(metavar="OUT", help="What to write, a file or a directory; it must not exist.")]
To = Annotated[str, typer.Option("--to", metavar="TARGET", help="What to write it as (`bitpress targets`).")]
Again = Annotated[
    bool,
    typer.Option("--requantize", help="Round weights again whose codes the target cannot hold, and tell the error that adds."),
]


@app.command(epilog="Example: bitpress export out/smollm2-4bit out/smollm2-gptq --to gptq")
def export(model: Given, output: Written, to: To, requantize: Again = False, as_json: Json = False) -> None:
    """Write a compressed model as other runtimes load it, code for code, and read it back."""
    _export(model, output, to, requantize=requantize, as_json=as_json)


@app.command(epilog="Example: bitpress convert model-gptq out/model-bf16 --to bf16")
def convert(model: Given, output: Written, to: To, requantize: Again = False, as_json: Json = False) -> None:
    """Write a model that another tool quantized in the way of a third; `export` under another name."""
    _export(model, output, to, requantize=requantize, as_json=as_json)


@app.command(epilog="Example: bitpress targets")
def targets(as_json: Json = False) -> None:
    """List what models can be exported to, and what can be read."""
    from bitpress.exchange.runtimes import RUNTIMES
    from bitpress.exchange.table import ECOSYSTEMS, EXPORTERS

    runtimes = {name: runtime.about for name, runtime in RUNTIMES.items()}
    written = {name: exporter.about for name, exporter in EXPORTERS.items()}
    read = {name: ecosystem.about for name, ecosystem in ECOSYSTEMS.items()}
    if as_json:
        print_json({"written": written, "read": read, "runtimes": runtimes})
        return
    table("Written by `bitpress export MODEL OUT --to TARGET`", ("target", "what it is"), list(written.items()))
    table("\nLoaded by what `--for RUNTIME` chooses", ("runtime", "what it is"), list(runtimes.items()))
    table("\nRead, wherever a command takes a MODEL", ("ecosystem", "what it is"), list(read.items()))


def _export(model: str, output: Path, to: str, *, requantize: bool, as_json: bool) -> None:
    from bitpress.pipeline.exporting import export_model

    with Screen() as screen:
        done = export_model(model, output, to, requantize=requantize, progress=screen).as_dict()
    print_json(done) if as_json else show_export(done)


def show_quantized(report: Mapping[str, Any], exported: Mapping[str, Any] | None, output: Path, as_json: bool) -> None:
    """Print what `quantize` did, and what it exported."""
    from bitpress.cli.reports import show_report

    if as_json:
        print_json(dict(report) if exported is None else {**report, "exported": exported})
        return
    show_report(report, output)
    if exported is not None:
        show_export(exported)


def show_export(done: Mapping[str, Any]) -> None:
    """Print what an export wrote, and what of it is not code for code."""
    counts = ", ".join(f"{count} {how}" for how, count in done["weights"].items())
    out.print(f"[bold]{done['out']}[/bold]  {done['to']}, {size(done['bytes'])}; weights: {counts}; read back")
    reading = done["read_by_others"]
    if reading["reader"] is not None:
        out.print(f"Read by {reading['reader']}: {reading['kl_mean']:.1e} nats a token from the model that was exported.")
    else:
        out.print(f"Not read back by another tool: {escape(reading['why'])}.")
    rows: dict[tuple[str, str], list[float]] = {}
    for entry in done["not_exact"].values():
        how = f"rounded into {entry['format']}" if entry["format"] else entry["how"]
        rows.setdefault((how, entry["why"] or ""), []).append(entry["added_error"] or 0.0)
    told = [(how, why, str(len(errors)), f"{max(errors):.2g}") for (how, why), errors in rows.items()]
    if told:
        table("Not code for code", ("what", "why", "weights", "relative error added, at most"), told, right=(2, 3))


def show_targets(leaves: Mapping[str, str | None], *, decoded: bool) -> None:
    """Print what the weights of a plan could be exported to bit for bit, and why not to the others; `decoded`: in 16 bits too."""
    able = [name for name, why in leaves.items() if why is None]
    more = ", and decoded to bf16 and fp16." if decoded else "; decoded weights would not round what the model rounds."
    out.print(f"\nCan be exported code for code to: {', '.join(able) or 'nothing'}{more}")
    for name, why in leaves.items():
        if why is not None:
            out.print(f"Not to {name}: {escape(why)}.")


def target_values(leaves: Mapping[str, object], divided: "Division | None") -> dict[str, Any]:
    """Return as JSON what takes the weights of a plan, and over how many devices it divides them."""
    return {"targets": leaves, "tensor_parallel": divided and divided.as_dict()}


def show_division(divided: "Division | None", runtime: str | None) -> None:
    """Print over how many devices a runtime can divide a model, and the reason against the other numbers."""
    if divided is None:
        return
    refusals, padded = divided.refusals, divided.padded
    able = [str(devices) for devices, why in refusals.items() if why is None]
    out.print(f"{runtime} runs it at these sizes of tensor parallelism: {', '.join(able) or 'none'}.")
    for devices, why in refusals.items():
        if why is not None:
            out.print(f"Not at {devices}: {escape(why)}.")
    if padded:
        told = "; ".join(f"at {devices} {escape(why)}" for devices, why in padded.items())
        out.print(
            f"Versions of vLLM before its pull request 45295 need multiples of 64 outputs and 128 inputs, or 128 and 64: {told}."
        )
