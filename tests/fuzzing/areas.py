"""The table of mutations: by area, the models and the mutators that are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

from fuzzing import (
    config_fields,
    generation_fields,
    gguf_facts,
    gguf_tensors,
    quantized_folder,
    run_folder,
    safetensors_file,
    shard_index,
    tokenizer_files,
)
from fuzzing.bases import GGUF, QUANTIZED, RUNS
from fuzzing.change import Mutator
from fuzzing.json_files import damage


@dataclass(frozen=True)
class Area:
    """What is mutated, and how.

    Attributes:
        bases: names of models, of which one is drawn.
        mutators: of which one is drawn, or two if ``pairs``.
        generates: whether ``generate`` is tried too, which reads more of the folder than evaluation does.
    """

    bases: tuple[str, ...]
    mutators: tuple[Mutator, ...]
    pairs: bool = True
    generates: bool = False


ONE_FILE = ("llama", "gemma2", "qwen2", "phi3", "opt")
AREAS: dict[str, Area] = {
    "config": Area(ONE_FILE, config_fields.MUTATORS),
    "json": Area(("llama", "gemma2"), (damage(config_fields.CONFIG),), pairs=False),
    "index": Area(("shards",), shard_index.MUTATORS),
    "weights": Area(("llama", "gemma2", "phi3"), safetensors_file.MUTATORS),
    "tokenizer": Area(("llama", "qwen2", "gemma2"), tokenizer_files.MUTATORS, generates=True),
    "generation": Area(("llama",), generation_fields.MUTATORS, generates=True),
    "run": Area(tuple(RUNS), run_folder.MUTATORS, pairs=False),
    "quantized": Area(tuple(QUANTIZED), quantized_folder.MUTATORS, pairs=False),
    "gguf-facts": Area(GGUF, gguf_facts.MUTATORS, pairs=False),
    "gguf-tensors": Area(GGUF, gguf_tensors.MUTATORS, pairs=False),
}
