"""Hidden states before the first block, and how far those of two models are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.distributed.exchange import from_everyone
from lowbit.distributed.world import here
from lowbit.finite import is_finite
from lowbit.models.offload import batches, concatenate, storage_device
from lowbit.models.shard import Shard, States, own_states, owned_sequences
from lowbit.models.skeleton import Skeleton

EMBED_BATCH = 4  # sequences embedded at once


def embed_tokens(skeleton: Skeleton, ids: Tensor, device: str) -> Tensor:
    """Block 0's input for ``ids`` ``(sequences, length)``, computed on ``device``, on the storage device."""
    pieces = (skeleton.embed(batch.to(device)) for batch in ids.split(EMBED_BATCH))
    return concatenate(pieces, len(ids), storage_device(device))


def embedded(skeleton: Skeleton, ids: Tensor, device: str, batch: int) -> States:
    """``embed_tokens``; in a process of a job its share, of hidden states that pass a block ``batch`` at a time."""
    if here().size == 1:
        return embed_tokens(skeleton, ids, device)
    own = owned_sequences(len(ids), batch)[here().rank]
    # Without any, the model is still asked once: it says what its blocks are called with.
    found = embed_tokens(skeleton, ids[own.start : own.stop] if own else ids[:1], device)
    return Shard.of(found if own else found[:0], len(ids), batch)


def hidden_state_error(got: States, exact: States, device: str, batch: int) -> float:
    """``relative_error`` of hidden states, computed on ``device``: sums of sequences, which are added in order."""
    on, own = torch.device(device), []
    for pair in zip(*(batches(own_states(x), batch, on) for x in (got, exact)), strict=True):
        for ours, reference in zip(*pair, strict=True):
            sums = [(ours - reference).double().square().sum(), reference.double().square().sum()]
            own.append(torch.stack(sums).tolist())
    everyones = [sums for process in from_everyone(own) for sums in process]
    error, power = (sum(sums) for sums in zip(*everyones, strict=True))
    return float(error / max(power, 1e-300))


def all_finite(x: States) -> bool:
    """Whether all hidden states of this process are numbers."""
    return is_finite(own_states(x))
