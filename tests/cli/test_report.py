"""`bitpress report`: one directory or several, as text, JSON and a page; what is no report is one clear line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_one_directory_is_shown_as_its_run_showed_it(bitpress: Run, pressed_original: Path, tmp_path: Path) -> None:
    shown = bitpress("report", pressed_original)
    assert shown.code == 0, shown.err
    assert "int4-g32-zero by gptq" in shown.out
    stored = json.loads((pressed_original / "report.json").read_text(encoding="utf-8"))
    assert bitpress("report", pressed_original, "--json").json == stored
    target = tmp_path / "page.html"
    done = bitpress("report", pressed_original, "--html", target)
    assert done.out == f"{target}: {target.stat().st_size:,} bytes\n"
    assert target.read_bytes() == (pressed_original / "report.html").read_bytes()


def test_several_are_compared(bitpress: Run, pressed_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("a/out", "b/out", "c"):
        shutil.copytree(pressed_original, tmp_path / place)
    report = json.loads((tmp_path / "c" / "report.json").read_text(encoding="utf-8"))
    report["figures"] |= {
        "kl_mean": 0.125,
        "kl_ci95": 0.01,
        "top1_agreement": 0.5,
        "perplexity": 7.0,
        "tokens": 64,
        "text": "x",
    }
    (tmp_path / "c" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    directories = [tmp_path / place for place in ("a/out", "b/out", "c")]
    lines = bitpress("report", *directories).out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()][-2:] == ["c", "--html"]  # longer names may take two lines
    assert "0.1250 ± 0.0100" in lines[-2]
    assert set(bitpress("report", *directories, "--json").json) == {*map(str, directories[:2]), "c"}
    target = tmp_path / "page.html"
    assert bitpress("report", *directories, "--html", target).code == 0
    assert "3 compressed models" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("MISSING",), 3, "holds no report.json; name a directory that `bitpress quantize` wrote"),
        (("EMPTY",), 3, "holds no report.json"),
        (("BROKEN",), 3, "is not JSON"),
        (("FOREIGN",), 3, "is no report of bitpress: figures: Field required"),
        (("GOOD", "GOOD"), 2, "is named twice"),
        (("GOOD", "EMPTY"), 3, "holds no report.json"),
        (("GOOD", "--html", "NOWHERE/x.html"), 2, "does not exist"),
        (("GOOD", "--html", "EMPTY"), 2, "is a directory; name a file"),
        ((), 2, "DIR"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], code: int, says: str, bitpress: Run, pressed_original: Path, tmp_path: Path
) -> None:
    places = {"GOOD": pressed_original, "MISSING": tmp_path / "missing", "NOWHERE/x.html": tmp_path / "nowhere" / "x.html"}
    for name, content in (("EMPTY", None), ("BROKEN", "{"), ("FOREIGN", "{}")):
        places[name] = tmp_path / name.lower()
        places[name].mkdir()
        if content is not None:
            (places[name] / "report.json").write_text(content)
    done = bitpress("report", *(places.get(word, word) for word in arguments))
    assert done.code == code
    assert says in done.error
