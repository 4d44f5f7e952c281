"""Mutations of ``generation_config.json``: read by ``load`` and ``generate`` only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzzing.change import Change, Mutator, Random, short
from fuzzing.json_files import load, of_text, of_tree, store

GENERATION = "generation_config.json"
FIELDS: dict[str, tuple[Any, ...]] = {
    "assistant_confidence_threshold": ("x",),
    "bad_words_ids": ([[1]], [1], "x", []),
    "begin_suppress_tokens": ([1], "x", [-1], [10**6]),
    "bos_token_id": (-1, 96, "x", None, [1]),
    "cache_implementation": ("static", "x", 3),
    "constraints": (["x"],),
    "decoder_start_token_id": (1, "x"),
    "do_sample": (True, "x"),
    "early_stopping": ("x", True),
    "eos_token_id": (-1, 96, "x", None, [], [1, 2], [[1]], {}, 2**40, 1.5),
    "exponential_decay_length_penalty": ([1, 2.0], "x"),
    "force_words_ids": ([[1]],),
    "forced_bos_token_id": (5, "x"),
    "forced_eos_token_id": (5, [5], "x", 10**6),
    "guidance_scale": (2.0, "x"),
    "length_penalty": (-1.0, "x"),
    "max_length": (0, -1, "x", None, 1, 10**9),
    "max_new_tokens": (0, -1, "x", 10**9),
    "max_time": (0.0, -1.0, "x"),
    "min_length": (10**9, -1, "x"),
    "no_repeat_ngram_size": (1, -1, "x"),
    "num_beams": (2, 0, -1, "x", 10**6),
    "num_beam_groups": (2, "x"),
    "num_return_sequences": (2, 0, "x"),
    "output_scores": (True,),
    "pad_token_id": (-1, 96, "x", None, [0]),
    "penalty_alpha": (0.6, "x"),
    "prompt_lookup_num_tokens": (2, "x"),
    "repetition_penalty": (2.0, 0, -1, "x"),
    "return_dict_in_generate": (True, "x"),
    "sequence_bias": ([[[5], 100.0]], "x", []),
    "stop_strings": (["a"], "x", 3),
    "suppress_tokens": (list(range(96)), [-1], "x", [10**6]),
    "temperature": (0, -1.0, "x", None, float("nan"), 1e-30),
    "top_k": (0, -1, "x", None),
    "top_p": (0.0, 2.0, "x", None),
    "transformers_version": ("99.0", 4, None),
    "use_cache": (False, "x"),
    "watermarking_config": ({"greenlist_ratio": 0.5}, "x", {}),
}


def set_field(folder: Path, rng: Random) -> Change:
    key = rng.choice(list(FIELDS))
    value = rng.choice(FIELDS[key])
    store(folder / GENERATION, load(folder / GENERATION) | {key: value})
    return Change(f"generation_config {key} = {short(value)}")


MUTATORS: tuple[Mutator, ...] = (*(set_field,) * 8, *of_tree(GENERATION), *of_text(GENERATION))
