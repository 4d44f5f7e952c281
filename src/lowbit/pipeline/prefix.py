"""The prefix of a run: found or given, computed once by the float model, and proven to be what its tokens are.

What is proven, on every layer, before anything is quantized: behind the prefix's keys and values, a text has the
hidden states that it has behind the prefix's tokens; and a map moved over the layer's heads leaves them alone, so the
keys and values move along as they should.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lowbit.analysis.massive import chosen, massive, per_window
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.writing import write_json, write_tensors
from lowbit.data.tokenization import decode, encode
from lowbit.distributed.exchange import by_first
from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.edges import Edge
from lowbit.models.equivalence import move
from lowbit.models.forward import relative_error, run_all
from lowbit.models.prefix import KEYS, VALUES, Prefix, cached_of
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.hidden_states import embed_tokens
from lowbit.pipeline.runner import Walk
from lowbit.pipeline.shared_run import exist, see
from lowbit.progress import say, track
from lowbit.runs.folder import RUN
from lowbit.runs.manifest import PrefixFacts, parse
from lowbit.runs.prefix import read_prefix

AUTO, NONE = "auto", "none"
MOST = 8  # tokens that the search puts into a prefix
MOST_GIVEN = 64
WINDOWS = 8  # calibration windows that are searched
FACTS, TENSORS = f"{RUN}/prefix.json", f"{RUN}/prefix.safetensors"
# Largest relative squared error of hidden states behind keys and values, to those behind the tokens.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
TOLERANCE_16_BIT = 1e-2
_IDS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")


@dataclass(frozen=True)
class Wanted:
    """What a run's prefix is to be.

    Attributes:
        ids: the tokens; ``None``: those that the search finds.
        start: the token with which texts of the model start; ``None``: it has none.
        special: special tokens in front of each window, which the tokenizer gives and no prefix has to.
        tokenizer: the model's.
    """

    ids: tuple[int, ...] | None
    start: int | None
    special: int
    tokenizer: Any

    def text(self, ids: Sequence[int]) -> str:
        """The text of a prefix, for people."""
        return decode(self.tokenizer, ids)


def wanted(option: str, tokenizer: Any, special: Sequence[int]) -> Wanted | None:
    """What the option ``--prefix`` asks for; ``None``: no prefix.

    Args:
        option: ``none``, ``auto``, token ids with commas between them, or text.
        tokenizer: the model's.
        special: the special tokens in front of each window.
    """
    if option == NONE:
        return None
    start, ids = tokenizer.bos_token_id, None
    if option != AUTO:
        ids = tuple(map(int, option.split(","))) if _IDS.fullmatch(option) else tuple(encode(tokenizer, option))
        if not 1 <= len(ids) <= MOST_GIVEN:
            raise LowbitError(
                f"--prefix '{option[:80]}' given, which is {len(ids)} tokens; 1 to {MOST_GIVEN} are allowed: give "
                "text, token ids such as 13,1, auto or none"
            )
    return Wanted(ids, start, len(special), tokenizer)


def check_prefix(wish: Wanted, skeleton: Skeleton, length: int) -> None:
    """Refuse, before any work, a prefix that a model cannot have.

    Args:
        wish: what is wanted.
        skeleton: the model.
        length: tokens in a calibration window.
    """
    architecture = skeleton.architecture
    without = [index for index, kind in enumerate(architecture.layers) if kind.attention is None]
    if without:
        raise LowbitError(
            f"--prefix given, and layer {without[0]} of this model has no attention function that reads keys and "
            "values of earlier tokens: give --prefix none"
        )
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if beyond := [token for token in wish.ids or () if token >= rows]:
        raise LowbitError(f"--prefix has token {beyond[0]}; this model has {rows}: give ids below {rows}, or text")
    if (room := _room(skeleton, length)) < (needed := len(wish.ids or (0,))):
        raise LowbitError(
            f"--prefix has {needed} tokens and --length is {length}: the model's positions leave room for {room}; "
            "give a shorter --length"
        )


def settle_prefix(walk: Walk, windows: Tensor, wish: Wanted) -> PrefixFacts:
    """Give a walk its prefix: as an interrupted run left it, or searched and computed now.

    Args:
        walk: its ``prefix`` is set, and its skeleton is behind it.
        windows: calibration tokens ``(windows, length)``.
        wish: what is wanted.
    """
    if exist(walk.out / FACTS):
        see(walk.out / FACTS)
        facts: PrefixFacts = parse(PrefixFacts, read_json(walk.out / FACTS), str(walk.out / FACTS))
    else:
        facts = _found(walk, windows[:WINDOWS], wish)
        by_first(lambda: write_json(walk.out / FACTS, asdict(facts)))  # behind the tensors
        say(facts.sentence())
    if facts.ids:
        see(walk.out / TENSORS)
        walk.prefix = read_prefix(walk.out / TENSORS, facts.ids, len(walk.skeleton.layers))
    walk.skeleton.behind(len(facts.ids))
    return facts


def _found(walk: Walk, windows: Tensor, wish: Wanted) -> PrefixFacts:
    walk.fill_float()
    ids, before = wish.ids, None
    if ids is None:
        layers = _massive_tokens(walk, windows)
        before, most = per_window(layers, wish.special), min(MOST, _room(walk.skeleton, windows.shape[1]))
        rows = walk.skeleton.model.get_input_embeddings().weight.shape[0]
        start = wish.start if wish.start is None or wish.start < rows else None  # a tokenizer may have more tokens
        ids = chosen(windows, layers, wish.special, start, most)
        if not ids:
            return PrefixFacts([], "", before, before)
    prefix, layers = _computed(walk, ids, windows)
    after = per_window(layers, wish.special)
    if before is not None and after >= before:
        return PrefixFacts([], "", before, before)
    tensors = {n: v for index in range(len(prefix.keys)) for n, v in prefix.params(index).items()}
    by_first(lambda: write_tensors(walk.out / TENSORS, {name: value.cpu() for name, value in tensors.items()}))
    return PrefixFacts(list(ids), wish.text(ids), before, after)


def _room(skeleton: Skeleton, length: int) -> int:
    """Tokens that may come before a window, by the model's number of positions."""
    limit = positions_of(skeleton.text_config)
    return MOST_GIVEN if limit is None else limit - length


