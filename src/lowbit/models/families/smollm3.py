"""SmolLM3: Llama's layers, every fourth without a rotary embedding.

Without rotation any matrix per head folds between q and k, scaled rotations of the pairs included.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/smollm3/modeling_smollm3.py
"""

from dataclasses import replace

from lowbit.models.families.llama import LLAMA

SMOLLM3 = replace(LLAMA, name="smollm3", architectures=("SmolLM3ForCausalLM",))
