"""The figures of `bitpress bench` on the screen."""

from collections.abc import Mapping
from typing import Any

from bitpress.cli.screen import out, size, table

__all__ = ["show_speed"]

ACTIVATIONS = {"int8": "8 bits", "mixed": "8 bits, prompts in float", "none": "float"}


def show_speed(facts: Mapping[str, Any]) -> None:
    """Print the figures beside the speed of the machine."""
    rates = facts["tokens_per_second"]
    behind = f" behind {facts['context']:,}" if facts["context"] else ""
    expanded = ", ".join(facts["expanded"])
    share = f"{100 * facts['share']:.0f} % of "
    if facts["what"] == "decode":
        speed = [
            ("bytes a token", f"{size(facts['bytes_per_token'])}, weights and cache"),
            ("read", f"{facts['gigabytes_per_second']:.1f} GB/s"),
            ("memory", f"{share}{facts['machine_gigabytes_per_second']:.1f} GB/s that {facts['threads']} threads read"),
        ]
    else:
        speed = [
            ("products", f"{facts['teraoperations_per_second']:.2f} TOPS in the blocks' linear layers"),
            ("processor", f"{share}{facts['machine_teraoperations_per_second']:.2f} TOPS on registers"),
        ]
    apart = f", {facts['apart']:.1%} of the prompt in float" if facts.get("apart") else ""
    rows = [
        ("tokens", f"{facts['tokens']:,}{behind}, {facts['repeats']} times"),
        ("tokens/s", f"{rates['median']:.1f} (p10 {rates['p10']:.1f}, p90 {rates['p90']:.1f})"),
        *speed,
        ("code path", f"{facts['path']}, {facts['threads']} threads"),
        (
            "weights",
            f"{facts['bits_in_memory']:.2f} bits in memory, {facts['bits_stored']:.2f} stored, in the blocks' linear layers",
        ),
        ("activations", ", ".join(facts["inputs"]) or f"{ACTIVATIONS[facts['activations']]}{apart}"),
        ("cache", facts["cache"]),
        ("head", facts["head"]),
        *([("expanded to 16 bits", expanded)] if expanded else []),
        ("load", f"{facts['load_seconds']:.1f} s"),
        ("memory at most", size(facts["peak_memory_bytes"])),
        ("weight files", size(facts["file_bytes"])),
    ]
    out.print(f"[bold]{facts['what']}[/bold]  {facts['directory']}")
    table("", ("", ""), rows)
