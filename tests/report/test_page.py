"""The page: one file that loads nothing, well formed, with every weight, whatever the texts in it are."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bitpress.report.document import check_report, read_report
from bitpress.report.page import write_comparison, write_page

Make = Callable[[str], Path]
VOID = {"meta", "link", "br", "img", "input", "hr"}
# Attributes by which a page loads or leads to something.
LOADING = {"src", "href", "srcset", "action", "data", "poster", "formaction", "xlink:href"}


class Reader(HTMLParser):
    """Checks that every element is closed in its order, and notes what elements, texts and links there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.identifiers: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs), f"an attribute of {tag} is repeated"
        assert not [name for name in values if name.startswith("on")], "no script in an attribute"
        self.links += [value for name, value in values.items() if name in LOADING]
        self.identifiers += [values["id"]] if "id" in values and "svg" not in self.open else []
        if tag == "button":
            self.titles.append(values["title"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def text(self, tag: str) -> str:
        return "".join(self.texts.get(tag, ()))


def check_page(text: str) -> Reader:
    """Return what is on a page, after the checks that every page must pass."""
    assert text.startswith("<!doctype html>\n")
    page = Reader(text)
    assert all(link.startswith(("#", "data:,")) for link in page.links), page.links
    assert len(page.identifiers) == len(set(page.identifiers))
    style = page.text("style")
    assert "@import" not in style
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", text))
    script = page.text("script")
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\b|innerHTML|eval\(", script)
    assert "prefers-color-scheme: dark" in style
    return page


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_a_published_page_is_whole_and_loads_nothing(architecture: str, published: Make) -> None:
    directory = published(architecture)
    text = (directory / "report.html").read_text(encoding="utf-8")
    page = check_page(text)
    report = read_report(directory)
    assert text == write_page(report, directory.name), "`bitpress report` writes the same page"
    assert page.text("h1") == architecture
    shown = json.loads(page.texts["script"][0])
    assert sorted(row["name"] for cell in shown for row in cell) == sorted(row.name for row in report.layers)
    assert len(page.titles) == len(shown), "a cell for every place"
    assert all(any(title.startswith(row.name) for title in page.titles) for row in report.layers)
    assert page.text("figcaption") == "By kind of text By position "
    assert page.text("h2").startswith(
        "Distance from the originalWhere the error sitsSize by partFallbacks and warningsGenerated"
    )
    for file, digest in report.job.source.items():
        assert file in text
        assert digest in text
    assert f"{report.figures.kl_mean:.4f}" in page.text("p")


def test_a_page_has_no_word_of_how_it_came_to_be(published: Make) -> None:
    text = (published("llama") / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:issue|session|audit|TODO)\b", text, re.IGNORECASE)
    assert "undefined" not in re.sub(r"(?s)<script>.*?</script>", "", text)


def test_texts_of_a_model_stay_texts(report_json: Callable[[str], Any]) -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\u2028"
    value = report_json("llama")
    value["layers"][0]["name"] = f"model.layers.0.{bad}"
    value["layers"][0]["notes"] = [bad]
    value["fallbacks"] = [{"weight": bad, "what": bad}]
    value["notes"] = [{"weight": "w", "what": bad}]
    value["kept"] = {bad: bad}
    value["left_out"] = [bad]
    value["left_behind"] = [{"file": bad, "why": bad}]
    value["model"] = bad
    value["figures"]["text"] = bad
    value["figures"]["by_text"][0]["text"] = f"$\\frac{bad}"  # neither markup nor a formula of the plots
    value["continuations"]["texts"][0].update(prompt=bad, kind=bad)
    value["job"]["recipe"]["weights"] = bad
    value["job"]["source"] = {bad: bad}
    report = check_report(value, "here")
    for text in (write_page(report, bad), write_comparison([(bad, report), ("b", report)])):
        page = check_page(text)
        assert not page.titles or page.titles[0].startswith(f"model.layers.0.{bad[:20]}")
        assert "<img" not in text


def test_what_was_not_measured_is_left_out(report_json: Callable[[str], Any]) -> None:
    value = report_json("llama")
    for key in ("continuations", "model", "auto_class", "notes", "outer", "left_behind"):
        del value[key]
    value["figures"] = {key: value["figures"][key] for key in ("bits_per_weight", "bytes")}
    for row in value["layers"]:
        del row["picture"]
    value["calibration"] = None
    page = check_page(write_page(check_report(value, "older"), "older"))
    assert "It was not measured in this run." in page.text("p")
    assert "the distance from the original was not measured" in page.text("p")
    assert "Generated text" not in page.text("h2")
    assert "svg" not in page.texts


def test_figures_of_another_task_and_infinite_ones_are_shown(report_json: Callable[[str], Any]) -> None:
    value = report_json("llama")
    kept = {"bits_per_weight": 4.0, "bytes": 10, "kl_mean": 0.25, "kl_ci95": None, "images_right": 0.5, "text": "noise:2"}
    value |= {"figures": kept, "auto_class": "AutoModelForImageClassification", "continuations": None}
    text = write_page(check_report(value, "images"), "images")
    page = check_page(text)
    assert "Images right" in page.text("th")
    assert "AutoModelForImageClassification.from_pretrained" in page.text("code")
    assert "bitpress run" not in text
    value["figures"] = report_json("llama")["figures"] | {"kl_mean": "inf", "kl_ci95": None, "perplexity": "inf"}
    value["figures"]["by_position"][0]["kl_mean"] = "inf"
    assert "inf nats a token" in check_page(write_page(check_report(value, "infinite"), "infinite")).text("p")


def test_a_comparison_has_a_row_and_a_point_for_every_model(published: Make) -> None:
    reports = [(name, read_report(published(name))) for name in ("llama", "mixtral", "gpt2")]
    text = write_comparison(reports)
    page = check_page(text)
    assert all(name in page.text("th") for name, _ in reports)
    assert all(name in page.text("text") for name, _ in reports), "in the picture too"
    assert "They were made from different originals." in page.text("p")
    assert "different texts" not in page.text("p"), "all have the same tokenizer and text"
    bare = [
        (name, report.model_copy(update={"figures": report.figures.model_copy(update={"kl_mean": None})}))
        for name, report in reports
    ]
    assert "None of these reports holds a distance" in check_page(write_comparison(bare)).text("p")


def test_what_was_learned_has_a_table_a_sentence_and_a_picture(report_json: Callable[[str], Any]) -> None:
    data = report_json("llama")
    row = {"name": "model.layers.0", "tuning": "block-ap", "span": "block", "steps": 80, "learned": 900, "tokens": 128}
    row |= {"before": 0.02, "after": 0.015, "kept": True, "calibration": [0.02, 0.016, 0.012], "seconds": 3.0}
    lost = {
        **row,
        "name": "model.layers.1",
        "after": 0.02,
        "kept": False,
        "calibration": [],
        "failed": "step 1: the loss is nan.",
    }
    layer = {**row, "name": "model.layers.0.self_attn.q_proj", "tuning": "signround", "span": "layer"}
    assert 'id="learned"' not in write_page(check_report(data, "report.json"), "m")
    text = write_page(check_report(data | {"tuned": [row, lost, layer]}, "report.json"), "m")
    page = check_page(text)
    section = text.split('<section id="learned">')[1].split("</section>")[0]
    assert (
        "block-ap: 1 of 2 blocks are better on held-out text and kept, their loss 25.0 % lower on average; 1 ended early"
        in section
    )
    assert "signround: 1 of 1 weights" in section
    assert "step 1: the loss is nan." in section
    assert ["-25.0 %" in section, "not kept" in section, section.count("<svg ")] == [True, True, 2]
    assert "step" in page.text("text")
