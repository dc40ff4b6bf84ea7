"""The patterns of a recipe, checked against the names of a model: a pattern that matches nothing is an error."""

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping

from bitpress.checkpoints.parameter import stem
from bitpress.errors import UsageError, nearest, shown
from bitpress.models.linears import SKIPPED
from bitpress.recipes import Recipe

__all__ = ["check_patterns"]


def check_patterns(
    recipe: Recipe, compressed: Collection[str], kept: Mapping[str, str], others: Iterable[str], experts: Collection[str] = ()
) -> None:
    """Raise UsageError for a pattern of `skip` or `overrides` that matches nothing, with the nearest name.

    compressed   stems of the weights that are compressed
    experts      further names of compressed weights, for `skip` alone (`WeightParameter.pattern_names`)
    kept         names of the matrices of blocks that stay uncompressed, and why; `others` are all the model's parameters

    A pattern of `skip` may also match only weights that stay uncompressed anyway, since its effect is there. A pattern after "!" and those
    of overrides have to match a weight that they can change.
    """
    skipped = {stem(name) for name, why in kept.items() if why.startswith(SKIPPED)}
    everything = {*compressed, *map(stem, kept), *map(stem, others)}
    for pattern in recipe.skip:
        if f"{SKIPPED} ({pattern})" in kept.values():
            continue
        taken_back = pattern.startswith("!")
        names = {*compressed, *experts, *(skipped if taken_back else everything)}
        _check("skip", pattern, pattern.removeprefix("!"), names, everything - names)
    for override in recipe.overrides:
        _check("overrides", override.match, override.match, set(compressed), everything - set(compressed))


def _check(key: str, given: str, pattern: str, names: Collection[str], beside: Collection[str]) -> None:
    if _matches(pattern, names):
        return
    if _matches(pattern, beside):
        raise UsageError(
            f"{key}: {shown(given)} matches only weights that stay uncompressed anyway, and none that is compressed."
        )
    meant = _nearest(pattern, names)
    hint = (
        f"did you mean {given[: len(given) - len(pattern)]}{meant}?"
        if meant
        else "`bitpress plan MODEL --all` lists the names."
    )
    raise UsageError(f"{key}: {shown(given)} matches no weight of this model; {hint}")


def _matches(pattern: str, stems: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"{name}.weight", pattern) for name in stems)


def _nearest(pattern: str, names: Collection[str]) -> str | None:
    """Return the pattern or the name that was probably meant: other tools match parts of names, or use regular expressions."""
    bare = pattern.removeprefix("re:").replace(".*", "*").strip("^$").replace("\\.", ".")
    for candidate in (f"*.{bare.lstrip('*.')}", f"*{bare.strip('*')}*"):
        if bare.strip("*.") and _matches(candidate, names):
            return candidate
    ends: set[str] = set()
    for name in names:
        parts = re.sub(r"\.\d+(?=\.|$)", ".*", name).split(".")
        ends |= {name, ".".join(parts), *(f"*.{'.'.join(parts[i:])}" for i in range(1, len(parts)))}
    found = nearest(bare, ends)
    return found[0] if found else None
