"""Hostile arguments to the engine's raw entry points: refused with one line, memory untouched, and the object as good as before.

`make attack` runs all of this, and the laws of the products, once more in a library built with AddressSanitizer and
UndefinedBehaviorSanitizer, which ends the process at the first byte that is read or written outside of its array.
"""

import copy
import faulthandler
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from bitpress import native
from bitpress.runtime.native.options import CacheType

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

PATHS: list[str] = native.library().paths() if native.available() else []
ROWS, COLUMNS, GROUP = 21, 40, 10
GROUPS = COLUMNS // GROUP
WATCHED = "libasan" in os.environ.get("LD_PRELOAD", "")
BIG = (2**31 - 1, 2**31, 2**63 - 1, 2**64, -(2**63) - 1, 10**30)


def f32(*shape: int, value: float = 1.0) -> np.ndarray:
    return np.full(shape, value, np.float32)


def u8(*shape: int, value: int = 0) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def u16(*shape: int, value: int = 0x3C00) -> np.ndarray:
    return np.full(shape, value, np.uint16)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def spread(array: np.ndarray) -> np.ndarray:
    """Return the same values with a gap between any two."""
    wide = np.zeros((*array.shape[:-1], array.shape[-1] * 2), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def variants(array: np.ndarray) -> dict[str, Any]:
    """Return values that are no array of this type and shape, to stand in its place."""
    other = np.float64 if array.dtype == np.float32 else np.int64 if array.dtype != np.int64 else np.int32
    longer = np.concatenate([array, array])
    wrong = {
        "longer": longer,
        "shorter": array[:-1].copy(),
        "empty": array[:0].copy(),
        "another type": array.astype(other),
        "signed" if array.dtype.kind == "u" else "complex": array.astype(np.int8 if array.dtype.kind == "u" else np.complex64),
        "big-endian": array.astype(array.dtype.newbyteorder(">")) if array.dtype.itemsize > 1 else array.astype(bool),
        "every other": spread(array),
        "backwards": array[..., ::-1],
        "one more dimension": array[None],
        "no dimension": array.reshape(-1)[0],
        "a list": array.tolist(),
        "bytes": array.tobytes(),
        "None": None,
        "a number": 1.5,
        "text": "0",
        "objects": array.astype(object),
    }
    if array.ndim == 2:
        wrong |= {"flat": array.reshape(-1), "turned": np.asfortranarray(array), "wider": np.concatenate([array, array], 1)}
        wrong |= {"narrower": np.ascontiguousarray(array[:, :-1])}
    return wrong


def numbers(allowed: str) -> dict[str, Any]:
    """Return values that are no whole number, to stand in its place."""
    return {"None": None, "text": "1", "a fraction": 1.5, "a list": [1], **{f"{n}": n for n in BIG if allowed != "any"}}


REFUSED = (ValueError, TypeError)


def outcomes(works: dict[str, Callable[[], Any]], seconds: int = 60) -> dict[str, str]:
    """Run one after another in a forked child and say how each went: "done", "refused: ..." or what else happened.

    A crash ends only the child; another one goes on behind the work that crashed. Where AddressSanitizer watches nothing is forked:
    its allocator may hold a lock that no thread of the child would ever give back, and what it says is to end the run.
    """
    if WATCHED:
        return {name: describe(work) for name, work in works.items()}
    said: dict[str, str] = {}
    while len(said) < len(works):
        left = list(works)[len(said) :]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            for name in left:
                signal.alarm(600)
                signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time: a machine may be busy, a wait here spins
                os.write(writer, (json.dumps(describe(works[name])) + "\n").encode())
            os._exit(0)
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            lines = pipe.read().splitlines()
        status = os.waitpid(child, 0)[1]
        said |= dict(zip(left, map(json.loads, lines), strict=False))
        if status:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
            said[left[len(lines)]] = f"ended by {how}"
    return said


def describe(work: Callable[[], Any]) -> str:
    try:
        work()
    except REFUSED as error:
        return f"refused: {error}"
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "done"


def outcome(work: Callable[[], Any], seconds: int = 60) -> str:
    return outcomes({"": work}, seconds)[""]


# ---- valid calls, to be changed one argument at a time ----


def codes_arguments() -> dict[str, Any]:
    return {
        "codes": u8(ROWS, COLUMNS, value=15),
        "bits": 4,
        "group": GROUP,
        "kind": "fp16",
        "scales": u16(ROWS, GROUPS).view(np.uint8),
        "gain": 1.0,
        "zeros": u8(ROWS, GROUPS, value=8),
        "zero": 0,
        "table": None,
        "levels": None,
        "threads": 1,
    }


def table_arguments() -> dict[str, Any]:
    return {**codes_arguments(), "zeros": None, "table": u8(16, value=129), "levels": f32(16)}


def meaning_arguments(kind: str) -> dict[str, Any]:
    """Return codes of a kind that is described by a dictionary."""
    rng = np.random.default_rng(8)
    made = {**codes_arguments(), "zeros": None, "bits": 3, "codes": rng.integers(0, 8, (ROWS, COLUMNS), np.uint8)}
    if kind == "levels":
        which = rng.integers(0, 3, ROWS * GROUPS, np.uint8)
        return made | {"meaning": {"kind": kind, "span": 1, "tables": 3, "levels": f32(24), "which": which}}
    if kind == "own":
        return made | {"meaning": {"kind": kind, "span": 1, "own": u16(ROWS * GROUPS * 8)}}
    if kind == "halves":
        return made | {"zeros": u8(ROWS, GROUPS, value=3), "meaning": {"kind": kind, "span": 1}}
    if kind == "words":
        codes = rng.integers(0, 1 << 12, (ROWS, COLUMNS // 4), np.uint16).view(np.uint8)
        words = {"kind": kind, "span": 4, "books": 2, "word_bits": 6, "words": f32(2 * 64 * 4)}
        return made | {"bits": 12, "group": 20, "scales": u16(ROWS, 2).view(np.uint8), "codes": codes, "meaning": words}
    if kind == "trellis":
        path = np.array([14, 2, 2, 47143, 1549, -4328, 20308, -32138, 17408], np.int32)
        codes = rng.integers(0, 4, (ROWS, COLUMNS), np.uint8)
        return made | {"bits": 2, "codes": codes, "meaning": {"kind": kind, "span": 1, "path": path}}
    if kind == "pairs":
        codes, which = rng.integers(0, 16, (ROWS, COLUMNS), np.uint8), rng.integers(0, 3, ROWS * GROUPS, np.uint8)
        levels = {"kind": kind, "span": 1, "tables": 3, "levels": f32(3 * 2 * 16), "which": which}
        return made | {"bits": 4, "codes": codes, "meaning": levels}
    if kind == "pyramid":
        codes = rng.integers(0, 1 << 9, (ROWS, COLUMNS // 4), np.uint16).view(np.uint8)
        point = {"kind": kind, "span": 4, "pulses": 5}
        return made | {"bits": 10, "group": 20, "scales": u16(ROWS, 2).view(np.uint8), "codes": codes, "meaning": point}
    assert kind == "e8p"
    codes = rng.integers(0, 1 << 16, (ROWS, COLUMNS // 8), np.uint16).view(np.uint8)
    points = {"kind": kind, "span": 8, "points": u8(2048, value=2)}
    return made | {"bits": 16, "group": COLUMNS, "scales": u16(ROWS, 1).view(np.uint8), "codes": codes, "meaning": points}


KINDS = ("levels", "own", "halves", "words", "e8p", "trellis", "pairs", "pyramid")


def packed_arguments(packing: str) -> dict[str, Any]:
    """Return codes of some columns, packed in another way than as planes."""
    rng, picked = np.random.default_rng(9), np.arange(1, COLUMNS, 2, dtype=np.int32)
    count = len(picked)
    made = {**codes_arguments(), "picked": picked, "packing": packing, "zeros": None, "bits": 2, "group": count}
    made["scales"] = u16(ROWS, 1).view(np.uint8)
    if packing == "trits":
        return made | {"codes": rng.integers(0, 3, (ROWS, count), np.uint8)}
    codes = rng.integers(0, 4, (ROWS, count), np.uint8)
    codes[::2] &= 1
    path = np.array([14, 1, 2, 37613, 1459, -3656, 19268, -32284, 18057], np.int32)
    return made | {"codes": codes, "meaning": {"kind": "trellis", "span": 1, "path": path}}


PACKINGS = ("trits", "uneven")


def shared_arguments(kind: str) -> dict[str, Any]:
    """Return codes whose scales share values."""
    made = {**codes_arguments(), "kind": kind, "scales": u8(ROWS, GROUPS, value=7)}
    if kind == "dq":
        return made | {"shared": {"levels": f32(256), "factors": f32(1), "offset": 0.5, "planes": 2, "plane": 1}}
    if kind.startswith("run"):
        factors = u16(ROWS * 2, value=0x2C00)  # 8 scales of a row, and of both planes, in runs of 4
        return made | {"shared": {"factors": factors, "run": 4, "offset": -4.0, "planes": 2, "plane": 1}}
    return made | {"shared": {"rows": f32(ROWS)}}


SHARED = ("s4", "s6", "s8", "p2row", "dq", "run4", "run6", "run8")


def less_arguments(name: str) -> dict[str, Any]:
    """Return codes from which, or from whose weights, something is taken away that is kept as scales are."""
    shared = shared_arguments("run6" if name == "weights" else "s4")
    less = {
        "of_codes": name == "codes",
        "gain": 0.5,
        "values": shared["scales"],
        "kind": shared["kind"],
        "shared": shared["shared"],
    }
    return {**codes_arguments(), "zeros": None, "less": less}


LESS = ("weights", "codes")


def dense_arguments() -> dict[str, Any]:
    return {"values": u16(ROWS, COLUMNS), "half": True, "gain": f32(ROWS), "threads": 1}


def low_rank_arguments() -> dict[str, Any]:
    return {"down": u16(3, COLUMNS), "up": u16(ROWS, 3), "half": True, "threads": 1}


def sparse_arguments() -> dict[str, Any]:
    starts = np.zeros(ROWS + 1, np.int64)
    starts[5:] = 2
    return {"starts": starts, "columns": i32(0, COLUMNS - 1), "values": f32(2)}


def map_steps(columns: int = COLUMNS) -> list[dict[str, Any]]:
    """One step of every kind; 10 divides the columns."""
    rng = np.random.default_rng(9)

    def draw(n: int) -> np.ndarray:
        return rng.standard_normal(n).astype(np.float32)

    return [
        {"kind": "gather", "order": rng.permutation(columns).astype(np.int32)},
        {"kind": "scale", "values": draw(columns)},
        {"kind": "mix", "block": 10, "across": 5, "left": draw(25)},
        {"kind": "mix", "block": 10, "across": 5, "left": draw(25), "right": draw(4)},
        {"kind": "mix", "block": 2, "across": 1},
        {"kind": "mix", "block": columns, "across": 1, "right": draw(columns * columns)},
    ]


def changed_step(index: int, **values: Any) -> dict[str, Any]:
    """Return arguments of a map one step of which is another; a value of None leaves the key out."""
    steps = map_steps()
    steps[index] = {key: value for key, value in {**steps[index], **values}.items() if value is not None}
    return {"steps": steps}


def map_attacks() -> list[tuple[str, dict[str, Any]]]:
    attacks: list[tuple[str, dict[str, Any]]] = []
    for index, step in enumerate(map_steps()):
        for key, value in step.items():
            wrong: dict[str, Any] = {repr(n): n for n in ("1", 1.5, 0, -1, 3, [1], *BIG)}
            if isinstance(value, np.ndarray):
                wrong = {k: v for k, v in variants(value).items() if v is not None}
                sick = value.copy()
                sick[-1] = COLUMNS if key == "order" else np.nan
                wrong["a value that is out of range"] = sick
            attacks += [(f"step {index}, {key}: {name}", changed_step(index, **{key: other})) for name, other in wrong.items()]
            if key != "right":
                attacks.append((f"step {index}, no {key}", changed_step(index, **{key: None})))
    attacks += [
        ("no list", {"steps": 1}),
        ("a tuple of lists", {"steps": [[1, 2]]}),
        ("too many steps", {"steps": map_steps() * 11}),
    ]
    attacks.append(("a rest that is no power of two", changed_step(2, across=2, left=f32(4))))
    return attacks


LINEAR: dict[str, Callable[[], dict[str, Any]]] = {
    "add_codes": codes_arguments,
    "add_dense": dense_arguments,
    "set_low_rank": low_rank_arguments,
    "set_sparse": sparse_arguments,
    "set_bias": lambda: {"bias": f32(ROWS)},
    "set_map": lambda: {"steps": map_steps()},
    "set_out_map": lambda: {"steps": [{"kind": "scale", "values": f32(ROWS)}]},
    "row": lambda: {"row": 0, "to": f32(COLUMNS)},
}


def changed_starts(index: int, value: int) -> np.ndarray:
    starts = sparse_arguments()["starts"]
    starts[index] = value
    return starts


def dictionary_attacks() -> list[tuple[str, dict[str, Any]]]:
    """Every entry of every dictionary of `add_codes`, left out and replaced by everything that it is not."""
    attacks: list[tuple[str, dict[str, Any]]] = []
    cases = [(kind, "meaning", meaning_arguments(kind)) for kind in KINDS]
    cases += [
        *((k, "shared", shared_arguments(k)) for k in SHARED),
        *((f"less of {k}", "less", less_arguments(k)) for k in LESS),
    ]
    for kind, argument, good in cases:
        for key, value in good[argument].items():
            wrong: dict[str, Any] = {repr(n): n for n in (None, "1", [1], *BIG)}
            if isinstance(value, np.ndarray):
                wrong = variants(value)
                if value.dtype == np.uint8:
                    del wrong["bytes"]  # these are bytes
                if len(value) == 1:
                    del wrong["every other"], wrong["backwards"]  # a single value is the same
            elif key in ("offset", "gain"):
                wrong = {repr(n): n for n in (None, "1", [1], 10**40, np.nan)}
            else:
                wrong |= {repr(n): n for n in (1.5, -1, 33, *([0] if key != "plane" else []))}
            attacks += [
                (f"{kind}.{key}: {name}", {**good, argument: {**good[argument], key: other}}) for name, other in wrong.items()
            ]
            attacks.append((f"{kind}: no {key}", {**good, argument: {k: v for k, v in good[argument].items() if k != key}}))
    which = meaning_arguments("levels")["meaning"]["which"].copy()
    which[5] = 3
    levels = meaning_arguments("levels")
    attacks.append(("a table that is not there", {**levels, "meaning": {**levels["meaning"], "which": which}}))
    attacks.append(("zero points beside levels", {**levels, "zeros": u8(ROWS, GROUPS)}))
    words = meaning_arguments("words")
    attacks.append(("a code beyond the words", {**words, "codes": u16(ROWS, COLUMNS // 4, value=1 << 12).view(np.uint8)}))
    attacks.append(("codes of 25 bits", {**words, "bits": 25}))
    less = less_arguments("codes")["less"]
    runs = shared_arguments("run6")
    attacks.append(("a run of 3", {**runs, "shared": {**runs["shared"], "run": 3, "factors": u16(ROWS * 3)}}))
    attacks.append(("a minimum beside levels", {**levels, "less": less}))
    attacks.append(("a minimum beside a table", {**table_arguments(), "less": less}))
    attacks.append(("a minimum of trits", {**packed_arguments("trits"), "less": {**less, "values": u8(ROWS, 1)}}))
    attacks.append(
        ("a minimum of 5 bits in 4", {**less_arguments("codes"), "less": {**less, "values": u8(ROWS, GROUPS, value=16)}})
    )
    attacks.append(("a scale's code of 5 bits", {**shared_arguments("s4"), "scales": u8(ROWS, GROUPS, value=16)}))
    return attacks


def picked_attacks() -> list[tuple[str, Any]]:
    """Columns that are not as many as the codes', or not those of the layer, rising."""
    good = packed_arguments("trits")["picked"]
    behind, before, twice = good.copy(), good.copy(), good.copy()
    behind[-1], before[0], twice[3] = COLUMNS, -1, twice[2]
    return [
        *((name, other) for name, other in variants(good).items() if name != "None"),
        ("none given", None),
        ("behind the last", behind),
        ("before the first", before),
        ("one twice", twice),
        ("far", np.full_like(good, 2**31 - 1)),
    ]


def linear_attacks() -> list[Any]:
    """Every argument of every method of Linear, replaced by everything that it is not."""
    attacks = []
    for method, arguments in LINEAR.items():
        for name, good in arguments().items():
            if isinstance(good, np.ndarray):
                wrong = variants(good)
                if name in ("zeros", "gain"):
                    del wrong["None"]
                if method == "set_low_rank" and name == "down":
                    wrong["rank 0"] = u16(0, COLUMNS)
            elif name in ("bits", "group", "zero", "threads", "row"):
                wrong = {**numbers(name), "-1": -1}
            else:
                wrong = {}
            attacks += [pytest.param(method, {name: value}, id=f"{method}: {name}, {kind}") for kind, value in wrong.items()]
    special: list[tuple[str, dict[str, Any], str]] = [
        ("add_codes", {"bits": 0}, "no bits"),
        ("add_codes", {"bits": 9}, "nine bits"),
        ("add_codes", {"bits": 3}, "codes beyond their bits"),
        ("add_codes", {"codes": u8(ROWS, COLUMNS, value=16)}, "code 16 of 4 bits"),
        ("add_codes", {"codes": u8(ROWS, COLUMNS, value=255)}, "code 255 of 4 bits"),
        ("add_codes", {"zeros": u8(ROWS, GROUPS, value=16)}, "zero point beyond the codes"),
        ("add_codes", {"group": 0}, "group of none"),
        ("add_codes", {"group": COLUMNS + 1}, "group beyond the row"),
        ("add_codes", {"group": GROUP + 4}, "group that scales are not for"),
        ("add_codes", {"kind": "fp64"}, "scales of another kind"),
        ("add_codes", {"kind": "fp32"}, "scales of another size"),
        ("add_codes", {"kind": ""}, "scales of no kind"),
        ("add_codes", {"kind": None}, "scales of None"),
        ("add_codes", {"zero": 256}, "zero 256"),
        ("add_codes", {"gain": np.nan}, "gain not a number"),
        ("add_codes", {"gain": np.inf}, "gain infinite"),
        ("add_codes", {"gain": 1e39}, "gain beyond float32"),
        ("add_codes", {"table": u8(16)}, "table without levels"),
        ("add_codes", {"levels": f32(16)}, "levels without table"),
        ("add_codes", {"table": u8(16), "levels": f32(16)}, "table with zero points"),
        ("add_codes", {"zeros": None, "table": u8(15), "levels": f32(16)}, "table of 15"),
        ("add_codes", {"zeros": None, "table": u8(16), "levels": f32(17)}, "17 levels"),
        ("add_codes", {"zeros": None, "bits": 5, "table": u8(16), "levels": f32(16)}, "table for 5 bits"),
        ("add_codes", {"threads": 0}, "no threads"),
        ("add_codes", {"tall": 0}, "blocks of no rows"),
        ("add_codes", {"tall": 2}, "blocks that do not divide the rows"),
        ("add_codes", {"tall": ROWS}, "blocks that scales are not for"),
        ("add_codes", {"step": np.nan}, "step not a number"),
        ("add_codes", {"shared": {}}, "shared values of plain scales"),
        ("add_codes", {"meaning": {}}, "a meaning without a kind"),
        ("add_codes", {"meaning": 1}, "a meaning that is a number"),
        ("add_codes", {"packing": "bytes"}, "a packing that there is not"),
        ("add_codes", {"packing": None}, "a packing of None"),
        ("add_codes", {"packing": "uneven"}, "an uneven packing of whole numbers"),
        ("add_codes", {"packing": "trits"}, "trits of 4 bits"),
        ("add_codes", {**packed_arguments("trits"), "codes": u8(ROWS, COLUMNS // 2, value=3)}, "a trit of 3"),
        (
            "add_codes",
            {**packed_arguments("uneven"), "codes": u8(ROWS, COLUMNS // 2, value=2)},
            "an even row of an odd one's bits",
        ),
        *(("add_codes", {**packed_arguments("trits"), "picked": at}, f"picked: {what}") for what, at in picked_attacks()),
        ("set_out_map", {"steps": map_steps()}, "a map of the columns"),
        *(("add_codes", change, what) for what, change in dictionary_attacks()),
        ("add_codes", {"threads": 1025}, "too many threads"),
        ("add_dense", {"threads": 0}, "no threads"),
        ("add_dense", {"half": None}, "half None"),
        ("add_dense", {"half": "yes"}, "half text"),
        ("set_low_rank", {"up": u16(ROWS, 4)}, "ranks that differ"),
        ("set_low_rank", {"down": u16(0, COLUMNS), "up": u16(ROWS, 0)}, "rank 0"),
        ("set_low_rank", {"threads": -5}, "threads"),
        ("set_sparse", {"starts": changed_starts(0, 1)}, "begins at 1"),
        ("set_sparse", {"starts": changed_starts(0, -1)}, "begins before"),
        ("set_sparse", {"starts": changed_starts(ROWS, 3)}, "ends behind"),
        ("set_sparse", {"starts": changed_starts(ROWS, 1)}, "ends early"),
        ("set_sparse", {"starts": changed_starts(7, -(2**62))}, "falls far"),
        ("set_sparse", {"starts": changed_starts(7, 2**62)}, "rises far"),
        ("set_sparse", {"starts": changed_starts(7, 1)}, "falls"),
        ("set_sparse", {"columns": i32(0, COLUMNS)}, "column behind the row"),
        ("set_sparse", {"columns": i32(-1, 0)}, "column before the row"),
        ("set_sparse", {"columns": i32(2**31 - 1, 0)}, "column far behind"),
        ("set_sparse", {"columns": i32(0, 1, 2)}, "more columns than values"),
        ("set_map", changed_step(0, order=np.full(COLUMNS, -1, np.int32)), "order before"),
        ("set_map", changed_step(0, order=np.full(COLUMNS, -(2**31), np.int32)), "order far before"),
        *(("set_map", change, what) for what, change in map_attacks()),
        ("row", {"row": ROWS}, "row behind"),
        ("row", {"to": frozen(f32(COLUMNS))}, "to read-only memory"),
    ]
    return attacks + [pytest.param(method, change, id=f"{method}: {what}") for method, change, what in special]


def full_linear(rows: int = ROWS, columns: int = COLUMNS) -> Any:
    """A layer with a part of every kind, of random numbers."""
    rng = np.random.default_rng(3)
    linear = native.library().Linear(rows, columns)
    groups = -(-columns // GROUP)
    scales = rng.random((rows, groups), np.float32).astype(np.float16)
    arguments = {**codes_arguments(), "codes": rng.integers(0, 16, (rows, columns), np.uint8), "scales": scales.view(np.uint8)}
    arguments["zeros"] = rng.integers(0, 16, (rows, groups), np.uint8)
    linear.add_codes(**arguments)
    if (rows, columns) == (ROWS, COLUMNS):
        others = (
            *map(meaning_arguments, KINDS),
            *map(shared_arguments, SHARED),
            *map(packed_arguments, PACKINGS),
            *map(less_arguments, LESS),
        )
        for other in (*others, table_arguments()):
            linear.add_codes(**other)
    linear.add_dense((rng.random((rows, columns)) - 0.5).astype(np.float16).view(np.uint16), True, f32(rows), 1)
    linear.set_low_rank(u16(3, columns), u16(rows, 3), True, 1)
    starts = np.minimum(np.arange(rows + 1), 2)
    linear.set_sparse(starts, i32(0, columns - 1), f32(2))
    linear.set_bias(f32(rows))
    linear.set_map(map_steps(columns))
    return linear


def multiply(linear: Any, x: np.ndarray, path: str = "", in_bytes: bool = True) -> np.ndarray:
    out = np.full((x.shape[0], linear.rows), np.nan, np.float32)
    native.library().Multiplier(1, path).multiply(linear, x, out, in_bytes)
    return out


def draw_x(rows: int, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("method", LINEAR)
def test_the_calls_that_are_attacked_are_right_as_they_are(method: str) -> None:
    for linear in (native.library().Linear(ROWS, COLUMNS), full_linear()):
        before = linear.nbytes
        getattr(linear, method)(**LINEAR[method]())
        assert linear.nbytes >= before
    linear = native.library().Linear(ROWS, COLUMNS)
    linear.add_codes(**table_arguments())
    assert linear.nbytes > 0


@pytest.mark.parametrize(("method", "change"), linear_attacks())
def test_no_wrong_argument_reaches_a_layer(method: str, change: dict[str, Any]) -> None:
    linear, x = full_linear(), draw_x(6)
    before = multiply(linear, x)
    with pytest.raises(REFUSED):
        getattr(linear, method)(**{**LINEAR[method](), **change})
    assert (multiply(linear, x) == before).all(), "the layer was changed"


@pytest.mark.parametrize(
    "shape", [(0, 1), (1, 0), (-1, 1), (1, -(2**31)), (2**30 + 1, 1), (None, 1), ("1", 1), (1.5, 1), *((n, 1) for n in BIG)]
)
def test_no_layer_has_such_a_shape(shape: tuple[Any, Any]) -> None:
    for pair in (shape, shape[::-1]):
        with pytest.raises(REFUSED):
            native.library().Linear(*pair)


def test_a_layer_of_the_largest_shape_holds_nothing_yet() -> None:
    linear = native.library().Linear(2**30, 2**30)
    assert linear.nbytes == 0
    for method, arguments in LINEAR.items():
        with pytest.raises(REFUSED):
            getattr(linear, method)(**arguments())


def test_a_layer_without_terms_gives_its_bias() -> None:
    linear = native.library().Linear(5, 7)
    for path in PATHS:
        for rows in (1, 9):
            for in_bytes in (False, True):
                assert (multiply(linear, f32(rows, 7), path, in_bytes) == 0).all()
    linear.set_bias(f32(5, value=2.0))
    assert (multiply(linear, f32(9, 7)) == 2).all()
    row = f32(7)
    linear.row(4, row)
    assert (row == 0).all()


@pytest.mark.parametrize("name", ["x", "out"])
def test_no_wrong_array_reaches_a_product(name: str) -> None:
    linear, multiplier = full_linear(), native.library().Multiplier(1, "")
    for in_bytes in (False, True):
        for rows in (3, 8):
            good = {"linear": linear, "x": draw_x(rows), "out": f32(rows, ROWS), "bytes": in_bytes}
            wrong = variants(good[name])
            if name == "out":
                wrong["read-only"] = frozen(f32(rows, ROWS))
            for kind, value in wrong.items():
                with pytest.raises(REFUSED):
                    print(kind, multiplier.multiply(**{**good, name: value}))
                assert (good["out"] == 1).all()
    for other in (None, 1, "linear", object(), multiplier, native.library().Random(0), np.zeros((2, 2), np.float32)):
        with pytest.raises(REFUSED):
            multiplier.multiply(other, draw_x(3), f32(3, ROWS), True)
    for wrong_bool in (None, "yes", 2, 1.0):
        with pytest.raises(REFUSED):
            multiplier.multiply(linear, draw_x(3), f32(3, ROWS), wrong_bool)


def test_no_rows_are_no_work() -> None:
    multiplier, linear, x, out = native.library().Multiplier(2, ""), full_linear(), draw_x(3), f32(3, ROWS)
    multiplier.multiply(linear, f32(0, COLUMNS), f32(0, ROWS), True)
    multiplier.multiply(linear, x, out, True)
    assert (out == multiply(linear, x)).all(), "and what comes behind is done"


@pytest.mark.parametrize("threads", [0, -1, 1025, None, "2", 1.5, *BIG])
def test_no_multiplier_has_so_many_threads(threads: Any) -> None:
    with pytest.raises(REFUSED):
        native.library().Multiplier(threads, "")
    with pytest.raises(REFUSED):
        native.library().multiply_speed("", threads)


@pytest.mark.parametrize("path", ["neon", "AMX", "amx ", "a" * 100_000, None, 3, b"amx"])
def test_no_other_path_is_taken(path: Any) -> None:
    for call in (lambda: native.library().Multiplier(1, path), lambda: native.library().multiply_speed(path, 1)):
        with pytest.raises(REFUSED):
            call()


@pytest.mark.parametrize("size", [0, -1, 2**20 - 1, 2**34 + 1, None, "1", 1.5, 2**64, -(2**63)])
def test_no_other_amount_is_read(size: Any) -> None:
    with pytest.raises(REFUSED):
        native.library().read_speed(size, 1)


# ---- numbers that are none ----


SCALES = {
    "fp16": [0x7C00, 0xFC00, 0x7E00, 0x0001, 0x8001, 0x7BFF, 0x0000],
    "bf16": [0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8001, 0x7F7F, 0x0000],
    "fp32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x80000001, 0x7F7FFFFF, 0],
    "e8m0": [0, 1, 254, 255],
    "fp8": [0x7F, 0xFF, 0x01, 0x7E, 0x00],
}
WIDTH = {"fp16": np.uint16, "bf16": np.uint16, "fp32": np.uint32, "e8m0": np.uint8, "fp8": np.uint8}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("path", PATHS)
def test_scales_that_are_no_numbers_crash_nothing(kind: str, path: str) -> None:
    """A checkpoint's scales are checked where it is read; here they may spoil their own rows and nothing else."""
    rng = np.random.default_rng(5)
    for bits in (1, 3, 4, 8):
        for pattern in SCALES[kind]:
            scales = np.full(
                (ROWS, GROUPS),
                {"fp16": 0x3C00, "bf16": 0x3F80, "fp32": 0x3F800000, "e8m0": 127, "fp8": 0x38}[kind],
                WIDTH[kind],
            )
            scales[3, 1] = pattern
            linear = native.library().Linear(ROWS, COLUMNS)
            codes = rng.integers(0, 1 << bits, (ROWS, COLUMNS), np.uint8)
            linear.add_codes(codes, bits, GROUP, kind, scales.view(np.uint8), 1.0, None, 0, None, None, 1)
            for rows in (1, 4, 7):
                for in_bytes in (False, True):
                    out = multiply(linear, draw_x(rows), path, in_bytes)
                    assert np.isfinite(np.delete(out, 3, 1)).all()
            linear.row(3, f32(COLUMNS))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, 1e-45, -0.0])
def test_activations_that_are_no_numbers_crash_nothing(path: str, value: float) -> None:
    linear = full_linear()
    for rows in (1, 4, 5, 33):
        for in_bytes in (False, True):
            x = draw_x(rows)
            x[rows // 2, 7] = value
            out = multiply(linear, x, path, in_bytes)
            assert np.isfinite(np.delete(out, rows // 2, 0)).all()
            multiply(linear, f32(rows, COLUMNS, value=value), path, in_bytes)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_levels_bias_gain_and_single_weights_that_are_no_numbers_crash_nothing(path: str, value: float) -> None:
    linear = native.library().Linear(ROWS, COLUMNS)
    linear.add_codes(**{**table_arguments(), "levels": f32(16, value=value)})
    linear.add_dense(**{**dense_arguments(), "gain": f32(ROWS, value=value)})
    linear.add_dense(**{**dense_arguments(), "values": u16(ROWS, COLUMNS, value=0x7E00)})
    linear.set_sparse(**{**sparse_arguments(), "values": f32(2, value=value)})
    linear.set_low_rank(**{**low_rank_arguments(), "down": u16(3, COLUMNS, value=0x7C00)})
    linear.set_bias(f32(ROWS, value=value))
    for rows in (1, 4, 5, 33):
        for in_bytes in (False, True):
            assert multiply(linear, draw_x(rows), path, in_bytes).shape == (rows, ROWS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("columns", [1, 3, 31, 33, 65, 257])
def test_any_shape_stays_in_its_memory(path: str, rows: int, columns: int) -> None:
    """Shapes beside every width that loops run in: what they read and write too much, the sanitized library sees."""
    rng = np.random.default_rng(6)
    for bits in range(1, 9):
        for group in {1, 7, 16, columns // 2 + 1, columns}:
            if group > columns:
                continue
            groups = -(-columns // group)
            scales = rng.random((rows, groups), np.float32)
            for zeros in (None, rng.integers(0, 1 << bits, (rows, groups), np.uint8)):
                linear = native.library().Linear(rows, columns)
                codes = rng.integers(0, 1 << bits, (rows, columns), np.uint8)
                linear.add_codes(codes, bits, group, "fp32", scales.view(np.uint8), 1.0, zeros, 1, None, None, 2)
                linear.set_bias(f32(rows))
                spread_scales = np.repeat(scales, group, 1)[:, :columns]
                shift = 1.0 if zeros is None else np.repeat(zeros, group, 1)[:, :columns].astype(np.float64)
                w = (codes - shift) * spread_scales
                for count in (1, 6):
                    x = draw_x(count, columns)
                    for in_bytes in (False, True):
                        out = multiply(linear, x, path, in_bytes)
                        # Coarse: the laws of products are elsewhere, this is about memory.
                        coarse = np.abs(x).max() * np.abs(w).max() * columns * (0.05 if in_bytes else 1e-5) + 1e-5
                        assert np.abs(out - 1.0 - x @ w.T).max() <= coarse


# ---- several at a time ----


def test_a_multiplier_serves_several_threads_at_a_time() -> None:
    multiplier = native.library().Multiplier(2, "")
    layers = [full_linear(), full_linear(33, 40), full_linear(50, 90)]
    inputs = [draw_x(rows, layer.columns) for rows, layer in zip((1, 7, 40), layers, strict=True)]
    wanted = [multiply(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    wrong = []

    def run(index: int) -> None:
        for _ in range(30):
            out = np.empty_like(wanted[index])
            multiplier.multiply(layers[index], inputs[index], out, True)
            if not (out == wanted[index]).all():
                wrong.append(index)

    runners = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert not wrong


# ---- models ----

HIDDEN, HEADS, KV, HEAD, INNER, VOCABULARY, CONTEXT = 32, 4, 2, 16, 24, 50, 20


def dense(rows: int, columns: int, seed: int = 0) -> Any:
    values = (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.1).astype(np.float16)
    linear = native.library().Linear(rows, columns)
    linear.add_dense(values.view(np.uint16), True, None, 1)
    return linear


def layer_steps() -> list[dict[str, Any]]:
    return [
        {"step": "norm", "weight": f32(HIDDEN), "to": "x"},
        {
            "step": "multiply",
            "of": "x",
            "linears": {
                "q": dense(HEADS * HEAD, HIDDEN, 1),
                "k": dense(KV * HEAD, HIDDEN, 2),
                "v": dense(KV * HEAD, HIDDEN, 3),
            },
        },
        {
            "step": "attend",
            **{"queries": "q", "keys": "k", "values": "v", "to": "attended"},
            **{"q_norm": f32(HEAD), "k_norm": None, "rope": 0, "window": 0},
        },
        {"step": "multiply", "of": "attended", "linears": {"o": dense(HIDDEN, HEADS * HEAD, 4)}},
        {"step": "add", "of": "o", "norm": None},
        {"step": "norm", "weight": f32(HIDDEN), "to": "y"},
        {"step": "gate", "of": "y", "gate": dense(INNER, HIDDEN, 5), "up": dense(INNER, HIDDEN, 6), "to": "acted"},
        {"step": "multiply", "of": "acted", "linears": {"down": dense(HIDDEN, INNER, 7)}},
        {"step": "add", "of": "down", "norm": f32(HIDDEN)},
    ]


# The number of the step that each key is a part of.
LINEARS = {"q": 1, "k": 1, "v": 1, "o": 3, "down": 7}
PARTS = {"weight": 0, "q_norm": 2, "k_norm": 2, "rope": 2, "window": 2, "gate": 6, "up": 6, "norm": 8}


def model_arguments() -> dict[str, Any]:
    shape = {
        "hidden": HIDDEN,
        "heads": HEADS,
        "kv_heads": KV,
        "head": HEAD,
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "eps": 1e-5,
        "attention_scale": 0.25,
        "embedding_scale": 1.0,
        "tanh_gelu": False,
        "final_norm": f32(HIDDEN),
    }
    table = dense(VOCABULARY, HIDDEN, 8)
    return {
        "shape": shape,
        "layers": [layer_steps(), layer_steps()],
        "ropes": [(f32(HEAD // 2, value=0.1), 1.0)],
        "embedding": table,
        "head": table,
        "threads": 1,
        "byte_activations": True,
        "float_prompts": False,
        "cache": "fp16",
        "path": "",
    }


def make_model(**changes: Any) -> "Running":
    return Running(native.library().Model(**{**model_arguments(), **changes}))


class Running:
    """A model and a text of it."""

    def __init__(self, model: Any) -> None:
        self.model, self.text = model, model.sequence()

    def forward(self, *arguments: Any) -> None:
        self.model.forward(self.text, *arguments)

    def step(self, *arguments: Any) -> int:
        return int(self.model.step(self.text, *arguments))

    @property
    def length(self) -> int:
        return int(self.text.length)


def logits_of(running: Running, *tokens: int) -> np.ndarray:
    to = np.full((1, VOCABULARY), np.nan, np.float32)
    running.forward(i32(*tokens), to)
    assert np.isfinite(to).all()
    return to


def with_shape(**values: Any) -> dict[str, Any]:
    arguments = model_arguments()
    arguments["shape"] |= values
    return arguments


def with_step(number: int, index: int = 1, **values: Any) -> dict[str, Any]:
    arguments = model_arguments()
    arguments["layers"][index][number] |= values
    return arguments


def with_linear(name: str, linear: Any) -> dict[str, Any]:
    arguments = model_arguments()
    arguments["layers"][1][LINEARS[name]]["linears"][name] = linear
    return arguments


def without_shape(key: str) -> dict[str, Any]:
    arguments = model_arguments()
    del arguments["shape"][key]
    return arguments


def without_part(number: int, key: str) -> dict[str, Any]:
    arguments = model_arguments()
    del arguments["layers"][1][number][key]
    return arguments


def with_steps(change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    arguments = model_arguments()
    change(arguments["layers"][1])
    return arguments


def model_attacks() -> dict[str, Callable[[], dict[str, Any]]]:
    """Every part of a model, replaced by everything that it is not."""
    attacks: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, make: Callable[..., dict[str, Any]], *given: Any, **values: Any) -> None:
        attacks[name] = lambda: make(*given, **values)

    for key in ("hidden", "heads", "kv_heads", "head", "vocabulary", "context"):
        for value in (0, -1, None, "1", 1.5, 2**30 + 1, *BIG):
            add(f"{key}={value!r}", with_shape, **{key: value})
    for key, other in (
        ("hidden", 48),
        ("heads", 2),
        ("heads", 3),
        ("kv_heads", 4),
        ("kv_heads", 3),
        ("head", 32),
        ("head", 15),
    ):
        add(f"{key}={other}", with_shape, **{key: other})
    for key, other in (("head", 528), ("vocabulary", 49), ("vocabulary", 51), ("heads", 2**30)):
        add(f"{key}={other}", with_shape, **{key: other})
    for key in ("eps", "attention_scale", "embedding_scale", "tanh_gelu", "final_norm"):
        for value in (None, "1", [1.0], f32(HIDDEN + 1)):
            add(f"{key}={value!r}"[:40], with_shape, **{key: value})
    for key in (*LINEARS, "gate", "up"):

        def replaced(linear: Any, key: str = key) -> dict[str, Any]:
            return with_linear(key, linear) if key in LINEARS else with_step(PARTS[key], **{key: linear})

        for name, value in (("None", None), ("a number", 3), ("an array", f32(HIDDEN, HIDDEN)), ("text", "q")):
            add(f"{key} is {name}", replaced, value)
        attacks[f"{key} of another shape"] = lambda replaced=replaced: replaced(dense(HIDDEN + 1, HIDDEN))
        attacks[f"{key} of another width"] = lambda replaced=replaced: replaced(dense(HIDDEN, HIDDEN + 1))
    for key in ("weight", "norm", "q_norm", "k_norm"):
        size = HEAD if key in ("q_norm", "k_norm") else HIDDEN
        taken = ["another type", "every other", "backwards"]  # by a copy
        taken += [] if key == "weight" else ["None"]
        wrong = {kind: value for kind, value in variants(f32(size)).items() if kind not in taken}
        for name, value in wrong.items():
            add(f"{key}, {name}", with_step, PARTS[key], **{key: value})
    for key, values in (("rope", (1, -2, None, "0", 0.5, *BIG)), ("window", (-1, None, "0", 0.5, *BIG[1:]))):
        for value in values:
            add(f"{key}={value!r}", with_step, PARTS[key], **{key: value})
    for key in model_arguments()["shape"]:
        add(f"no {key}", without_shape, key)
    for number, step in enumerate(layer_steps()):
        for key in step:
            add(f"step {number}, no {key}", without_part, number, key)
            if key in ("step", "of", "to", "queries", "keys", "values"):
                for value in (None, 3, "a name of nothing" if key != "to" else "", [step[key]]):
                    if value != "":
                        add(f"step {number}, {key}={value!r}", with_step, number, **{key: value})
        for value in (None, [], {}, 3, {1: None}, {"q": None}):
            if step["step"] == "multiply":
                add(f"step {number}, linears={value}", with_step, number, linears=value)
    for name, change in (
        ("a value that is made twice", lambda steps: steps.insert(1, dict(steps[0]))),
        ("an output that is read twice", lambda steps: steps.append(dict(steps[-1]))),
        ("an output that none reads", lambda steps: steps.pop()),
        ("an input that none reads", lambda steps: steps.append({**steps[0], "to": "z"})),
        ("an output in the place of an input", lambda steps: steps[3].update(of="q")),
        ("an input in the place of an output", lambda steps: steps[4].update(of="x")),
        ("a value of a step behind", lambda steps: steps.reverse()),
        ("queries in the place of keys", lambda steps: steps[2].update(keys="q", queries="k")),
        ("a layer of no step", lambda steps: steps.clear()),
        ("a step that is none", lambda steps: steps.append(None)),
    ):
        add(name, with_steps, change)
    for name, ropes in (
        ("no rotations", []),
        ("a rotation of nothing", [(f32(0), 1.0)]),
        ("a rotation of more than a head", [(f32(HEAD // 2 + 1), 1.0)]),
        ("a rotation of one part", [(f32(4),)]),
        ("a rotation that is a list", [[f32(4), 1.0]]),
        ("a rotation that is none", [None]),
        ("frequencies that are none", [(None, 1.0)]),
        ("a factor that is none", [(f32(4), None)]),
        ("rotations that are none", None),
        ("rotations that are a dictionary", {}),
    ):
        attacks[name] = lambda ropes=ropes: {**model_arguments(), "ropes": ropes}
    for key in ("embedding", "head"):
        for name, make in (
            ("None", lambda: None),
            ("a number", lambda: 1),
            ("too short", lambda: dense(VOCABULARY - 1, HIDDEN)),
            ("too wide", lambda: dense(VOCABULARY, HIDDEN + 16)),
        ):
            attacks[f"{key} is {name}"] = lambda key=key, make=make: {**model_arguments(), key: make()}
    for key, values in (
        ("shape", (None, [], 3)),
        ("layers", (None, [], {}, [None], [3], ([],), [[]], [{}], [[{}]])),
        ("threads", (0, -1, 1025, None, "1", 1.5, *BIG)),
        ("byte_activations", (None, "yes", 2)),
        ("float_prompts", (None, "yes", 2)),
        ("cache", (None, "", "fp8", 2)),
        ("path", ("neon", None, 3)),
    ):
        for value in values:
            attacks[f"{key}={value!r}"] = lambda key=key, value=value: {**model_arguments(), key: value}
    return attacks


MODEL_ATTACKS = model_attacks() if native.available() else {}


@pytest.fixture(scope="module")
def said_of_models() -> dict[str, str]:
    """Try all of them at once: a fork each would take longer than the rest."""
    return outcomes({name: lambda make=make: native.library().Model(**make()) for name, make in MODEL_ATTACKS.items()})


@pytest.mark.parametrize("attack", MODEL_ATTACKS)
def test_no_wrong_part_becomes_a_model(attack: str, said_of_models: dict[str, str]) -> None:
    said = said_of_models[attack]
    assert said.startswith("refused: ")
    assert "\n" not in said or "incompatible function arguments" in said, "one line, but for a whole argument of another type"


@pytest.mark.parametrize(
    ("attack", "wanted"),
    [
        ("step 1, no of", "layers[1][1] lacks of"),
        ("no vocabulary", "shape lacks vocabulary"),
        ("q is None", "layers[1][1].linears.q must be a Linear"),
        ("k of another shape", f"layers[1][2].keys must be a value of {KV * HEAD} columns, not {HIDDEN + 1}"),
        ("down of another shape", f"layers[1][7].linears.down must be [any, {INNER}], not [{HIDDEN + 1}, {HIDDEN}]"),
        ("up of another shape", f"layers[1][6].up must be [{INNER}, {HIDDEN}], not [{HIDDEN + 1}, {HIDDEN}]"),
        ("norm, text", "layers[1][8].norm must be an array of float32 of one dimension"),
        ("norm, longer", f"layers[1][8].norm must be [{HIDDEN}]"),
        ("rope=1", "layers[1][2].rope must be -1 or the index of a rotation"),
        ("step 0, step=None", "layers[1][0].step must be the name of a step"),
        ("an output that none reads", "layers[1] must be of steps that read all values; none reads down"),
        ("an output that is read twice", "layers[1][9].of must be a value that no other step reads"),
        ("an input in the place of an output", "layers[1][4].of must be a value of its sort that a step before it makes"),
        ("a value that is made twice", "layers[1][1].to must be a name that no step of the layer before it has"),
        ("cache='fp8'", "cache must be fp16 or int8, not 'fp8'"),
        ("a rotation of one part", "ropes[0] must be a tuple of frequencies and a factor"),
        ("a factor that is none", "ropes[0][1] must be a number"),
        ("heads='1'", "shape.heads must be a whole number of 32 bits"),
        ("context=0", "shape.context must be 1 to 1073741824"),
    ],
)
def test_a_refusal_says_which_part_is_wrong(attack: str, wanted: str, said_of_models: dict[str, str]) -> None:
    assert said_of_models[attack] == f"refused: {wanted}"


ADDITIONS: dict[str, Callable[[Any], Any]] = {
    "codes": lambda layer: layer.add_codes(
        u8(layer.rows, layer.columns),
        4,
        16,
        "fp16",
        u16(layer.rows, layer.columns // 16).view(np.uint8),
        1.0,
        None,
        8,
        None,
        None,
        1,
    ),
    "low-rank": lambda layer: layer.set_low_rank(u16(3, layer.columns), u16(layer.rows, 3), True, 1),
    "single weights": lambda layer: layer.set_sparse(np.zeros(layer.rows + 1, np.int64), i32(), f32(0)),
    "map": lambda layer: layer.set_map(map_steps(layer.columns)[:2]),
    "bias": lambda layer: layer.set_bias(f32(layer.rows)),
}


USED = "the layer is in use"


@pytest.mark.parametrize("byte_activations", [False, True])
@pytest.mark.parametrize("kind", ADDITIONS)
def test_a_layer_of_a_model_cannot_be_filled(kind: str, byte_activations: bool) -> None:
    arguments = {**model_arguments(), "byte_activations": byte_activations}
    layer = arguments["layers"][0][1]["linears"]["q"]
    model = Running(native.library().Model(**arguments))
    wanted = [logits_of(model, *tokens) for tokens in ((1,), (1, 2, 3, 4, 5, 6))]
    with pytest.raises(ValueError, match=USED):
        ADDITIONS[kind](layer)
    model.text.truncate(0)
    assert all((logits_of(model, *tokens) == w).all() for tokens, w in zip(((1,), (1, 2, 3, 4, 5, 6)), wanted, strict=True))
    del model, arguments
    gc.collect()
    ADDITIONS[kind](layer)


def test_a_model_that_was_not_made_uses_no_layer() -> None:
    arguments = with_shape(vocabulary=VOCABULARY - 1)
    with pytest.raises(ValueError, match="embedding"):
        native.library().Model(**arguments)
    for steps in arguments["layers"]:
        steps[1]["linears"]["q"].set_bias(f32(HEADS * HEAD))


def test_a_layer_cannot_be_filled_while_it_is_multiplied() -> None:
    linear, x = dense(512, 512), draw_x(64, 512)
    wanted, done = multiply(linear, x, in_bytes=False), threading.Event()
    wrong = []

    def run() -> None:
        while not done.is_set():
            wrong.extend([] if (multiply(linear, x, in_bytes=False) == wanted).all() else ["another result"])

    runner = threading.Thread(target=run)
    runner.start()
    try:
        for _ in range(1_000_000):  # most tries meet a product; a bias of zeros changes nothing where one does not
            try:
                linear.set_bias(f32(512, value=0.0))
            except ValueError as error:
                assert str(error).startswith(USED)  # noqa: PT017
                break
        else:
            pytest.fail("no try met a product")
    finally:
        done.set()
        runner.join()
    assert not wrong
    linear.set_bias(f32(512))


def test_two_threads_may_fill_one_layer() -> None:
    def work() -> None:
        linear, values = native.library().Linear(64, 4096), u16(64, 4096)

        def run() -> None:
            for _ in range(100):
                linear.add_dense(values, True, None, 1)

        runners = [threading.Thread(target=run) for _ in range(2)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        assert linear.nbytes == 200 * 64 * 4096 * 2

    assert outcome(work) == "done"


def test_groups_of_one_column_are_not_padded() -> None:
    columns = 1 << 20
    linear = native.library().Linear(1, columns)
    ones = u8(1, columns, value=1)
    linear.add_codes(ones, 1, 1, "e8m0", ones, 1.0, None, 0, None, None, 1)
    assert linear.nbytes <= 16 * (columns + columns // 8)  # rows are padded to a strip of 16


def leave_memory(size: int) -> None:
    """Let this process take so many more bytes of addresses."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + size, resource.RLIM_INFINITY))


NEEDS_ADDRESSES = pytest.mark.skipif(WATCHED, reason="AddressSanitizer needs all addresses")


@NEEDS_ADDRESSES
def test_threads_that_cannot_start_are_said_every_time() -> None:
    def work() -> None:
        multiplier, linear, out = native.library().Multiplier(900, ""), full_linear(), f32(3, ROWS)
        before = linear.nbytes
        leave_memory(2**30)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="of 900 threads could start; ask for fewer"):
                multiplier.multiply(linear, draw_x(3), out, True)
            with pytest.raises(RuntimeError, match="of 900 threads could start; ask for fewer"):
                linear.add_dense(u16(ROWS, COLUMNS), True, None, 900)
        assert linear.nbytes == before
        leave_memory(2**40)
        multiplier.multiply(linear, draw_x(3), out, True)
        assert (out == multiply(linear, draw_x(3))).all()

    assert outcome(work) == "done"


@NEEDS_ADDRESSES
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_bytes", [False, True])
def test_memory_that_threads_do_not_get_is_said_by_all(path: str, in_bytes: bool) -> None:
    """The sums of a strip of a million rows take 64 MiB or more a thread: what fails on one must not leave the others waiting."""

    def work() -> None:
        linear, rows = dense(33, 4), 1 << 20
        multiplier, x, out = native.library().Multiplier(3, path), draw_x(rows, 4), f32(rows, 33)
        few = np.empty((3, 33), np.float32)
        multiplier.multiply(linear, x[:3], few, in_bytes)
        for size in (2**27, 2**28) if in_bytes else (2**26, 2**27):  # for none of them, for one
            leave_memory(size)
            with pytest.raises(MemoryError):
                multiplier.multiply(linear, x, out, in_bytes)
            again = np.empty_like(few)
            multiplier.multiply(linear, x[:3], again, in_bytes)
            assert (again == few).all()
        leave_memory(2**40)
        multiplier.multiply(linear, x, out, in_bytes)

    assert outcome(work) == "done"


def test_a_model_keeps_what_it_is_made_of() -> None:
    arguments = model_arguments()
    model = Running(native.library().Model(**arguments))
    first = logits_of(model, 1, 2, 3)
    for steps in arguments["layers"]:
        for step in steps:
            for value in step.values():
                if isinstance(value, np.ndarray):
                    value[:] = np.nan
            step.clear()
        steps.clear()
    arguments.clear()
    gc.collect()
    model.text.truncate(0)
    assert (logits_of(model, 1, 2, 3) == first).all()


@pytest.mark.parametrize("cache", get_args(CacheType))
@pytest.mark.parametrize("byte_activations", [False, True])
def test_no_wrong_token_or_buffer_reaches_a_model(cache: str, byte_activations: bool) -> None:
    library = native.library()
    model = make_model(cache=cache, byte_activations=byte_activations)
    wanted = logits_of(model, 1, 2, 3)
    how, random = library.Sampling(1.0, 0, 1.0, 0.0, 1.0), library.Random(1)
    to = f32(3, VOCABULARY, value=7.0)
    tokens = [
        *variants(i32(1, 2, 3)).items(),
        ("too large", i32(VOCABULARY)),
        ("negative", i32(-1)),
        ("far off", i32(2**31 - 1)),
        ("far below", i32(-(2**31))),
        ("one of many", i32(*range(10), -1)),
        ("too many", np.zeros(CONTEXT - 2, np.int32)),
        ("far too many", np.zeros(2**20 + 1, np.int32)),
    ]
    for name, wrong in tokens:
        if name in ("longer", "shorter"):
            continue
        with pytest.raises(REFUSED):
            print(name, model.forward(wrong, to))
        with pytest.raises(REFUSED):
            print(name, model.step(wrong, how, random))
        assert model.length == 3
    for name, wrong in {**variants(to), "read-only": frozen(f32(3, VOCABULARY)), "two rows": f32(2, VOCABULARY)}.items():
        if name in ("empty", "shorter"):  # no row is right too
            continue
        with pytest.raises(REFUSED):
            print(name, model.forward(i32(1, 2, 3), wrong))
        assert model.length == 3
    assert (to == 7.0).all()
    for wrong in (None, 1, "how", {}):
        with pytest.raises(REFUSED):
            model.step(i32(1), wrong, random)
        with pytest.raises(REFUSED):
            model.step(i32(1), how, wrong)
    with pytest.raises(REFUSED):
        model.step(i32(1), random, how)
    for wrong in (-1, 4, None, "0", 1.5, *BIG):
        with pytest.raises(REFUSED):
            model.text.truncate(wrong)
    model.text.truncate(0)
    assert (logits_of(model, 1, 2, 3) == wanted).all()


def test_a_context_is_filled_to_its_end_and_no_further() -> None:
    for path in PATHS:
        for cache in get_args(CacheType):
            for first in (1, 4, 5, CONTEXT - 1, CONTEXT):
                model = make_model(path=path, cache=cache)
                model.forward(np.arange(first, dtype=np.int32), f32(first, VOCABULARY))
                while model.length < CONTEXT:
                    logits_of(model, model.length)
                with pytest.raises(ValueError, match="context"):
                    logits_of(model, 0)
                assert model.length == CONTEXT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 0.0])
def test_a_model_of_numbers_that_are_none_ends(path: str, value: float) -> None:
    for cache in get_args(CacheType):
        arguments = with_step(0, 0, weight=f32(HIDDEN, value=value))
        arguments["layers"][0][2]["q_norm"] = f32(HEAD, value=value)
        arguments |= {"path": path, "cache": cache, "ropes": [(f32(HEAD // 2, value=value), 1.0)]}
        model = Running(native.library().Model(**arguments))
        how = native.library().Sampling(0.8, 5, 0.9, 0.1, 1.1)
        if value:  # said, and nothing is in the cache behind it
            with pytest.raises(OverflowError, match="beyond the range"):
                model.forward(np.arange(12, dtype=np.int32), f32(12, VOCABULARY))
            with pytest.raises(OverflowError, match="beyond the range"):
                model.step(i32(3), how, native.library().Random(1))
            assert model.length == 0
            continue
        model.forward(np.arange(12, dtype=np.int32), f32(12, VOCABULARY))
        for _ in range(3):
            assert 0 <= model.step(i32(3), how, native.library().Random(1)) < VOCABULARY


def test_two_threads_take_turns_at_a_model() -> None:
    """What comes out is a matter of the order; that both end, and that the cache counts both, is not."""
    model = make_model(threads=2, shape={**model_arguments()["shape"], "context": 512})

    def run() -> None:
        for _ in range(40):
            model.forward(i32(1, 2, 3), f32(1, VOCABULARY))
            assert model.length >= 3

    runners = [threading.Thread(target=run) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert model.length == 360


def test_a_model_takes_its_own_sequences_only() -> None:
    model, other = make_model(), make_model()
    how, random, to = native.library().Sampling(1.0, 0, 1.0, 0.0, 1.0), native.library().Random(1), f32(1, VOCABULARY)
    for wrong in (other.text, make_model(shape={**model_arguments()["shape"], "context": 4}).text, None, 3, model):
        with pytest.raises(REFUSED):
            model.model.forward(wrong, i32(1), to)
        with pytest.raises(REFUSED):
            model.model.step(wrong, i32(1), how, random)
    text = model.text
    del model
    gc.collect()
    text.truncate(0)  # a sequence outlives its model
    assert text.length == 0


# ---- factors in codes ----


def coded_layer(rows: int, columns: int) -> Any:
    linear = native.library().Linear(rows, columns)
    scales = np.ones((rows, 1), np.float16).view(np.uint8)
    codes = np.random.default_rng(rows).integers(0, 16, (rows, columns), np.uint8)
    linear.add_codes(codes, 4, columns, "fp16", scales, 1.0, None, 8, None, None, 1)
    return linear


def test_factors_are_taken_from_layers_of_their_shapes_alone() -> None:
    library = native.library()
    linear, down, up = library.Linear(ROWS, COLUMNS), coded_layer(6, COLUMNS), coded_layer(ROWS, 6)
    attacks = {
        "no rank": lambda: linear.set_low_rank_codes(coded_layer(5, COLUMNS), up),
        "other rows": lambda: linear.set_low_rank_codes(down, coded_layer(ROWS + 1, 6)),
        "other columns": lambda: linear.set_low_rank_codes(coded_layer(6, COLUMNS - 1), up),
        "no codes": lambda: linear.set_low_rank_codes(library.Linear(6, COLUMNS), up),
        "a layer twice": lambda: coded_layer(COLUMNS, COLUMNS).set_low_rank_codes(*[coded_layer(COLUMNS, COLUMNS)] * 2),
        "itself": lambda: linear.set_low_rank_codes(linear, linear),
        "None": lambda: linear.set_low_rank_codes(None, up),
    }
    said = outcomes(attacks)
    assert {name: what for name, what in said.items() if not what.startswith("refused: ")} == {}
    x = draw_x(6)
    expected = multiply(up, multiply(down, x, in_bytes=False), in_bytes=False)
    linear.set_low_rank_codes(down, up)
    again = library.restore_linear(library.store_linear(linear))
    for made in (linear, again):
        np.testing.assert_allclose(multiply(made, x, in_bytes=False), expected, rtol=1e-5, atol=1e-4)
    assert not multiply(down, x).any(), "the layer that a factor was taken from is empty"


# ---- layers that were stored ----


@functools.cache
def stored_once() -> dict[str, Any]:
    return dict(native.library().store_linear(full_linear()))


def stored() -> dict[str, Any]:
    return copy.deepcopy(stored_once())


def with_part(key: str, index: int, **values: Any) -> dict[str, Any]:
    made = stored()
    made[key] = [{**part, **(values if i == index else {})} for i, part in enumerate(made[key])]
    return made


def spoiled(part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return a stored dictionary once for everything that an entry must not be, the entries of dictionaries in it included."""
    for key, value in part.items():
        yield f": no {key}", {k: v for k, v in part.items() if k != key}
        if isinstance(value, dict):
            for name, other in spoiled(value):
                yield f".{key}{name}", {**part, key: other}
            continue
        if isinstance(value, np.ndarray):
            wrong = variants(value)
            if value.dtype == np.uint8:
                del wrong["bytes"]  # these are bytes
            if len(value) == 1:
                del wrong["every other"], wrong["backwards"]  # a single value is the same
            if key in ("levels", "words") and value.dtype == np.float32:
                wrong["not a number"] = np.full_like(value, np.nan)
        elif isinstance(value, float):
            wrong = {repr(n): n for n in (None, "1", [1], 10**40, np.nan)}
        else:
            wrong = {repr(n): n for n in (None, "1", 1.5, -1, 10**9, *BIG)}
        for name, other in wrong.items():
            yield f".{key}: {name}", {**part, key: other}


def stored_attacks() -> dict[str, Callable[[], Any]]:
    """Every part of a stored layer, left out and replaced by everything that it is not."""
    attacks: dict[str, Callable[[], Any]] = {}
    good = stored()
    for key, value in good.items():
        wrong: dict[str, Any] = {repr(n): n for n in (None, "1", 1.5, -1, 10**9, *BIG)}
        wrong = variants(value) if isinstance(value, np.ndarray) else wrong
        if key not in ("down", "up", "sparse", "bias", "map", "out_map"):
            attacks[f"no {key}"] = lambda key=key: {k: v for k, v in stored().items() if k != key}
        for name, other in wrong.items():
            attacks[f"{key}: {name}"] = lambda key=key, other=other: {**stored(), key: other}
    for key in ("coded", "dense"):
        for index, part in enumerate(good[key]):
            for name, other in spoiled(part):
                attacks[f"{key}[{index}]{name}"] = lambda key=key, index=index, other=other: {
                    **(made := stored()),
                    key: [other if i == index else part for i, part in enumerate(made[key])],
                }
    zeros = good["coded"][0]["zeros"]
    scales = good["coded"][0]["scales"]
    for name, change in {
        "codes of more bits": {"bits": 5},
        "groups of another size": {"group": 2 * GROUP},
        "scales of another kind": {"scales": {**scales, "kind": 0}},
        "scales of taller blocks": {"scales": {**scales, "tall": 3}},
        "zero points of more bits": {"zeros": {**zeros, "bits": 8}},
        "zero points of 3 bits": {"zeros": {**zeros, "bits": 3}},
        "a table beside zero points": {"kind": 1},
        "a minimum that is not there": {"has_less": True},
        "codes of another kind": {"kind": 3},
    }.items():
        attacks[name] = lambda change=change: with_part("coded", 0, **change)
    for name, change in {
        "starts that fall": {"starts": changed_starts(7, 1)},
        "starts that end behind": {"starts": changed_starts(ROWS, 3)},
        "starts that end before": {"starts": changed_starts(ROWS, -1)},
        "starts that end far behind": {"starts": changed_starts(ROWS, 2**62)},
        "a column behind the row": {"columns": i32(0, COLUMNS)},
        "a column before the row": {"columns": i32(-1, 0)},
    }.items():
        attacks[name] = lambda change=change: {**stored(), "sparse": {**stored()["sparse"], **change}}
    for name, change in map_attacks():
        attacks[f"map: {name}"] = lambda change=change: {**stored(), "map": change["steps"]}
    attacks["ranks that differ"] = lambda: {**stored(), "up": {**stored()["up"], "columns": 4}}
    attacks["a product without its other half"] = lambda: {k: v for k, v in stored().items() if k != "up"}
    for name, value in {"None": None, "a list": [], "a number": 1, "a layer": full_linear()}.items():
        attacks[f"{name} in place of all"] = lambda value=value: value
    return attacks


def test_no_wrong_part_becomes_a_layer_again() -> None:
    attacks = stored_attacks()
    said = outcomes({name: lambda make=make: native.library().restore_linear(make()) for name, make in attacks.items()})
    assert {name: what for name, what in said.items() if not what.startswith("refused: ")} == {}
    assert said["coded[0]: no lines"] == "refused: stored.coded[0] lacks lines"
    assert said["coded[0].bits: -1"] == "refused: stored.coded[0].bits must be 1 to 24"
    assert said["coded[0].scales: no values"] == "refused: stored.coded[0].scales lacks values"


def test_a_layer_that_was_stored_is_the_same_again() -> None:
    library, linear, x = native.library(), full_linear(), draw_x(6)
    wanted, made = multiply(linear, x), library.store_linear(linear)
    again = library.restore_linear(made)
    del linear, made
    gc.collect()
    assert (multiply(again, x) == wanted).all()


def test_a_layer_keeps_the_arrays_it_was_made_of() -> None:
    """Whatever becomes of the dictionaries that they came in."""
    library, x = native.library(), draw_x(6)
    made = stored()
    for part in (*made["coded"], *made["dense"], made["down"], made["up"]):
        part |= {key: value.copy() for key, value in part.items() if isinstance(value, np.ndarray)}
    again = library.restore_linear(made)
    wanted = multiply(again, x)
    for part in (*made["coded"], *made["dense"], made["down"], made["up"], made):
        part.clear()
    gc.collect()
    junk = [u8(4096, value=255) for _ in range(500)]
    assert (multiply(again, x) == wanted).all()
    del junk


def test_a_layer_stays_as_it_is_while_its_arrays_are_read() -> None:
    library, linear = native.library(), full_linear()
    made = library.store_linear(linear)
    before = {key: value.copy() for key, value in made["coded"][0].items() if isinstance(value, np.ndarray)}
    for method, arguments in LINEAR.items():
        if method != "row":
            with pytest.raises(ValueError, match=USED):
                getattr(linear, method)(**arguments())
    assert all((made["coded"][0][key] == value).all() for key, value in before.items())
    left = made["coded"][0]["lines"]
    made.clear()
    gc.collect()
    with pytest.raises(ValueError, match=USED):
        linear.set_bias(f32(ROWS))
    del left
    gc.collect()
    linear.set_bias(f32(ROWS))
    for wrong in (None, 1, {}, made):
        with pytest.raises(REFUSED):
            library.store_linear(wrong)


# ---- choosing a token ----


@pytest.mark.parametrize(
    "settings",
    [
        (-1.0, 0, 1.0, 0.0, 1.0),
        (np.nan, 0, 1.0, 0.0, 1.0),
        (np.inf, 0, 1.0, 0.0, 1.0),
        (1.0, -1, 1.0, 0.0, 1.0),
        (1.0, 2**31, 1.0, 0.0, 1.0),
        (1.0, 0, 0.0, 0.0, 1.0),
        (1.0, 0, 1.1, 0.0, 1.0),
        (1.0, 0, np.nan, 0.0, 1.0),
        (1.0, 0, 1.0, -0.1, 1.0),
        (1.0, 0, 1.0, 1.1, 1.0),
        (1.0, 0, 1.0, np.nan, 1.0),
        (1.0, 0, 1.0, 0.0, 0.0),
        (1.0, 0, 1.0, 0.0, -1.0),
        (1.0, 0, 1.0, 0.0, np.inf),
        (1.0, 0, 1.0, 0.0, np.nan),
        (None, 0, 1.0, 0.0, 1.0),
        ("1", 0, 1.0, 0.0, 1.0),
        (1.0, None, 1.0, 0.0, 1.0),
        (1.0, 0.5, 1.0, 0.0, 1.0),
        (1.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0, 1.0, 1.0),
    ],
)
def test_no_other_sampling_is_made(settings: tuple[Any, ...]) -> None:
    with pytest.raises(REFUSED):
        native.library().Sampling(*settings)


@pytest.mark.parametrize("seed", [-1, 2**64, None, "1", 1.5])
def test_no_other_seed_is_taken(seed: Any) -> None:
    with pytest.raises(REFUSED):
        native.library().Random(seed)


def test_no_wrong_argument_reaches_a_choice() -> None:
    library = native.library()
    good = {"logits": f32(9), "before": i32(1, 2), "how": library.Sampling(1.0, 0, 0.5, 0.0, 2.0), "random": library.Random(0)}
    library.pick(**good)
    wrong: dict[str, list[Any]] = {
        "logits": [v for k, v in variants(f32(9)).items() if k not in ("longer", "shorter")],
        "before": [v for k, v in variants(i32(1, 2)).items() if k not in ("longer", "shorter", "empty")]
        + [i32(9), i32(-1), i32(2**31 - 1), i32(0, -(2**31))],
        "how": [None, 0, {}, good["random"]],
        "random": [None, 0, {}, good["how"]],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(REFUSED):
                library.pick(**{**good, name: value})


def test_logits_that_are_no_numbers_end_in_a_token() -> None:
    library, rng = native.library(), np.random.default_rng(7)
    for size in (1, 2, 17, 300):
        for sick in (np.nan, np.inf, -np.inf):
            for share in (0.01, 0.5, 1.0):
                logits = rng.standard_normal(size).astype(np.float32)
                logits[rng.random(size) < share] = sick
                logits[0] = sick
                for settings in (
                    (0.0, 0, 1.0, 0.0, 1.0),
                    (1.0, 0, 0.9, 0.0, 1.0),
                    (1.0, 7, 1.0, 0.0, 1.0),
                    (0.5, 7, 0.5, 0.2, 1.3),
                ):
                    for seed in range(5):
                        how, random = library.Sampling(*settings), library.Random(seed)
                        assert 0 <= library.pick(logits, i32(0), how, random) < size


def test_a_class_without_its_beginning_is_refused() -> None:
    library = native.library()
    raw = library.Random.__new__(library.Random)
    with pytest.warns(RuntimeWarning, match="uninitialized"), pytest.raises(TypeError):
        library.pick(f32(3), i32(), library.Sampling(1.0, 0, 1.0, 0.0, 1.0), raw)


# ---- the sanitized library ----

ROOT = Path(__file__).parents[2]
RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("bitpress._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import bitpress
sys.modules["bitpress._native"] = bitpress._native = module
import pytest
sys.exit(pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", "--rootdir", sys.argv[2], *sys.argv[3:]]))
"""
SANITIZED = [
    ("tests/attacks/test_native_attacks.py", "not sanitized"),
    ("tests/test_native_products.py", ""),
    ("tests/test_native_sampling.py", "not frequencies"),
    ("tests/test_native.py", "refuse or logits or bf16 or ranges or scale or words"),
    ("tests/evaluation/test_distance.py", "native"),
    ("tests/test_native_decoder.py", "long_text or threads or side_by_side or begins_alike"),
]


@pytest.fixture(scope="session")
def sanitized_library(request: pytest.FixtureRequest) -> Path:
    """Build (or reuse) the library with sanitizers; only where these tests were asked for, since a build takes minutes."""
    if not any("attacks" in str(argument) for argument in request.config.invocation_params.args):
        pytest.skip("minutes of building; `make attack` runs it")
    if any(shutil.which(tool) is None for tool in ("cmake", "g++")):
        pytest.skip("cmake and g++ are not here")
    if not Path(of_compiler("libasan.so")).is_file():
        pytest.skip("libasan is not here: install the one of g++ (libgcc-12-dev and the like)")
    made = subprocess.run(
        [ROOT / "scripts" / "build_sanitized.sh"], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.split()[-1])


def of_compiler(library: str) -> str:
    """Name the file of a library of the compiler's own; the plain name where there is none."""
    return subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.parametrize(("tests", "chosen"), SANITIZED, ids=[tests for tests, _ in SANITIZED])
def test_the_sanitized_library_has_nothing_to_say(tests: str, chosen: str, sanitized_library: Path) -> None:
    command = [sys.executable, "-c", RUN, sanitized_library, ROOT, ROOT / tests, *(["-k", chosen] if chosen else [])]
    sanitizers = {"ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    # libstdc++ too: AddressSanitizer looks for its exceptions at the start, when Python has not loaded it.
    loaded = f"{of_compiler('libasan.so')} {of_compiler('libstdc++.so')}"
    environment = {**os.environ, **sanitizers, "LD_PRELOAD": loaded, "PYTHONMALLOC": "malloc"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert made.returncode == 0, (made.stdout[-3000:] + made.stderr[-6000:]).strip()
    assert "[100%]" in made.stdout
