"""SmolLM3: Llama's layers, of which every fourth has no rotary embedding.

Where nothing is rotated any matrix per head merges between q and k; scaled rotations of the pairs are among them.

https://github.com/huggingface/transformers/blob/main/src/transformers/models/smollm3/modeling_smollm3.py
"""

from dataclasses import replace

from lowbit.models.families.llama import LLAMA

SMOLLM3 = replace(LLAMA, name="smollm3", architectures=("SmolLM3ForCausalLM",))
