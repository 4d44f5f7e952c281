"""Generation is greedy, whatever a checkpoint's generation config asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lowbit.errors import LowbitError
from lowbit.evaluation.generate import generate_text
from tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

PROMPT, NEW = "ABC", 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "m"
    save_tiny(folder, "llama", num_hidden_layers=2)
    return folder


def most_likely(folder: Path, ends: tuple[int, ...] = (2,)) -> list[int]:
    """New tokens of the definition: the whole text again for each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    new: list[int] = []
    with torch.no_grad():
        while len(new) < NEW:
            new.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
            if new[-1] in ends:
                break
    return new


def text_of(new: list[int]) -> str:
    tokenizer = tiny_tokenizer()
    return tokenizer.decode(tokenizer(PROMPT).input_ids + new, skip_special_tokens=True)


CONFIGS = [
    {"num_beams": 3},
    {"do_sample": True, "temperature": 3.0, "top_k": 50, "top_p": 0.5},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 2.0},
    {"bad_words_ids": [[7], [8], [9]]},
    {"suppress_tokens": list(range(3, 60))},
    {"begin_suppress_tokens": list(range(3, 60))},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 2},
    {"min_length": 50, "min_new_tokens": 50},
    {"max_length": 4},
    {"max_new_tokens": 1},
    {"max_time": 1e-9},
    {"guidance_scale": 3.0},
    {"sequence_bias": [[[5], 100.0]]},
    {"exponential_decay_length_penalty": [1, 5.0]},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"stop_strings": ["A", "B", "C"]},
    {"num_return_sequences": 2, "num_beams": 2},
    {"output_scores": True, "return_dict_in_generate": True},
    {"some_field_of_the_future": 3},
]


@pytest.mark.parametrize("given", CONFIGS, ids=lambda given: "+".join(given))
def test_the_generation_config_does_not_change_the_search(given, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0, **given}))
    assert generate_text(folder, PROMPT, NEW) == text_of(most_likely(folder))


def test_it_ends_at_any_of_the_tokens_that_end_a_text(folder):
    whole = most_likely(folder)
    for ends in (whole[4], [90, whole[4]], [whole[6], whole[3]]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        given = tuple(ends) if isinstance(ends, list) else (ends,)
        expected = most_likely(folder, given)
        assert len(expected) < NEW
        assert generate_text(folder, PROMPT, NEW) == text_of(expected)


def test_without_a_generation_config_the_config_says_what_ends_a_text(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    original = (folder / "config.json").read_text()
    end = most_likely(folder)[5]
    (folder / "config.json").write_text(json.dumps({**json.loads(original), "eos_token_id": end}))
    assert generate_text(folder, PROMPT, NEW) == text_of(most_likely(folder, (end,)))
    (folder / "config.json").write_text(json.dumps({**json.loads(original), "repetition_penalty": 1.5}))
    assert generate_text(folder, PROMPT, NEW) == text_of(most_likely(folder))
    (folder / "config.json").write_text(original)


def test_inputs_that_the_model_does_not_take_are_not_given_to_it(folder, monkeypatch):
    real = PreTrainedTokenizerFast.__call__

    def more(self, text, **options):
        out = real(self, text, **options)
        out["token_type_ids"] = out["unknown_ids"] = out["input_ids"]
        return out

    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = generate_text(folder, PROMPT, NEW)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", more)
    assert generate_text(folder, PROMPT, NEW) == expected


def test_a_prompt_without_tokens_is_refused(folder, monkeypatch):
    real = PreTrainedTokenizerFast.__call__

    def none(self, text, **options):
        out = real(self, text, **options)
        out["input_ids"] = out["input_ids"][:0]
        return out

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", none)
    with pytest.raises(LowbitError, match="makes no token of the prompt 'ABC'"):
        generate_text(folder, PROMPT, NEW)


@pytest.mark.parametrize(
    "ends", ["x", {"a": 1}, [[1]], ["x"], 1.5, True, [True], float("inf"), float("-inf"), 2**63, 10**40, [2, None]]
)
@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
def test_ids_that_are_none_are_refused(field, ends, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, field: ends}))
    with pytest.raises(LowbitError) as caught:
        generate_text(folder, PROMPT, NEW)
    assert str(caught.value).isprintable()
    assert field in str(caught.value) or "generation_config.json" in str(caught.value)


@pytest.mark.parametrize("ends", [-1, [2, -1], [2, 2], 95, 2**40, []])
def test_ids_that_no_text_has_end_none(ends, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    ids = tuple(ends) if isinstance(ends, list) else (ends,)
    assert generate_text(folder, PROMPT, NEW) == text_of(most_likely(folder, ids))


@pytest.mark.parametrize(
    "content", ["[" * 10**5, '{"a": ' * 10**5, "[]", "3", "", "\x00", '{"watermarking_config": "x"}']
)
def test_a_generation_config_that_is_none_is_one_line(content, folder):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(LowbitError, match=r"generation_config\.json") as caught:
        generate_text(folder, PROMPT, 2)
    assert str(caught.value).isprintable()
