"""GPTQ and AWQ of llm-compressor on given tokens; ``peers.py`` starts it in llm-compressor's own environment.

Options are its defaults; calibration goes layer by layer, as it does for models of this kind. Its AWQ pins memory for
copies to an accelerator and fails where there is none: here pinning does nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoTokenizer

from peers_job import Job, job


def recipe(given: Job) -> list[Any]:
    """The modifiers of a method."""
    weights = QuantizationArgs(
        num_bits=given.bits, type="int", symmetric=given.symmetric, strategy="group", group_size=given.group
    )
    where = {
        "config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    return {
        "gptq": lambda: [GPTQModifier(**where)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**where)],
    }[given.method]()


def main() -> None:
    given = job()
    torch.manual_seed(given.seed)
    if not torch.accelerator.is_available():
        setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)  # noqa: B010
    ids = given.ids()
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    model = oneshot(
        model=given.float_model(),
        tokenizer=AutoTokenizer.from_pretrained(given.model),
        recipe=recipe(given),
        dataset=Dataset.from_dict(rows),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    with torch.no_grad():
        weights = {
            name: fake_quantize(
                module.weight, module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights
            )
            for name, module in model.named_modules()
            if getattr(module, "quantization_scheme", None) is not None
        }
        given.write(model, weights)


if __name__ == "__main__":
    main()
