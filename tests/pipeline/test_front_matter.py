"""The head of the model card: what the source says is taken over, what it does not say is left out, and it is always YAML."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitpress.checkpoints.named import NAMED_MODELS, find_origin
from bitpress.pipeline.front_matter import front_matter, write_front_matter
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.settings import cache_directory

ALWAYS = {"library_name": "bitpress", "pipeline_tag": "text-generation", "tags": ["quantized", "bitpress", "int4-g16"]}


def head_of(card: str) -> dict[str, Any]:
    fence, head, _ = card.split("---\n", 2)
    assert fence == ""
    keys = yaml.safe_load(head)
    assert isinstance(keys, dict)
    return keys


def test_the_published_card_says_what_the_source_says(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'so: so'\nlanguage: [en, no]\ndatasets:\n- a/b\nlibrary_name: transformers\n"
        "base_model: org/base\npipeline_tag: image-text-to-text\nwidget: {text: x}\n---\n# Model\n",
        encoding="utf-8",
    )
    recipe = make_recipe({"weights": "int4-g16", "quantizer": "rtn"})
    quantize_directory(model, tmp_path / "out", recipe, proof=Proof(tokens=0))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    said = {"license": "other", "license_name": "so: so", "language": ["en", "no"], "datasets": ["a/b"]}
    assert head_of(card) == ALWAYS | said | {"base_model": "org/base", "base_model_relation": "quantized"}
    assert card.split("---\n", 2)[2].startswith("# out\n")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# No head\n",
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: {a: b}\nlanguage: 3\ndatasets: [{x: y}]\nbase_model: []\n---\n",
        "---\nlicense: mit\n",
        "---\nlicense: " + "x" * 600 + "\n---\n",
        "---\nlicense: 2026-13-45\n---\n",
        b"---\nlicense: \xff\n---\n",
        b"\0" * 100,
    ],
    ids=range(10),
)
def test_a_card_that_says_nothing_usable_is_no_error(card: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert front_matter(tmp_path, "int4-g16") == ALWAYS


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes("\ufeff---\r\nlicense: mit\r\nlanguage: no\r\n---\r\ntext".encode())
    assert front_matter(tmp_path, "int4-g16") == ALWAYS | {"license": "mit", "language": "no"}
    assert head_of(write_front_matter(front_matter(tmp_path, "int4-g16")) + "\n")["language"] == "no"


def test_where_the_name_of_the_source_comes_from(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--a.model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nbase_model: org/base\n---\n")
    assert front_matter(snapshot, "int4-g16")["base_model"] == "some-org/a.model"
    for name, base in (("org/model", "org/model"), ("/home/me/model", None), ("model", None), (3, None)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": name}))
        assert front_matter(tmp_path, "int4-g16").get("base_model") == base


def test_a_named_model_has_its_name_and_licence_from_the_table() -> None:
    for name, entry in NAMED_MODELS.items():
        keys = front_matter(cache_directory() / "models" / name, "int4-g16")
        assert (keys["base_model"], keys["license"]) == (entry.hub, entry.licence.lower())
    assert find_origin(Path("elsewhere")) is None
