"""Rules between the parts of a recipe: which do not go together though each is fine."""

from bitpress.calibration.stats import of_origin
from bitpress.errors import UsageError
from bitpress.recipes.method import OF_OUTPUT_HEADS, Method

__all__ = ["check_composition"]


def check_composition(method: Method) -> None:
    """Raise UsageError for parts that each are fine and do not go together."""
    calibration, exact = method.recipe.calibration, method.exact_formats()
    moving = [named for named in method.of_key("transforms") if named.kind != "attention"]
    changing = [named.name for named in (*moving, *method.corrections)]
    if exact and changing:
        raise UsageError(
            f"{exact[0]} keeps weights bit for bit, and {', '.join(changing)} would change them; "
            "use rtn or gptq without transforms and corrections."
        )
    if "sensitivity" in method.needs and method.every_change:
        changes = ", ".join(method.every_change)
        raise UsageError(f"the sensitivity of single weights is not known in another basis; leave out {changes}.")
    if "output_gram" in method.needs and method.searches:
        scales = ", ".join(named.name for named in method.of("search"))
        raise UsageError(f"how the loss depends on outputs is not known once {scales} has scaled them; leave it out.")
    compared = sorted(of_origin(method.needs, "original"))
    if compared and calibration.inputs == "original":
        raise UsageError(
            f"{compared[0]} compares the inputs of the compressed model with the original's, so calibration.inputs must be pressed."
        )
    if method.tunings:
        _check_tuning(method)
    if calibration.gram == "loss":
        apart = sorted(of_origin(method.needs, "original") | of_origin(method.needs, "attention"))
        if apart:
            raise UsageError(f"{apart[0]} goes with the gram of all tokens alike, so calibration.gram must be input.")
        if "gram" not in method.needs:
            raise UsageError("nothing in this recipe needs the gram, so calibration.gram must be input.")
    if calibration.sequential:
        whole = [named.name for named in method.of("search")]
        whole += sorted(of_origin(method.needs, "attention"))
        whole += ["a shift that folds"] * method.folds_shifts
        if whole:
            raise UsageError(f"{whole[0]} sees a block as a whole, so calibration.sequential must be false.")
        if calibration.inputs == "original":
            raise UsageError(
                "calibration.sequential follows compressed weights inside a block, so calibration.inputs must be pressed."
            )
    _check_outer(method)
    _check_channels(method)
    _check_attention(method)
    if method.settings:
        _check_choice(method)
    transforms = method.of_key("transforms")
    behind = [named.name for named in transforms[1:] if named.kind == "network"]
    if behind:
        raise UsageError(
            f"{behind[0]} changes the whole network before anything is measured of it, so it goes first, and once."
        )
    first = next((at for at, named in enumerate(transforms) if named.kind == "basis"), len(transforms))
    late = [named.name for named in transforms[first:] if named.kind == "search"]
    if late:
        raise UsageError(f"{late[0]} scales the channels of the network, so it goes before any change of basis; put it first.")


def _check_channels(method: Method) -> None:
    by_channel = [named.name for named in method.of("channels")]
    if by_channel and not method.product_inputs:
        raise UsageError(f"{by_channel[0]} changes how inputs are rounded, and this recipe rounds none; add inputs.")
    if len(set(by_channel)) < len(by_channel):
        raise UsageError(f"{by_channel[0]} is named twice.")
    if len(method.of("bias")) > 1:
        raise UsageError("bias is named twice.")
    transforms = method.of_key("transforms")
    before = [named.kind for named in transforms[: next((i for i, n in enumerate(transforms) if n.name == "shift"), 0)]]
    if "search" in before or "basis" in before:
        raise UsageError("shift moves the channels that scales and changes of basis see, so it goes before them.")


def _check_choice(method: Method) -> None:
    (rule,) = method.of("choice")
    try:
        rule.part.check(len(method.settings))
    except UsageError as error:
        raise UsageError(f"choose: {rule.name}: {error}") from error
    bare = [setting for setting in method.settings if not setting.said.scales]
    if bare and not method.searches:
        raise UsageError(
            "choose: `scales: false` leaves out channel scales, and this recipe has none; add a transform such as smoothquant."
        )
    if bare and rule.part.measures == "output error":
        raise UsageError(
            f"choose: {rule.name} compares settings behind channel scales; leave out `scales`, or choose by range."
        )
    if exact := method.exact_formats():
        raise UsageError(f"choose: {exact[0]} keeps weights bit for bit, so there is nothing to choose; leave one of them out.")
    if method.options and any(setting.format is not None for setting in method.settings):
        raise UsageError("choose: a budget chooses the formats of weights too; leave them out of `among`, or leave out budget.")
    if method.tunings:
        raise UsageError(f"{method.tunings[0].name} learns formats that are known before the run; leave out choose.")


