"""The report and the card hold the bytes of the directory that they are a part of."""

import json
from typing import Any

import pytest

from bitpress.models.tasks.causal_lm import CausalLM
from bitpress.pipeline import report as module
from bitpress.pipeline.report import write_texts_


def test_the_sum_holds_whatever_its_digits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def card(report: Any, *_: object) -> str:
        return f"{report['size']['bytes']} of {report['size']['bytes_original']}, {report['size']['ratio']!r}\n"

    monkeypatch.setattr(module, "make_card", card)
    for others in range(900, 1500):
        report = {"size": {"bytes_original": 777_777}}
        texts = write_texts_(report, "model", {}, CausalLM(), others)
        assert json.loads(texts["report.json"])["size"]["bytes"] == others + sum(map(len, texts.values()))
        assert texts["README.md"].startswith(str(report["size"]["bytes"]).encode())
        assert texts["README.md"].count(b"\n") < 48, "no more blank lines than digits of the ratio come and go, in two files"
