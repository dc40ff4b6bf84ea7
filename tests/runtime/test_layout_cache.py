"""Kept layouts: the same answers as without, no torch the second time, and never a copy that is not whole or not of this model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitpress import native
from bitpress.checkpoints.mapped_tree import read_prepared, write_prepared
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.errors import CheckpointError, DiskError
from bitpress.runtime.native import layout_cache
from bitpress.runtime.native.options import EngineOptions
from bitpress.runtime.native.plain_tokenizer import PlainTokenizer
from bitpress.runtime.opening import OpenedModel, load_native
from bitpress.runtime.prompt import encode_prompt

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")
MESSAGES = [
    {"role": "user", "content": "Grüße <|end|>"},
    {"role": "assistant", "content": " ja\n"},
    {"role": "user", "content": "x"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    at = tmp_path / "layouts"
    monkeypatch.setenv("BITPRESS_LAYOUTS", str(at))
    return at


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


def mapped(monkeypatch: pytest.MonkeyPatch, directory: Path, **options: Any) -> bool:
    """Load and say whether a kept layout was used."""
    from bitpress.runtime.native import assemble as assemble

    laid_out = []
    real = assemble.lay_out_directory
    monkeypatch.setattr(assemble, "lay_out_directory", lambda *a, **k: laid_out.append(1) or real(*a, **k))
    load_native(directory, EngineOptions.of(options))
    monkeypatch.setattr(assemble, "lay_out_directory", real)
    return not laid_out


# ---- files ----

TREE: dict[str, Any] = {
    "a": np.arange(7, dtype=np.uint8),
    "b": [np.ones((3, 5), np.float32), None, 2.5, "text", {"c": np.zeros(0, np.int64)}],
}


def test_a_tree_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    assert write_prepared(path, TREE) == path.stat().st_size
    back = read_prepared(path)
    np.testing.assert_array_equal(back["a"], TREE["a"])
    np.testing.assert_array_equal(back["b"][0], TREE["b"][0])
    assert back["b"][1:4] == [None, 2.5, "text"]
    assert back["b"][4]["c"].shape == (0,)
    assert back["b"][0].ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        back["a"][0] = 1


@pytest.mark.parametrize("where", ["magic", "length", "header", "array", "cut", "empty"])
def test_a_damaged_file_is_refused(where: str, tmp_path: Path) -> None:
    path = tmp_path / "tree"
    write_prepared(path, TREE)
    data = bytearray(path.read_bytes())
    if where in ("cut", "empty"):
        data = data[: len(data) - 4097 if where == "cut" else 0]
    else:
        at = {"magic": 3, "length": 20, "header": 30, "array": len(data) - 4096 - 64 + 8}[where]
        data[at] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        read_prepared(path)


# ---- models ----


@needs_native
def test_the_second_load_maps_and_says_the_same(pressed_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_native(pressed_dir)
    assert mapped(monkeypatch, pressed_dir)
    second = load_native(pressed_dir)
    for raw in (True, False):
        answers = [text.complete("The sky", max_tokens=12, raw=raw) for text in (first, second)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].text == answers[1].text
    assert isinstance(second.tokenizer, PlainTokenizer)
    assert second.encode(MESSAGES) == first.encode(MESSAGES)
    assert second.facts == first.facts
    assert OpenedModel(pressed_dir).select().runtime == "native"


@needs_native
def test_another_head_is_another_layout(pressed_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_native(pressed_dir)
    assert not mapped(monkeypatch, pressed_dir, head="keep")
    assert len(kept(folder)) == 2


@needs_native
def test_a_damaged_layout_is_made_again(pressed_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load_native(pressed_dir).complete("The sky", max_tokens=8).token_ids
    [path] = kept(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not mapped(monkeypatch, pressed_dir)
    assert mapped(monkeypatch, pressed_dir)
    assert load_native(pressed_dir).complete("The sky", max_tokens=8).token_ids == wanted


@needs_native
def test_a_directory_that_changed_is_read_itself(pressed_dir: Path, folder: Path) -> None:
    load_native(pressed_dir)
    manifest = pressed_dir / "bitpress.json"
    shard = next(pressed_dir.glob("*.safetensors"))
    shard.rename(pressed_dir / "away")
    with pytest.raises(CheckpointError):
        load_native(pressed_dir)
    (pressed_dir / "away").rename(shard)
    load_native(pressed_dir)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"left_out": ["more"]}))
    assert not OpenedModel(pressed_dir).has_layout("int8-g64")


@needs_native
def test_a_full_disk_keeps_nothing_and_loads(pressed_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise DiskError("no room")

    monkeypatch.setattr(layout_cache, "write_prepared", full)
    assert load_native(pressed_dir).complete("The sky", max_tokens=2).tokens
    assert not kept(folder)


@needs_native
def test_off_keeps_nothing(pressed_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_LAYOUTS", "off")
    load_native(pressed_dir)
    assert not mapped(monkeypatch, pressed_dir)
    assert not kept(folder)


@needs_native
def test_the_oldest_are_forgotten(pressed_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_cache, "MOST_LAYOUTS", 2)
    for head in ("keep", "int8-row", "int8-g64"):
        load_native(pressed_dir, EngineOptions(head=head))
    assert len(kept(folder)) == 2
    assert [OpenedModel(pressed_dir).has_layout(head) for head in ("keep", "int8-row", "int8-g64")] == [False, True, True]


@needs_native
def test_running_a_kept_layout_imports_neither_torch_nor_transformers(pressed_dir: Path, folder: Path) -> None:
    load_native(pressed_dir)
    code = (
        "import sys; from bitpress.cli.app import app; sys.argv[1:] = sys.argv[1:]\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    for more in (
        ["run", str(pressed_dir), "--prompt", "Hello", "--max-tokens", "4"],
        ["bench", "decode", str(pressed_dir), "--tokens", "2"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr


# ---- tokenizers ----

TEMPLATES = {
    "plain": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}",
    "tags": "{% for m in messages %}{% generation %}{{ m.content | upper }}{% endgeneration %}{% break %}{% endfor %}",
    "special": "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}{{ eos_token }}",
    "json": "{{ messages | tojson(indent=2) }}{{ dict(a='<') | tojson }}",
    "dictionary": "{{ dict(a=1) }}{{ dict.fromkeys(['x', 'y'], 2) }}{{ dict.fromkeys('ab') }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{% endfor %}",
    "day": "{{ strftime_now('%Y') }}{% if tools is none %}no tools{% endif %}",
}


@pytest.fixture
def tokenizer(pressed_dir: Path) -> Any:
    return load_tokenizer(pressed_dir)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_what_transformers_gives(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    plain = PlainTokenizer.of(tokenizer)
    assert plain is not None
    back = PlainTokenizer.from_tree(plain.as_tree())
    assert back.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False
    )
    assert encode_prompt(back, MESSAGES) == encode_prompt(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ dict.__init__ }}{{ dict.update({}) }}", "unsafe|no attribute"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "__class__"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe|append"),
    ],
)
def test_templates_stay_in_their_sandbox(template: str, says: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    plain = PlainTokenizer.of(tokenizer)
    assert plain is not None
    with pytest.raises(CheckpointError, match=says):
        encode_prompt(plain, MESSAGES)


def test_a_tokenizer_that_does_more_is_not_taken(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def more(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5]}

    class Other:
        backend_tokenizer = tokenizer.backend_tokenizer
        chat_template = None
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012
        eos_token_id = 1
        __call__: Callable[..., Any] = staticmethod(more)

    assert PlainTokenizer.of(Other()) is None
    tokenizer.chat_template = {"default": "x", "tools": 3}
    assert PlainTokenizer.of(tokenizer) is None


@needs_native
def test_a_rotated_model_keeps_its_codes_and_its_layout(
    tiny_model: Callable[..., Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import bitpress
    from bitpress.pipeline.quantize import Proof, quantize_directory
    from bitpress.recipes import make_recipe

    recipe = make_recipe({"weights": "int4-g16", "transforms": ["hadamard"], "quantizer": "rtn"})
    out = tmp_path / "rotated"
    quantize_directory(tiny_model("llama"), out, recipe, proof=Proof(tokens=0))
    first = load_native(out, EngineOptions(activations="none", head="keep"))
    assert first.facts["expanded"] == []
    tokens = list(range(6, 30))
    with torch.no_grad():
        wanted = bitpress.load(out, runtime="transformers")(torch.tensor([tokens])).logits[0, -1].float()
    made = first.engine.forward(tokens)[-1]
    assert float((made - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())
    assert mapped(monkeypatch, out, activations="none", head="keep")
    second = load_native(out, EngineOptions(activations="none", head="keep"))
    answers = [text.complete("The sky", max_tokens=12).token_ids for text in (first, second)]
    assert answers[0] == answers[1]
