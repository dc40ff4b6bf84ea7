"""Reports about a model and this machine: gathered and printed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from bitpress.arithmetic import has_fast_bf16
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.directory import safe_file
from bitpress.checkpoints.jsonfile import read_json
from bitpress.cli.request import threads_text
from bitpress.cli.screen import duration, figures_table, out, size, table
from bitpress.errors import CheckpointError, KernelUnavailable
from bitpress.figures import ratio_text
from bitpress.kernels.integers import refuses_input, told_input
from bitpress.kernels.native_layout import lay_out
from bitpress.pipeline.budget import told_formats
from bitpress.pipeline.device_memory import DeviceMemory
from bitpress.pipeline.learning_plan import Learning
from bitpress.pipeline.offer import Offer
from bitpress.pipeline.plan import Plan
from bitpress.recipes import OUTER, Method, told_budget, told_overrides, told_weights
from bitpress.report.document import TunedSpan
from bitpress.report.sentences import say_learned
from bitpress.runtime.native.assemble import refuses_directory
from bitpress.settings import usable_cores
from bitpress.transforms.table import TARGETS

__all__ = [
    "describe_directory",
    "describe_machine",
    "show_inspection",
    "show_machine",
    "show_plan",
    "show_report",
    "verify_directory",
]


# Classes of held-out tokens as people read them.
_CLASSES = {"others": "ordinary", "massive": "massive", "first": "first"}


def show_report(report: Mapping[str, Any], directory: Path) -> None:
    """Print a run's figures, its worst layers and every fallback."""
    run = report["run"]
    recipe = report["job"]["recipe"]
    parts = " + ".join(part["name"] for part in _parts_of(recipe))
    out.print(f"[bold]{directory}[/bold]  {told_weights(recipe)} by {parts}")
    figures_table(
        {**report["figures"], "bytes": report["size"]["bytes"]},
        {
            **({"budget": _told_spending(report["budget"])} if "budget" in report else {}),
            **{row["key"]: f"{row['format']} by {row['quantizer']}, {size(row['bytes'])}" for row in report.get("outer", ())},
            "original": told_original(report),
            "calibrated": f"{report['calibrated']['weights']} of {report['calibrated']['of']} weights",
            "time": f"{duration(run['seconds'])}, peak memory {size(run['peak_memory_bytes'])}, {threads_text(run['threads'])}",
            **({"device": f"{run['device']}, peak memory {size(run['peak_device_memory_bytes'])}"} if "device" in run else {}),
        },
    )
    if report.get("tuned"):  # only where something was learned
        spans = [TunedSpan.model_validate(row) for row in report["tuned"]]
        table("\nLearned by gradients", ("", ""), [tuple(text.split(": ", 1)) for text in say_learned(spans)])
    worst = sorted(report["layers"], key=lambda row: -row["error"])[:5]
    table(
        "\nLargest relative errors" + (f" of the {worst[0]['measured_on']}" if worst else ""),
        ("layer", "rounded", "compressed"),
        [(row["name"], f"{row['error_rounded']:.4g}", f"{row['error']:.4g}") for row in worst],
        right=(1, 2),
    )
    if report.get("held_out"):  # reports of before have none
        _show_token_errors(report)
    if report["fallbacks"]:
        table("\nFallbacks", ("layer", "what"), [(item["weight"], item["what"]) for item in report["fallbacks"]])
    if report.get("notes"):  # reports of before have none
        table("\nNotes", ("layer", "what"), [(item["weight"], item["what"]) for item in report["notes"]])
    reasons: dict[str, list[str]] = {}
    for item in report.get("left_behind", ()):  # older reports have none
        reasons.setdefault(item["why"], []).append(item["file"])
    if reasons:
        table("\nFiles left behind", ("file", "why"), [(escape(_few(names)), why) for why, names in reasons.items()])


