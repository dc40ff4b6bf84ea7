"""Texts and windows, with a tokenizer of one token a byte, so that every count can be done by hand."""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitpress.calibration import samples
from bitpress.calibration.samples import Document, builtin_texts, read_texts, sample_windows
from bitpress.errors import CalibrationError, UsageError

TEXTS = Path(samples.__file__).parent / "texts"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
BOS, EOS = 256, 257


def make_tokenizer(*, bos: bool = False, eos: bool = True, template: str | None = TEMPLATE, limit: int | None = None) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"bos_token": "<bos>"} | ({"eos_token": "<eos>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    if limit is not None:
        tokenizer.model_max_length = limit
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def numbered(kind: str, count: int) -> Document:
    """A text of `count` lines of 10 bytes that are all different."""
    return Document(kind, "".join(f"{kind[0]}{i:08d}\n" for i in range(count)))


def test_builtin_texts_are_the_declared_ones() -> None:
    entries = json.loads((TEXTS / "texts.json").read_text("utf-8"))
    for entry in entries:
        assert hashlib.sha256((TEXTS / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert {str(p.relative_to(TEXTS)) for p in TEXTS.glob("*/*")} == {entry["file"] for entry in entries}
    for role in ("calibration", "heldout"):
        assert set(builtin_texts(role)) == {entry["kind"] for entry in entries if entry["role"] == role}
    first, second = (TEXTS / f"calibration/fiction-{name}.txt" for name in ("doyle", "twain"))
    joined = first.read_text("utf-8").strip("\n") + "\n\n" + second.read_text("utf-8").strip("\n")
    assert builtin_texts("calibration")["fiction"] == joined


def test_roles_share_no_paragraph() -> None:
    calibration, heldout = (
        {part for text in builtin_texts(role).values() for part in text.split("\n\n") if len(part) > 100}
        for role in ("calibration", "heldout")
    )
    assert calibration
    assert heldout
    assert not calibration & heldout


def test_builtin_specs() -> None:
    assert [d.kind for d in read_texts("builtin")] == list(builtin_texts("calibration"))
    assert [d.kind for d in read_texts("builtin:heldout")] == list(builtin_texts("heldout"))
    (one,) = read_texts("builtin:heldout:reference")
    assert one == Document("reference", builtin_texts("heldout")["reference"])
    with pytest.raises(UsageError, match="Did you mean 'heldout'"):
        read_texts("builtin:heldoud")
    with pytest.raises(UsageError, match="'poems'"):
        read_texts("builtin:calibration:poems")


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo é", "utf-8")
    assert read_texts(str(tmp_path / "a.txt")) == [Document("a", "one\n\ntwo é")]
    rows = [{"text": "one", "id": 3}, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    messages = (("user", "hi"), ("assistant", "ho"))
    assert read_texts(str(tmp_path / "b.jsonl")) == [Document("b", "one"), Document("b", messages=messages)]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("a.json", b"{}", "unknown text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n["text"]', "line 2: must be an object"),
        ("a.jsonl", b'{"text": "x", "messages": []}', "line 1: must be an object with either"),
        ("a.jsonl", b'{"text": 3}', "line 1: text must be a string"),
        ("a.jsonl", b'{"text": ""}', "line 1: text must be a string that is not empty"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: text holds half of a surrogate"),
        ("a.jsonl", b'{"messages": []}', "line 1: messages must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: every message"),
        ("a.jsonl", b'{"messages": [{"role": 1, "content": "x"}]}', "line 1: role must be"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=text) as caught:
        read_texts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name, text in (("none.txt", "does not exist"), ("folder.txt", "not a regular file")):
        with pytest.raises(CalibrationError, match=text):
            read_texts(str(tmp_path / name))


def test_hub_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []
    fake = ModuleType("datasets")

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((*args, options["split"]))
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **options: None)
    assert read_texts("hf:org/set:small:test") == [Document("org/set", "one"), Document("org/set", "two")]
    read_texts("hf:org/set")
    assert asked == [("org/set", "small", "test"), ("org/set", None, "train")]

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(CalibrationError, match="cannot be fetched from the hub: no network Use") as caught:
        read_texts("hf:org/set")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"install bitpress\[datasets\]"):
        read_texts("hf:org/set")
    with pytest.raises(CalibrationError, match="must be hf:NAME"):
        read_texts("hf:a:b:c:d")


def test_windows_are_cut_from_the_text_and_do_not_overlap(tokenizer: Any) -> None:
    documents = [numbered("a", 100), numbered("b", 100)]
    windows = sample_windows(documents, tokenizer, samples=8, length=50, seed=0)
    assert windows.inputs.shape == (8, 50)
    assert windows.inputs.dtype == torch.int64
    assert windows.kinds == ("a", "b") * 4
    texts = [tokenizer.decode(row) for row in windows.inputs]
    for text, kind in zip(texts, windows.kinds, strict=True):
        source = documents["ab".index(kind)].text
        assert source is not None
        assert source.index(text) % 50 == 0
    assert len(set(texts)) == 8
    assert windows.sha256 == hashlib.sha256(windows.inputs.numpy().tobytes()).hexdigest()


def test_seed_decides(tokenizer: Any) -> None:
    documents = [numbered("a", 200), numbered("b", 200)]
    first, again, other = (sample_windows(documents, tokenizer, samples=6, length=20, seed=s) for s in (1, 1, 2))
    assert first.sha256 == again.sha256
    assert torch.equal(first.inputs, again.inputs)
    assert first.sha256 != other.sha256


def test_held_out_windows_come_after_the_others_and_change_none(tokenizer: Any) -> None:
    documents = [numbered("a", 40), numbered("b", 40)]
    alone = sample_windows(documents, tokenizer, samples=8, length=20, seed=1)
    both = sample_windows(documents, tokenizer, samples=8, length=20, seed=1, held_out=3)
    assert alone.held_out is None
    assert torch.equal(both.inputs, alone.inputs)
    assert (both.sha256, both.kinds) == (alone.sha256, alone.kinds)
    assert both.held_out is not None
    assert len(both.held_out) == 3
    assert not {tuple(w) for w in both.held_out.tolist()} & {tuple(w) for w in both.inputs.tolist()}
    all_of_it = sample_windows(documents, tokenizer, samples=38, length=20, seed=1, held_out=4)
    assert all_of_it.held_out is not None
    assert len(all_of_it.held_out) == 2, "the text has 40 windows"


def test_short_kind_is_made_up_for(tokenizer: Any) -> None:
    windows = sample_windows([numbered("a", 100), numbered("b", 10)], tokenizer, samples=10, length=50, seed=0)
    assert windows.kinds == ("a", "b", "a", "b", *"aaaaaa")


def test_every_window_begins_as_the_tokenizer_does() -> None:
    windows = sample_windows([numbered("a", 100)], make_tokenizer(bos=True), samples=5, length=20, seed=0)
    assert (windows.inputs[:, 0] == BOS).all()
    assert (windows.inputs[:, 1:] != BOS).all()


def test_documents_are_parted(tokenizer: Any) -> None:
    documents = [Document("a", "x" * 20), Document("a", "y" * 19)]
    ids = sample_windows(documents, tokenizer, samples=1, length=40, seed=0).inputs[0].tolist()
    assert ids.count(EOS) == 1
    assert ids.index(EOS) in (19, 20)
    text = make_tokenizer(eos=False).decode(
        sample_windows(
            [Document("a", "x" * 20), Document("a", "y" * 18)], make_tokenizer(eos=False), samples=1, length=40, seed=0
        ).inputs[0]
    )
    assert text in ("x" * 20 + "\n\n" + "y" * 18, "y" * 18 + "\n\n" + "x" * 20)


def test_large_text_is_tokenized_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "PIECE", 200)
    lengths: list[int] = []

    class Watching:
        bos_token_id, eos_token_id, model_max_length = None, EOS, 10**30

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    windows = sample_windows([numbered("a", 1000)], Watching(), samples=3, length=50, seed=0)
    assert max(lengths) <= 200
    assert sum(lengths) < 4 * samples.SPARE * 3 * 50  # not to the end
    assert windows.inputs.shape == (3, 50)
    assert "".join(samples._split("word " * 500, 200)) == "word " * 500


def test_chat_puts_passages_into_the_template(tokenizer: Any) -> None:
    windows = sample_windows([numbered("a", 200)], tokenizer, samples=6, length=100, seed=0, chat=True)
    texts = [tokenizer.decode(row) for row in windows.inputs]
    # A passage is about two windows long at one character a token, so that three windows in a row meet a mark.
    assert sum("<user>" in text or "</>" in text for text in texts) >= 2
    conversation = [Document("c", messages=(("user", "hi" * 9), ("assistant", "ho" * 9)))]
    rendered = "<user>" + "hi" * 9 + "</><assistant>" + "ho" * 9 + "</>"
    ids = sample_windows(conversation, tokenizer, samples=1, length=len(rendered), seed=0).inputs[0]
    assert tokenizer.decode(ids) == rendered


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no system role') }}", "{% for %}", "{{ ''.__class__.x() }}"])
def test_template_that_does_not_work(template: str | None) -> None:
    documents = [Document("c", messages=(("user", "hello"),))]
    with pytest.raises(CalibrationError, match="chat template"):
        sample_windows(documents, make_tokenizer(template=template), samples=1, length=2, seed=0)


def test_too_little_text_says_how_much_there_is(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="has 1000 tokens, enough for 20 windows of 50, but 21 are needed"):
        sample_windows([numbered("a", 100)], tokenizer, samples=21, length=50, seed=0)
    assert len(sample_windows([numbered("a", 100)], tokenizer, samples=20, length=50, seed=0).kinds) == 20
    with pytest.raises(CalibrationError, match="no text"):
        sample_windows([], tokenizer, samples=1, length=2, seed=0)


@pytest.mark.parametrize(("counts", "text"), [((0, 9), "samples=0"), ((1, 1), "length=1"), ((1, 33), "context is 32 tokens")])
def test_impossible_sizes(counts: tuple[int, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        sample_windows([numbered("a", 100)], make_tokenizer(limit=32), samples=counts[0], length=counts[1], seed=0)


def test_no_word_about_long_sequences(capfd: pytest.CaptureFixture[str]) -> None:
    sample_windows([numbered("a", 100)], make_tokenizer(limit=32), samples=5, length=32, seed=0)
    assert capfd.readouterr() == ("", "")
