"""The commands that show or time something, and change nothing."""

from pathlib import Path
from typing import Annotated

import typer

from bitpress.cli.options import Activations, Cache, Directory, Head, Json, Threads, Width
from bitpress.cli.screen import Screen, out, print_json
from bitpress.errors import UsageError

__all__ = ["app"]

app = typer.Typer()


@app.command(epilog="Example: bitpress bench decode out/smollm2-4bit --context 2048")
def bench(
    what: Annotated[str, typer.Argument(metavar="decode|prefill", help="One token after the other, or a prompt at once.")],
    directory: Directory,
    threads: Threads = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens that are in the cache before the clock starts.")] = 0,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens a repetition: 64 for decode, 512 for prefill.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 5,
    activations: Activations = None,
    cache: Cache = None,
    head: Head = None,
    width: Width = None,
    as_json: Json = False,
) -> None:
    """Measure the native engine's speed on a model, beside the speed of the machine."""
    from bitpress.cli.bench import show_speed
    from bitpress.errors import unknown_name
    from bitpress.runtime.native.options import EngineOptions
    from bitpress.runtime.native.speed import bench_decode, bench_prefill

    if what not in ("decode", "prefill"):
        raise unknown_name("measurement", what, ("decode", "prefill"))
    options = EngineOptions.of({"activations": activations, "cache": cache, "head": head, "threads": threads})
    measure, usual = (bench_decode, 64) if what == "decode" else (bench_prefill, 512)
    facts = measure(
        directory, options, context=context, tokens=usual if tokens is None else tokens, repeats=repeats, width=width
    )
    print_json(facts) if as_json else show_speed(facts)


@app.command(epilog="Example: bitpress inspect out/smollm2-4bit")
def inspect(
    directory: Annotated[
        str | None,
        typer.Argument(metavar="DIR", help="A directory that bitpress wrote, or a model that another tool quantized."),
    ] = None,
    machine: Annotated[bool, typer.Option("--machine", help="Describe this machine instead.")] = False,
    as_json: Json = False,
) -> None:
    """Describe a compressed model, or this machine."""
    from bitpress.cli.reports import describe_directory, describe_machine, show_inspection, show_machine

    if machine == (directory is not None):
        raise UsageError("inspect needs either DIR or --machine.")
    if directory is None:
        facts = describe_machine()
        print_json(facts) if as_json else show_machine(facts)
        return
    from bitpress.pipeline.exporting import open_model

    with Screen() as screen:
        found = open_model(directory, screen)
    facts = {**describe_directory(found), "directory": directory}
    print_json(facts) if as_json else show_inspection(facts)


@app.command(epilog="Example: bitpress verify out/smollm2-4bit")
def verify(directory: Directory, as_json: Json = False) -> None:
    """Hash every file again and check every tensor with its content."""
    from bitpress.cli.reports import verify_directory

    facts = verify_directory(directory)
    if as_json:
        print_json(facts)
    else:
        out.print(
            f"{directory}: {facts['files']} files, {facts['bytes']:,} bytes, {facts['weights']} weights: all as published."
        )


@app.command(epilog="Example: bitpress report out/smollm2-4bit out/smollm2-3bit --html comparison.html")
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Directories that bitpress wrote; several are compared.")
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page to look at and to forward.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was done to a model and what it cost, or compare several."""
    from bitpress.cli.report_command import read_reports, show_comparison, write_html
    from bitpress.cli.reports import show_report
    from bitpress.report.document import dump_report

    reports = read_reports(directories)
    if html is not None:
        write_html(reports, html)
    values = {name: dump_report(found) for name, found in reports}
    if as_json:
        print_json(values if len(values) > 1 else next(iter(values.values())))
    elif html is not None:
        out.print(f"{html}: {html.stat().st_size:,} bytes", markup=False)
    elif len(reports) == 1:
        show_report(next(iter(values.values())), directories[0])
    else:
        show_comparison(reports)


@app.command(epilog="Example: bitpress methods gptq")
def methods(
    name: Annotated[str | None, typer.Argument(help="Show only this method, with all its settings.")] = None,
    as_json: Json = False,
) -> None:
    """List the quantizers, transforms, corrections and ways to learn with their settings."""
    from bitpress.cli.listings import describe_methods, show_method, show_methods
    from bitpress.errors import fold, unknown_name

    rows = describe_methods()
    if name is not None:
        found = next((row for row in rows if fold(row["name"]) == fold(name)), None)
        if found is None:
            raise unknown_name("method", name, [row["name"] for row in rows], command="bitpress methods")
        print_json(found) if as_json else show_method(found)
        return
    print_json(rows) if as_json else show_methods(rows)


@app.command(epilog="Example: bitpress formats --measure smollm2-135m-regauged --picture formats.png")
def formats(
    measure: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure bits and error on a model's weights and on known distributions."),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option("--format", metavar="NAME", help="A format to measure; by default one for every grid.")
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="Measure all weights, not a sample of a million.")] = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw error against bits as a .png or .svg.")] = None,
    as_json: Json = False,
) -> None:
    """List the number formats with their bits, or measure their errors."""
    from bitpress.cli.listings import show_formats
    from bitpress.formats.listing import describe_tables

    if measure is None:
        if names or whole or picture is not None:
            raise UsageError("--format, --all and --picture need --measure MODEL.")
        rows = describe_tables()
        print_json(rows) if as_json else show_formats(rows)
        return
    from bitpress.checkpoints.named import resolve_model
    from bitpress.cli.rates import show_rates
    from bitpress.measure.format_rates import measure_formats
    from bitpress.report.rate_picture import check_picture, draw_rates

    if picture is not None:
        check_picture(picture)
    with Screen() as screen:
        measured = measure_formats(resolve_model(measure, screen), names or (), whole=whole, progress=screen)
    measured["model"] = measure
    if picture is not None:
        draw_rates(measured, picture)
    print_json(measured) if as_json else show_rates(measured)


@app.command(epilog="Example: bitpress models")
def models(as_json: Json = False) -> None:
    """List the models that have a name."""
    from bitpress.checkpoints.named import describe_models
    from bitpress.cli.listings import show_models

    rows = describe_models()
    print_json(rows) if as_json else show_models(rows)