def _show_token_errors(report: Mapping[str, Any]) -> None:
    """Print the layers whose ordinary tokens have the largest errors, with the errors of the other classes of held-out tokens."""
    classes = (*_CLASSES, "all")
    told = [row for row in report["layers"] if row.get("held_out")]
    worst = sorted(told, key=lambda row: -row["held_out"].get("others", row["held_out"]["all"])["error"])[:5]
    rows = [
        (row["name"], *(f"{errors[name]['error']:.4g}" if name in errors else "" for name in classes))
        for row, errors in ((row, row["held_out"]) for row in worst)
    ]
    samples = report["held_out"]["samples"]
    windows = f"{samples} held-out window{'s' * (samples != 1)}"
    columns = ("layer", *_CLASSES.values(), "all")
    table(f"\nLargest relative errors of ordinary tokens in {windows}", columns, rows, right=(1, 2, 3, 4))
    far = report["held_out"]["weights_far"]
    counted = ", ".join(f"{of} tokens in {far[name]}" for name, of in _CLASSES.items() if far[name])
    if counted:
        out.print(
            f"[dim]Errors above {report['held_out']['far_above']:g} times that of all tokens: {counted} of {len(told)} weights.[/dim]"
        )


def _parts_of(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of a resolved recipe in the order in which they act; recipes of before have no tuning."""
    return [*recipe["transforms"], recipe["quantizer"], *recipe["corrections"], *recipe.get("tuning", ())]


def _told_spending(budget: Mapping[str, Any]) -> str:
    """Return what a budget asked for and what was spent: "3.300 bits asked, 3.297 spent: 12 weights int2-g64-zero, ..."."""
    return f"{budget['bits_asked']:.3f} bits asked, {budget['bits_spent']:.3f} spent: {told_formats(budget['weights'])}"


def told_outer(own: Mapping[str, Any] | str) -> str:
    """Name the format and the quantizer of embeddings or of a head in a resolved recipe."""
    if isinstance(own, str):
        return own
    inputs = own.get("inputs")  # recipes of before have no such key
    rounded = "" if inputs is None else f", inputs {inputs['format']} {inputs['parameters']} (simulated)"
    return f"{own['weights']} by {own['quantizer']['name']}{rounded}"


def told_original(report: Mapping[str, Any]) -> str:
    """Return the size of the original as the user has it, beside what was published, and its kind."""
    sizes, given = report["size"], report.get("given")
    told = f"{size(sizes['bytes_original'])}, {ratio_text(sizes['ratio'])}"
    return told if given is None else f"{told}; {given['text']} ({size(sizes['bytes_converted'])} in 16 bits)"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _told_learning(learning: Learning) -> str:
    windows = "a window a step" if learning.batch == 1 else f"{learning.batch} windows a step"
    batches = f", {windows}" if learning.batch else ""
    return f"up to {size(learning.peak)} ({learning.name}{batches})"


def _told_rotations(plan: Plan) -> str:
    """Return what rotations of queries and keys cost: "4,608 operations a token, 0.15 % of those of its products"."""
    products = 2 * sum(w.weights for w in plan.weights)  # of experts all are counted
    return (
        f"{plan.rotation_operations:,} operations a token, {plan.rotation_operations / products:.2%} of those of the products"
    )


def plan_values(plan: Plan, method: Method, seconds: float | None, on_device: DeviceMemory | None) -> dict[str, Any]:
    """Return a plan as JSON, with what was estimated beside it."""
    estimates = {"seconds_estimate": seconds, "device_memory_bytes_estimate": on_device and on_device.as_dict()}
    return {**plan.as_dict(), **estimates, "recipe": method.resolved()}


def show_plan(
    plan: Plan, method: Method, seconds: float | None, on_device: DeviceMemory | None = None, *, whole: bool = False
) -> None:
    """Print the plan of a method: a line for every kind of weight, or with `whole` for every weight. A GPU has memory, and no estimate of seconds."""
    if whole:
        rows = [*plan.rows(), *(found.planned.row() for found in plan.outer)]
        lines = [(str(r["name"]), "x".join(map(str, r["shape"])), *_in_format(r)) for r in rows]
        table("", ("weight", "shape", "format", "size", "bits"), lines, right=(3, 4))
        if plan.kept:
            table("\nKept as stored", ("parameter", "why"), list(plan.kept.items()))
    else:
        kinds = [(k["kind"], str(k["count"]), "x".join(map(str, k["shape"])), *_in_format(k)) for k in plan.kinds()]
        table("", ("weights", "count", "shape", "format", "size", "bits"), kinds, right=(1, 4, 5))
        out.print("[dim]--all lists every weight by its name.[/dim]")
    if plan.offer is not None:
        _show_offer(plan.offer)
    maps = bool(method.every_change) or any(w.method.quantizer.part.keeps_map for w in plan.weights)
    maps = maps or any(named.part.adds_maps for named in method.tunings)
    reasons = [(why, str(e["parameters"]), size(e["bytes"])) for why, e in plan.kept_by_reason.items()]
    table("\nKept as stored, by the reason", ("why", "parameters", "size"), reasons, right=(1, 2))
    totals = {
        "method": " + ".join(named.name for named in method.parts),
        **_told_choice(plan, method),
        "compressed weights": f"{size(plan.compressed_bytes)}, {plan.bits_per_weight:.4f} bits a weight{', maps not counted' * maps}",
        **({} if not plan.outer else {"embeddings, head": size(plan.outer_bytes)}),
        "kept as stored": size(plan.kept_bytes),
        "size": f"about {size(plan.published_bytes)}",
        "original": f"{size(plan.given_bytes)}, {ratio_text(plan.given_bytes / plan.published_bytes)}",
        **({} if plan.given is None else {"given as": f"{plan.given.text} ({size(plan.source_bytes)} in 16 bits)"}),
        **({} if not plan.rotation_operations else {"rotations of queries, keys": _told_rotations(plan)}),
        "disk needed": size(plan.disk),
        "peak memory, estimated": size(plan.peak_memory),
        **({} if plan.learning is None else {"of it, learning": _told_learning(plan.learning)}),
        **({} if on_device is None else {"GPU memory, estimated": size(on_device.total)}),
    }
    if seconds is not None:
        idle = f"on an idle machine ({threads_text(torch.get_num_threads())}), without the proof"
        totals["time, estimated"] = f"{duration(seconds)} {idle}"
    table("\nIn all", ("", ""), list(totals.items()))


def _told_choice(plan: Plan, method: Method) -> dict[str, str]:
    """Say what layers choose among, as a line of a plan's totals."""
    free = [w for w in plan.weights if w.method.settings and not w.parameter.experts]
    if not free:
        return {}
    among = " | ".join(setting.name for setting in method.settings)
    return {"chosen in the run": f"by {method.of('choice')[0].name}, for {len(free)} of {len(plan.weights)} weights: {among}"}


def _in_format(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return format, size and bits of a row of a plan."""
    if row["format"] is None:
        return "chosen in the run", "", ""
    return row["format"], size(row["bytes"]), f"{row['bits_per_weight']:.3f}"


def _show_offer(offer: Offer) -> None:
    """Print the formats among which a budget chooses, and what they would take."""
    rows = [(name, size(nbytes), f"{bits:.3f}") for name, (nbytes, bits) in offer.by_format().items()]
    title = f"\n{len(offer.free)} weights in one of these formats"
    table(title, ("format", "size, if all have it", "bits"), rows, right=(1, 2))
    out.print(
        f"A budget of {offer.bits:g} bits a weight, over all weights of the blocks: the run measures what each format of each weight "
        "costs the loss, and chooses then."
    )


def _attention_of(checkpoint: CompressedCheckpoint) -> dict[str, int]:
    """Count the modules that round an operand of their attention, by what that is."""
    told = [f"{text} (simulated)" for own in checkpoint.load_attention().values() for text in own.told()]
    return {text: told.count(text) for text in dict.fromkeys(told)}


def describe_directory(directory: Path) -> dict[str, Any]:
    """Describe a published model by its manifest and headers (hashes are not checked again)."""
    checkpoint = CompressedCheckpoint.open(directory, verify=False)
    formats: dict[str, dict[str, int]] = {}
    in_memory: dict[str, dict[tuple[int, int], tuple[str, int]]] = {}
    rounds = any(record.input is not None for record in checkpoint.manifest.weights.values())
    is_native = rounds and refuses_directory(checkpoint) is None
    for name, record in checkpoint.manifest.weights.items():
        kinds = " + ".join(str(term.get("format", term["kind"])) for term in record.spec["terms"])
        maps = [key for key in ("input_map", "output_map") if record.spec[key] is not None]
        inputs = [] if record.input is None else [told_input(record.spec, record.input, native=is_native)]
        kind, shape = " with ".join([kinds, *maps, *inputs]), (record.spec["shape"][0], record.spec["shape"][1])
        entry = formats.setdefault(kind, {"weights": 0, "parameters": 0, "bytes": 0})
        entry["weights"] += 1
        entry["parameters"] += record.spec["shape"][0] * record.spec["shape"][1]
        nbytes = sum(checkpoint.tensors[n][1].nbytes for n in checkpoint.stored[name])
        entry["bytes"] += nbytes
        first, before = in_memory.setdefault(kind, {}).get(shape, (name, 0))
        in_memory[kind][shape] = first, before + nbytes
    plain: dict[str, int] = {}
    for tensor in checkpoint.plain.values():
        plain[tensor.dtype] = plain.get(tensor.dtype, 0) + tensor.nbytes
    return {
        "directory": str(directory),
        "model_type": checkpoint.config["model_type"],
        "bytes": checkpoint.nbytes,
        "bits_per_weight": checkpoint.bits_per_weight,
        "formats": {
            kind: entry | _memory_bits(checkpoint, in_memory[kind], entry["parameters"]) for kind, entry in formats.items()
        },
        "attention": _attention_of(checkpoint),
        "plain_bytes": plain,
        "aliases": checkpoint.manifest.aliases,
        "recipe": checkpoint.manifest.recipe,
        "job": checkpoint.manifest.job,
        "proof": _proof_of(directory),
    }


def _memory_bits(
    checkpoint: CompressedCheckpoint, shapes: Mapping[tuple[int, int], tuple[str, int]], parameters: int
) -> dict[str, float | None]:
    """Return the bits a weight that the native engine's products read. One weight of every shape is laid out and stands for the others.

    The figure is None without the native library.
    """
    total = 0.0
    try:
        for name, stored in shapes.values():
            layer = checkpoint.read_layer(name)
            spec = layer.input_spec()
            inputs = layer.input if spec is not None and refuses_input(spec, layer.weight.spec()) is None else None
            total += lay_out(layer.weight, inputs=inputs).nbytes * stored / layer.weight.nbytes
    except KernelUnavailable:
        return {"bits_in_memory": None}
    return {"bits_in_memory": total * 8 / parameters}


def _proof_of(directory: Path) -> dict[str, Any] | None:
    """Return the distance from the original in the report; None without a report or an evaluation in it."""
    try:
        report = read_json(safe_file(directory, "report.json"))
    except CheckpointError:
        return None
    figures = report.get("figures") if isinstance(report, dict) else None
    return figures if isinstance(figures, dict) and "kl_mean" in figures else None


def show_inspection(facts: Mapping[str, Any]) -> None:
    out.print(f"[bold]{facts['directory']}[/bold]  {facts['model_type']}, {size(facts['bytes'])}")
    rows = [
        (
            name,
            str(e["weights"]),
            f"{e['parameters']:,}",
            size(e["bytes"]),
            f"{e['bytes'] * 8 / e['parameters']:.4f}",
            "" if e["bits_in_memory"] is None else f"{e['bits_in_memory']:.2f}",
        )
        for name, e in facts["formats"].items()
    ]
    rows += [(f"attention, {text}", str(count), "", "", "", "") for text, count in facts["attention"].items()]
    rows += [(f"{dtype}, as stored", "", "", size(count), "", "") for dtype, count in facts["plain_bytes"].items()]
    table("", ("format", "weights", "parameters", "size", "bits", "in native memory"), rows, right=(1, 2, 3, 4, 5))
    table("\nRecipe", ("", ""), [(what, escape(text)) for what, text in _recipe_lines(facts["recipe"])])
    proof = facts["proof"]
    if proof is None:
        out.print(
            "\nNo proof: it was left out, or report.json is gone. `bitpress eval DIR --against MODEL` measures the distance."
        )
    else:
        out.print("\n[bold]Proof[/bold]")
        figures_table({key: value for key, value in proof.items() if key not in ("bits_per_weight", "bytes")}, {})
    versions = facts["job"].get("versions", {}) if isinstance(facts["job"], dict) else {}
    if versions:
        out.print("\nQuantized with " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    for alias, original in facts["aliases"].items():
        out.print(f"{alias} is tied to {original}: one tensor for both.")


def _recipe_lines(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a line for every part of a resolved recipe, with its settings."""

    def part(of: Mapping[str, Any]) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in of.items() if key != "name")
        return f"{of['name']} ({settings})" if settings else str(of["name"])

    if "imported" in recipe:
        return [("quantized by", f"another tool, whose {recipe['imported']} layers were taken over")]
    lines = [("weights", told_budget(recipe) or str(recipe["weights"]))]
    lines += [("target" if t["name"] in TARGETS else "transform", part(t)) for t in recipe["transforms"]]
    lines += [("quantizer", part(recipe["quantizer"]))]
    lines += [("correction", part(c)) for c in recipe["corrections"]]
    lines += [("learned", part(t)) for t in recipe.get("tuning", ())]
    lines += [("override", text) for text in told_overrides(recipe)]
    lines += [(key, told_outer(recipe[key])) for key in OUTER if key in recipe]
    lines += [("skip", " ".join(recipe["skip"]))] * bool(recipe["skip"])
    lines += [("calibration", ", ".join(f"{key}={value}" for key, value in recipe["calibration"].items()))]
    rest = ("min_expert_tokens", "batch", "compute")
    return [*lines, ("run", ", ".join(f"{key}={recipe[key]}" for key in rest if key in recipe))]


def describe_machine() -> dict[str, Any]:
    """Describe what the speed on this machine depends on."""
    from bitpress import native
    from bitpress.kernels import KERNELS

    library: dict[str, Any] = {"native": "there", "code_paths": list(native.code_paths()), "code_path": None}
    try:
        library["code_path"] = native.chosen_path()
    except KernelUnavailable as error:
        library["native"] = str(error)
    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores_usable": usable_cores(),
        **library,
        "threads": torch.get_num_threads(),
        "bf16_products": has_fast_bf16(),
        "kernels": list(KERNELS),
        "cuda": torch.cuda.is_available(),
        "torch": torch.__version__,
    }


def show_machine(facts: Mapping[str, Any]) -> None:
    def shown(value: Any) -> str:
        return (", ".join(value) or "none") if isinstance(value, list) else "none" if value is None else str(value)

    table("", ("", ""), [(key.replace("_", " "), shown(value)) for key, value in facts.items()])


def verify_directory(directory: Path) -> dict[str, Any]:
    """Check a directory down to the content of every weight. Raises CheckpointError."""
    from bitpress.models.skeleton import build_config, build_skeleton

    checkpoint = CompressedCheckpoint.open(directory)
    config = build_config(checkpoint.config)
    checkpoint.check_fits(build_skeleton(config, torch.float32).state_dict())
    for name in checkpoint.manifest.weights:
        checkpoint.read_weight(name)
    files = checkpoint.manifest.files.values()
    return {
        "directory": str(directory),
        "files": len(files),
        "bytes": sum(f.bytes for f in files),
        "weights": len(checkpoint.stored),
    }