def _massive_tokens(walk: Walk, windows: Tensor) -> list[Tensor]:
    """Which tokens are massive behind each layer of the float model, ``(windows, length)`` each."""
    x = embed_tokens(walk.skeleton, windows, walk.device)
    out = []
    for index in track(range(len(walk.skeleton.layers)), "massive tokens"):
        block = walk.float_block(index)
        x = run_all(block, x, batch=walk.batch)
        out.append(_massive(block, x))
    return out


def _massive(block: Block, x: Tensor) -> Tensor:
    stream = block.leaves
    return massive(stream.form.flat(stream.unpack(x).hidden)).cpu()


def _computed(walk: Walk, ids: tuple[int, ...], windows: Tensor) -> tuple[Prefix, list[Tensor]]:
    """A prefix by the float model, proven, and which tokens of the windows are massive behind each layer then."""
    skeleton, device, layers = walk.skeleton, walk.device, len(walk.skeleton.layers)
    prefix = torch.tensor([ids])
    skeleton.behind(0)
    whole = embed_tokens(skeleton, torch.cat([prefix, windows[:1]], 1), device)
    whole_calls = skeleton.arguments()
    skeleton.cache = cache = DynamicCache()
    alone = embed_tokens(skeleton, prefix, device)
    alone_calls = skeleton.arguments()
    skeleton.behind(len(ids))
    text = embed_tokens(skeleton, windows, device)
    text_calls = skeleton.arguments()
    found: list[tuple[Tensor, Tensor]] = []
    out: list[Tensor] = []
    for index in track(range(layers), "prefix"):
        block = walk.float_block(index)
        plain = replace(block, prefix=0)
        alone = run_all(replace(plain, kwargs=(alone_calls[index],)), alone, batch=1)
        whole = run_all(replace(plain, kwargs=(whole_calls[index],)), whole, batch=1)
        found.append(cached_of(cache, index, len(ids)))
        keys, values = found[-1]
        params = {**block.params, f"{index}.{KEYS}": keys, f"{index}.{VALUES}": values}
        block, given = replace(block, kwargs=(text_calls[index],), params=params), text
        text = run_all(block, given, batch=walk.batch)
        _check_same(text[:1], whole[:, len(ids) :], index, "it is not what its tokens are")
        if block.kinds[0] not in walk.skeleton.architecture.layers[:index]:
            _check_moves(block, given[:1], text[:1])
        out.append(_massive(block, text))
    return Prefix(ids, tuple(key for key, _ in found), tuple(value for _, value in found)), out


def _check_moves(block: Block, x: Tensor, y: Tensor) -> None:
    """Check that the prefix moves with maps over the heads of one layer, whose output for ``x`` is ``y``."""
    generator = torch.Generator().manual_seed(0)
    for edge in block.edges():
        if edge.kind in ("heads", "qk"):
            moved = move(block, edge, _some_map(edge, generator).to(block.device))
            got = run_all(block, x, moved, batch=1)
            _check_same(got, y, block.start, f"it does not move with a map over {edge.src.module}")


def _some_map(edge: Edge, generator: torch.Generator) -> Tensor:
    """Any map that folds at an edge: factors from 1/2 to 2 or, where only rotations fold, those of pairs or heads."""
    random = torch.rand(edge.diagonal_shape, generator=generator)
    if edge.scales:
        return 2.0 ** (2 * random - 1)
    if edge.pairs:
        return torch.stack([(6 * random).cos(), (6 * random).sin()], -1)
    size = edge.diagonal_shape[-1]
    return torch.linalg.qr(torch.randn(*edge.diagonal_shape, size, generator=generator))[0]


def _check_same(got: Tensor, exact: Tensor, index: int, what: str) -> None:
    error = relative_error(got, exact)
    if not error <= TOLERANCE.get(got.dtype, TOLERANCE_16_BIT):
        raise LowbitError(
            f"the keys and values of a prefix do not stand for its tokens in layer {index} of this model: {what} "
            f"(relative error {error:.1e}); give --prefix none"
        )
