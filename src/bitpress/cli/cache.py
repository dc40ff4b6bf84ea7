"""`bitpress cache`: list or remove the files that bitpress cached on this machine."""

from typing import Annotated

import typer
from rich.markup import escape

from bitpress.cli.options import Json
from bitpress.cli.screen import out, print_json, size, table
from bitpress.errors import UsageError
from bitpress.settings import cache_directory

__all__ = ["app"]

app = typer.Typer()


@app.command(epilog="Example: bitpress cache --clear gguf")
def cache(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="With --clear: entries or kinds to remove; without names, all."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the named entries, or all.")] = False,
    as_json: Json = False,
) -> None:
    """List or remove what was downloaded, converted or laid out on this machine. Models that you quantized are never in the cache."""
    from bitpress.checkpoints.cache import clear_cache, list_cache

    if names and not clear:
        raise UsageError(f"{names[0]}: naming entries needs --clear.")
    cleared = clear_cache(names or ()) if clear else None
    entries = list_cache() if cleared is None else cleared.removed
    in_use = () if cleared is None else cleared.in_use
    total = sum(entry.nbytes for entry in entries)
    if as_json:
        print_json(
            {
                "directory": str(cache_directory()),
                "cleared": clear,
                "bytes": total,
                "entries": [entry.as_dict() for entry in entries],
                "in_use": [entry.as_dict() for entry in in_use],
            }
        )
        return
    if entries:
        rows = [(e.kind, escape(e.name), escape(e.what), size(e.nbytes), e.last_use) for e in entries]
        table("", ("kind", "name", "what it is", "size", "last use"), rows, right=(3,))
    told = f"{size(total)} removed from" if clear else f"{size(total)} in"
    out.print(f"{told} {cache_directory()}", markup=False)
    for entry in in_use:
        out.print(f"{entry.name} stays: a running command reads it.", markup=False)
