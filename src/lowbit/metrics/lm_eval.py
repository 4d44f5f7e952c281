"""Zero-shot tasks through EleutherAI's lm-eval, with a streamed model behind its interface.

Questions, answers, metrics and versions are lm-eval's own: its task configs are used unchanged, with the data set
replaced by the caller's documents. Scores equal those of lm-eval's Hugging Face class on the same documents (a test
compares them). This module is independent of the source of the documents and of the model.

The papers average over different tasks: QLLM over five, AffineQuant over six. Both report accuracy for PIQA, BoolQ
and WinoGrande and, judging by the values, length-normalized accuracy for HellaSwag and ARC, from older harness
versions: ``average`` gives both means, and neither is comparable with a paper's table.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, MissingExtra, one_line, panics_as_errors
from lowbit.metrics.loglikelihood import Stream, loglikelihoods

CONFIGS = {  # relative to lm-eval's folder of tasks
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
AVERAGES = {
    "qllm": ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"),
    "affinequant": ("piqa", "arc_easy", "winogrande", "boolq", "arc_challenge", "hellaswag"),
}


@dataclass(frozen=True)
class Measured:
    """Scores of one task.

    Attributes:
        metrics: by lm-eval's name: ``acc``, ``acc_norm`` (0 to 1), ``perplexity`` (infinite for a diverged model).
        errors: standard errors of the accuracies.
        documents: number of questions.
        version: version of lm-eval's task.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    documents: int
    version: float


def harness_version() -> str:
    """Version of the installed lm-eval; raises ``MissingExtra`` if it is missing."""
    _harness()
    return version("lm_eval")


def hub_set(task: str) -> tuple[str, str | None, str]:
    """A task's data set on the hub as in lm-eval's config: repository, configuration and evaluated split."""
    config = _config(task)
    return config["dataset_path"], config.get("dataset_name"), _split(config)


def measure(task: str, documents: Sequence[Mapping[str, Any]], lm: Any) -> Measured:
    """Evaluate one task on ``documents``, zero-shot; ``lm`` is from ``harness_model`` or any lm-eval model.

    Raises:
        LowbitError: documents that do not fit lm-eval's config of the task.
    """
    lm_eval = _harness()
    with _quiet():
        built = _task(task, documents)
        # No bootstrap: lm-eval prints to standard output during it, and accuracies do not need it.
        results = lm_eval.evaluator.evaluate(
            lm=lm, task_dict={"tasks": {task: built}, "groups": {}}, bootstrap_iters=0, log_samples=False
        )
    rows = {name.partition(",")[0]: value for name, value in results["results"][task].items()}
    metrics = {name: float(rows[name]) for name in ("acc", "acc_norm", "perplexity") if name in rows}
    count = len(built.eval_docs)
    errors = {name: standard_error(share, count) for name, share in metrics.items() if name != "perplexity"}
    return Measured(metrics, errors, count, float(built.VERSION))


def harness_model(model: Stream, tokenizer: Any, positions: int, title: str) -> Any:
    """A streamed model as lm-eval's ``LM``; it tokenizes as lm-eval's Hugging Face class does.

    ``positions`` is the maximum number of input tokens, ``title`` labels the progress bar.
    """
    _harness()
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix

    class Streamed(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
        """Log-likelihoods only: no task in ``CONFIGS`` needs generation or rolling log-likelihoods."""

        @property
        def eot_token_id(self) -> int:
            if tokenizer.eos_token_id is None:
                raise LowbitError(
                    f"the tokenizer in {tokenizer.name_or_path} has neither BOS nor EOS, which starts a task's text: "
                    "set one in tokenizer_config.json"
                )
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            first = tokenizer.bos_token_id
            return self.eot_token_id if first is None else int(first)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            try:
                with panics_as_errors():
                    return self._encode(string, add_special_tokens)
            except LowbitError:
                raise
            except Exception as error:  # the tokenizers library raises nothing narrower
                raise LowbitError(f"the tokenizer cannot encode a task's text: {one_line(error)}") from error

        def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
            if add_special_tokens is None and has_bos_prefix(string, tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
            options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer.encode(string, **options))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(model, [(context, answer) for _, context, answer in requests], positions, title)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            raise NotImplementedError("rolling likelihoods: lowbit evaluate --data measures perplexity")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            raise NotImplementedError("tasks that generate text are not supported")

    return Streamed()


def perplexity(log_likelihoods: Sequence[float]) -> float:
    """``exp`` of the mean loss, as in lm-eval, but infinite where that ends in an error: above ``exp(700)``.

    >>> perplexity([0.0, 0.0]), perplexity([-1e4, -1.0])
    (1.0, inf)
    """
    mean = -sum(log_likelihoods) / len(log_likelihoods)
    return math.exp(mean) if mean < 700 else math.inf


def average(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> dict[str, float] | None:
    """The plain mean over ``tasks`` of ``acc``, and of ``acc_norm`` where a task has it (else ``acc``).

    ``None`` if a task is missing.

    >>> average({"piqa": {"acc": 0.5, "acc_norm": 0.75}, "boolq": {"acc": 0.25}}, ["piqa", "boolq"])
    {'acc': 0.375, 'acc_norm': 0.5}
    """
    if any(task not in scores for task in tasks):
        return None
    rows = [scores[task] for task in tasks]
    return {
        "acc": sum(row["acc"] for row in rows) / len(rows),
        "acc_norm": sum(row.get("acc_norm", row["acc"]) for row in rows) / len(rows),
    }


def standard_error(share: float, count: int) -> float:
    """Standard error of an accuracy: ``sqrt(p (1 - p) / (n - 1))``, as in lm-eval; NaN for one answer.

    >>> standard_error(0.5, 101)
    0.05
    """
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
    except ImportError as error:
        raise MissingExtra("lm_eval", "eval", "--tasks") from error
    return lm_eval


def _config(task: str) -> dict[str, Any]:
    """lm-eval's config of a task, without its ``TaskManager``, which would read all 13,000 configs first."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(Path(_harness().__file__).parent / "tasks" / CONFIGS[task])
    return config


def _split(config: Mapping[str, Any]) -> str:
    return str(config.get("test_split") or config["validation_split"])


def _task(task: str, documents: Sequence[Mapping[str, Any]]) -> Any:
    """lm-eval's task over ``documents``, with its requests built."""
    import datasets
    import jinja2
    from lm_eval.api.task import ConfigurableTask

    class Local(ConfigurableTask):  # type: ignore[misc]
        """A task on the caller's documents."""

        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": rows}

        def aggregation(self) -> dict[str, Any]:
            own: dict[str, Any] = super().aggregation()
            return {name: perplexity if name == "perplexity" else theirs for name, theirs in own.items()}

        def build_all_requests(self, **options: Any) -> None:
            with redirect_stderr(io.StringIO()):  # hides a short progress bar that no option turns off
                super().build_all_requests(**options)

    config = {key: value for key, value in _config(task).items() if key != "tag"}
    process = config.pop("process_docs", None)
    config |= {"test_split": "test", "validation_split": None, "training_split": None, "num_fewshot": 0}
    try:
        with redirect_stderr(io.StringIO()):
            rows = datasets.Dataset.from_list([dict(document) for document in documents])
            rows = process(rows) if process else rows
        built = Local(config=config)
        built.set_fewshot_seed(0)  # lm-eval requires the generator even without shots
        built.build_all_requests()
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, jinja2.TemplateError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise LowbitError(f"lm-eval cannot build questions of {task} from these documents ({reason})") from error
    return built


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm-eval's warnings about its own configs."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
