"""Text of any size, encoding and kind: streams equal the whole, conversations are rendered, bad rows are named."""

from __future__ import annotations

import codecs
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowbit.data import text, tokenization
from lowbit.data.chat import render
from lowbit.data.files import row_file, text_file
from lowbit.data.mixture import validation_order
from lowbit.errors import LowbitError

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


def byte_level(merges: tuple[tuple[str, str], ...] = (), bos: bool = False) -> Any:
    """Every byte is a token; with a template that renders ``<s>role: content</s>`` for each message."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(LETTERS)}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    out = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    out.chat_template = TEMPLATE
    return out


def sentence_piece_like() -> Any:
    """As Llama 2: no words, a space in front of every text, merges over spaces and line ends."""
    pairs = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "b"), ("▁", "▁"), ("\n", "\n"), ("\n", "▁"), ("ab", "\n")]
    vocab = {c: i for i, c in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz▁\n."])}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(pairs)}
    core = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# --- long texts


def _prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    pieces = ["the ", "ab ", "ab\n", "\n\n", "  ", "cab. ", "the\n", "q" * 5 + " "]
    return "".join(rng.choices(pieces, k=words))


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level((("a", "b"), ("Ċ", "Ċ"), ("Ġ", "a"), ("t", "h"), ("th", "e"))), sentence_piece_like()],
    ids=["byte level", "sentence piece"],
)
def test_ids_of_pieces_are_those_of_the_whole(tokenizer: Any) -> None:
    for seed in range(4):
        prose = _prose(seed, 4000)
        whole = tokenization.encode(tokenizer, prose)
        parts = [prose[i : i + 700] for i in range(0, len(prose), 700)]
        pieces = list(tokenization.encode_parts(tokenizer, parts, piece=2000))
        assert len(pieces) > 3
        assert torch.cat(pieces).tolist() == whole


def test_a_text_without_any_good_cut_is_one_piece() -> None:
    """One word of merges that hang together: cutting anywhere would change the ids, so nothing is cut."""
    merges = [("a", "a")]
    for _ in range(12):
        merges.append((merges[-1][0] + merges[-1][1],) * 2)
    tokenizer, prose = byte_level(tuple(merges)), "a" * 3001
    pieces = list(tokenization.encode_parts(tokenizer, [prose], piece=700))
    assert torch.cat(pieces).tolist() == tokenization.encode(tokenizer, prose)


def test_a_long_text_is_drawn_from_without_tokenizing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = " ".join(f"{i:06d}" for i in range(40_000))
    path, tok = written(tmp_path, "a.txt", numbers), byte_level()
    monkeypatch.setattr(text, "WHOLE", 1000)
    seen: list[int] = []
    real = tokenization.encode
    monkeypatch.setattr(tokenization, "encode", lambda t, s: (seen.append(len(s)), real(t, s))[1])
    drawn = text.calibration(path, tok, 20, 14, 3)
    assert sum(seen) < len(numbers) / 2
    windows = [tok.decode(row) for row in drawn.ids]
    assert all(window == numbers[(i := 7 * int(window[:6])) : i + 14] for window in windows)
    starts = sorted(int(window[:6]) for window in windows)
    assert starts[0] < 10_000
    assert starts[-1] > 30_000
    assert drawn.hash == text.calibration(path, tok, 20, 14, 3).hash != text.calibration(path, tok, 20, 14, 4).hash
    rows = "\n".join(json.dumps({"text": f"{i:06d} {i:06d}"}) for i in range(9000))
    drawn = text.calibration(written(tmp_path, "a.jsonl", rows), tok, 5, 13, 3)
    assert all(len({*tok.decode(row).split()}) == 1 for row in drawn.ids)


def test_evaluation_reads_no_further_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tok = written(tmp_path, "a.txt", _prose(0, 400_000)), byte_level()
    seen: list[int] = []
    real = tokenization.encode
    monkeypatch.setattr(tokenization, "encode", lambda t, s: (seen.append(len(s)), real(t, s))[1])
    assert text.evaluation(path, tok, 32, 64).ids.shape == (2, 32)
    assert sum(seen) < 1.5 * tokenization.PIECE


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_encodings_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    prose = "zwölf Boxkämpfer 🥊 日本語のテキスト\n" * 3000
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    file = text_file(Path(written(tmp_path, "a.txt", mark + prose.encode(encoding))))
    assert "".join(file.parts()) == prose
    for position in range(file.size // 2, file.size // 2 + 60):
        rest = "".join(file.parts(position))
        assert prose.endswith(rest)
        assert prose[-len(rest) - 1].isspace()
        assert "".join(file.parts(position, lines=True)).startswith("zwölf")


def test_other_encodings_are_refused_with_their_place(tmp_path: Path) -> None:
    prose = b"abc " * 40_000 + b"caf\xe9 au lait"
    path = written(tmp_path, "a.txt", prose)
    with pytest.raises(LowbitError, match=f"is not UTF-8 at byte {prose.index(0xE9)}: convert it"):
        text.evaluation(path, byte_level(), 16)
    with pytest.raises(LowbitError, match="is not UTF-16 at byte"):
        text.evaluation(written(tmp_path, "b.txt", codecs.BOM_UTF16_LE + b"\x00\xd8a"), byte_level(), 2)


def test_half_of_a_character(tmp_path: Path) -> None:
    tok = byte_level()
    path = written(tmp_path, "a.jsonl", '{"text": "ab \\ud83d cd"}\n')
    assert tok.decode(text.evaluation(path, tok, 8).ids[0]) == "ab \ufffd cd"[:6]
    assert text.evaluation(text.corpora(["ab \ud83d cd"])[0], tok, 8).ids.shape == (1, 8)


# --- lists


def test_texts_and_paths_are_data(tmp_path: Path) -> None:
    tok, path = byte_level(), Path(written(tmp_path, "a.txt", "ab cd " * 40))
    assert text.evaluation(path, tok, 8).hash == text.evaluation(str(path), tok, 8).hash
    (given,) = text.corpora(["ab cd", "ef gh"])
    assert tok.decode(text.evaluation(given, tok, 12).ids[0]) == "ab cd\n\nef gh"
    assert text.calibration(["ab cd", "ef gh"], tok, 2, 6, 0).corpus == str(given)
    assert text.corpora([path, "builtin"]) == (str(path), "builtin")
    for wrong in ([], [1], "wrong", ["wrong"], ["ab cd", str(path)]):
        with pytest.raises(LowbitError):
            text.calibration(wrong, tok, 1, 4, 0)


def test_windows_come_from_several_corpora_in_turn(tmp_path: Path) -> None:
    tok = byte_level()
    paths = [written(tmp_path, f"{c}.txt", c * 50) for c in "xyz"]
    drawn = text.calibration(paths, tok, 6, 5, 0)
    assert [f"{tok.decode(row)[0]}.txt" for row in drawn.ids] == list(drawn.kinds)
    # Position 2 is the first of validation: see ``mixture.validation_order``; the windows are placed along it.
    order = validation_order(6).tolist()
    assert [tok.decode(drawn.ids[position]) for position in order] == ["xxxxx", "yyyyy", "zzzzz"] * 2
    assert drawn.corpus == "x.txt + y.txt + z.txt"


# --- conversations

QUESTION, ANSWER = "abc?", "def."
CHAT = f"<s>user: {QUESTION}</s><s>assistant: {ANSWER}</s>"
ROWS = {
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "share": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "roles in conversations": {
        "conversations": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "abc"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "prompt": {"prompt": QUESTION, "completion": ANSWER},
    "prompt of messages": {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": ANSWER}],
    },
    "response": {"prompt": QUESTION, "response": ANSWER},
    "instruction": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "question": {"question": QUESTION, "answer": ANSWER},
}


@pytest.mark.parametrize("name", ROWS)
def test_conversations_are_rendered(tmp_path: Path, name: str) -> None:
    tok = byte_level()
    lines = written(tmp_path, "a.jsonl", "\n".join([json.dumps(ROWS[name])] * 3))
    listed = written(tmp_path, "a.json", json.dumps([ROWS[name]] * 3))
    length = len(tok(CHAT, add_special_tokens=False)["input_ids"])
    for path in (lines, listed):
        assert [tok.decode(row) for row in text.evaluation(path, tok, length).ids] == [CHAT] * 3
        drawn = text.calibration(path, tok, 4, 2 * length, 0).ids  # longer than one: the next follow
        assert [tok.decode(row) for row in drawn] == [CHAT * 2] * 4


def test_parquet_conversations(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.table({"messages": [ROWS["messages"]["messages"]] * 3, "id": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    tok = byte_level()
    drawn = text.calibration(str(tmp_path / "a.parquet"), tok, 2, 20, 0)
    assert [tok.decode(row) for row in drawn.ids] == [tok.decode(tok(CHAT)["input_ids"][:20])] * 2


def test_input_and_system_are_part_of_a_conversation(tmp_path: Path) -> None:
    tok = byte_level()
    row = {"instruction": "abc", "input": "x", "output": "y", "system": "be kind"}
    chat = "<s>system: be kind</s><s>user: abc\n\nx</s><s>assistant: y</s>"
    path = written(tmp_path, "a.jsonl", json.dumps(row))
    length = len(tok(chat, add_special_tokens=False)["input_ids"])
    assert tok.decode(text.evaluation(path, tok, length).ids[0]) == chat


def test_a_window_starts_with_a_conversation_and_one_bos(tmp_path: Path) -> None:
    """The template writes BOS itself; a tokenizer that adds one does not make it two."""
    tok = byte_level(bos=True)
    rows = [{"prompt": f"{i:04d}", "completion": "z" * random.Random(i).randrange(90)} for i in range(50)]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    drawn = text.calibration(path, tok, 12, 16, 0)
    assert all(tok.decode(row).startswith("<s>user: 00") for row in drawn.ids)
    assert drawn.ids[:, 1].tolist() != [1] * 12
    tok.chat_template = TEMPLATE.replace("<s>", "")  # now it does not
    drawn = text.calibration(path, tok, 12, 16, 0)
    assert all(tok.decode(row).startswith("<s>user: 00") for row in drawn.ids)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": []}, "'messages' is not a list of messages"),
        ({"messages": ["abc"]}, "a message is no object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "content is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content is not text"),
        ({"prompt": "abc"}, "is not a JSON object with a 'text', or a conversation"),
        ({"prompt": "abc", "completion": 3}, "'completion' is not a list of messages"),
        ({"text": "abc"}, "text and conversations are mixed"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, row: Any, told: str) -> None:
    path = written(tmp_path, "a.jsonl", "\n".join(json.dumps(r) for r in (ROWS["prompt"], row)))
    with pytest.raises(LowbitError) as error:
        text.evaluation(path, byte_level(), 64)
    assert told in str(error.value)
    assert "line 2" in str(error.value)


def test_templates_that_are_missing_or_refuse(tmp_path: Path) -> None:
    path, tok = written(tmp_path, "a.jsonl", json.dumps(ROWS["prompt"])), byte_level()
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LowbitError, match=r"line 1: the chat template refuses .*roles must alternate"):
        text.calibration(path, tok, 1, 8, 0)
    tok.chat_template = None
    with pytest.raises(LowbitError, match="line 1 is a conversation, and the tokenizer has no chat template"):
        text.calibration(path, tok, 1, 8, 0)


@pytest.mark.parametrize(("format", "date"), [("%Y-%m-%d", "2024-07-26"), ("%d %b %Y", "26 Jul 2024")])
def test_a_conversation_gives_the_same_tokens_on_every_day(format: str, date: str) -> None:
    tok = byte_level()
    # As Llama 3.2's and gpt-oss's do, here inside a macro.
    tok.chat_template = (
        f"\n{{% macro day() %}}{{{{ strftime_now('{format}') }}}}{{% endmacro %}}Today: {{{{ day() }}}}"
    )
    assert render([{"role": "user", "content": "a"}], tok, "line 1").strip() == f"Today: {date}"


def test_json_that_is_no_list(tmp_path: Path) -> None:
    for content, told in (("{}", "not a JSON list"), ("[1", "not JSON"), ("[" * 100_000, "not JSON")):
        with pytest.raises(LowbitError, match=told):
            row_file(Path(written(tmp_path, "a.json", content)), ())