def _check_attention(method: Method) -> None:
    for kind, operands in (("attention", ("queries", "keys")), ("offset", ("probabilities",))):
        named, rounded = [part.name for part in method.of(kind)], " or ".join(operands)
        if len(named) > 1:
            raise UsageError(f"{named[0]} is named twice.")
        if named and not any(operand in method.attention for operand in operands):
            raise UsageError(f"{named[0]} serves the rounding of {rounded}, and this recipe rounds none; add {operands[-1]}.")


def _check_tuning(method: Method) -> None:
    name, calibration = method.tunings[0].name, method.recipe.calibration
    if calibration.inputs == "original":
        raise UsageError(f"{name} learns from the outputs of compressed blocks, so calibration.inputs cannot be original.")
    if exact := method.exact_formats():
        raise UsageError(f"{exact[0]} keeps weights bit for bit, and {name} would change them; leave it out.")
    if method.rounds_inputs and (other := [named for named in method.tunings if named.part.span != "block"]):
        raise UsageError(
            f"{other[0].name} learns span={other[0].part.span} by inputs as they are, and this recipe rounds them; learn blocks "
            "(span: block), or leave out one of them."
        )
    if wide := [named for named in method.tunings if named.part.moves_inputs and named.part.span != "block"]:
        raise UsageError(f"{wide[0].name} learns maps of inputs block by block (span: block), not span={wide[0].part.span}.")
    if method.of("bias"):
        raise UsageError(f"bias corrects outputs for inputs as they were before {name} learned; leave out one of them.")
    _check_spans(method)
    moving = [at for at, named in enumerate(method.tunings) if named.part.norms or named.part.moves_inputs]
    moved = next(iter(moving), len(method.tunings))
    if late := [named.name for named in method.tunings[moved:] if named.part.span == "layer"]:
        what = "maps" if method.tunings[moved].part.moves_inputs else "norms"
        raise UsageError(
            f"{late[0]} learns layers by inputs measured before {what} were learned by {method.tunings[moved].name}; put it first."
        )


SPANS = {"layer": 0, "block": 0, "windows": 1, "network": 2}


def _check_spans(method: Method) -> None:
    """Raise UsageError for spans that do not follow one another, and windows that differ."""
    for before, after in zip(method.tunings, method.tunings[1:], strict=False):
        if SPANS[before.part.span] > SPANS[after.part.span]:
            raise UsageError(
                f"{after.name} learns span={after.part.span}, which is done before span={before.part.span} of {before.name}; put it first."
            )
    windows = method.tunings_of("windows")
    shapes = [(named.part.window, named.part.overlap, named.part.ahead, named.part.joined((1.0, 2.0))) for named in windows]
    if other := [named.name for named, shape in zip(windows, shapes, strict=True) if shape != shapes[0]]:
        raise UsageError(
            f"{windows[0].name} and {other[0]} learn windows that differ; give both the same window, overlap and ahead."
        )


def _check_outer(method: Method) -> None:
    for key, own in method.outer.items():
        needs = own.quantizer.part.needs
        if own.inputs is not None and key == "embeddings":
            raise UsageError("embeddings: rows of a table are looked up, and have no input to round; leave out its inputs.")
        if own.exact_formats():
            raise UsageError(
                f"{key}: {own.format.name} is a format of the blocks; leave {key} out to keep its bits as they are."
            )
        if key == "embeddings" and needs:
            raise UsageError(
                f"embeddings: {own.quantizer.name} needs statistics of inputs, and rows of a table are looked up; use rtn or hqq, "
                "or for tied embeddings the key head."
            )
        if beyond := sorted(needs - OF_OUTPUT_HEADS):
            raise UsageError(f"{key}: {own.quantizer.name} needs {beyond[0]}, which is measured inside blocks alone; use gptq.")
        if needs and not method.needs:
            raise UsageError(
                f"{key}: {own.quantizer.name} needs calibration, and nothing else in this recipe does; use rtn for it."
            )
