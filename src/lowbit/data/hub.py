"""Data sets of the literature on the hub, read from files that need no remote code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.data.files import PATHS
from lowbit.errors import LowbitError, MissingExtra


@dataclass(frozen=True)
class HubText:
    """A data set on the hub; pairs are for (calibration, evaluation); ``joint`` joins documents if given.

    ``kind`` is its kind of text: data sets and built-in texts of one kind count as the same.
    """

    kind: str
    repo: str
    column: str
    joint: str | None
    splits: tuple[str, str]
    files: tuple[str, str] | None = None
    revision: str | None = None
    config: str | None = None


_PTB = ("penn_treebank/train/0000.parquet", "penn_treebank/test/0000.parquet")  # the main revision is a script
_C4 = ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")
HUB = {
    "wikitext2": HubText(
        "wiki", "Salesforce/wikitext", "text", "\n\n", ("train", "test"), config="wikitext-2-raw-v1"
    ),
    "ptb": HubText(
        "ptb", "ptb-text-only/ptb_text_only", "sentence", " ", ("train", "test"), _PTB, "refs/convert/parquet"
    ),
    "c4": HubText("c4", "allenai/c4", "text", None, ("train", "validation"), _C4),
}


def hub_documents(hub: HubText, part: int) -> Sequence[str]:
    """The documents of a split (``part`` 0: calibration, 1: evaluation), read when indexed."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data", f"the data set {hub.repo}") from error
    split = hub.splits[part]
    options = {"data_files": {split: hub.files[part]}} if hub.files else {}
    try:  # no checks: a single file does not have the size that the data set states
        rows = datasets.load_dataset(
            hub.repo, hub.config, split=split, revision=hub.revision, verification_mode="no_checks", **options
        )
        documents: Sequence[str] = rows[hub.column]
    except Exception as error:  # datasets, the hub client and httpx share no base class
        reason = "the hub cannot be reached" if isinstance(error, ConnectionError) else "loading failed"
        raise LowbitError(f"cannot load {hub.repo}: {reason} ({error!r}); give 'builtin' or {PATHS}") from error
    return documents
