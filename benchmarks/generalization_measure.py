"""Where a run loses more than its float model on a text: by token, by position, by block, by what it was shown.

Both models go through their blocks together, over the run's own calibration tokens and over the text. A token's
*excess* is its loss in the run less its loss in the float model, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import calibration, evaluation
from lowbit.data.tokenization import decode
from lowbit.data.windows import Tokens
from lowbit.metrics.kl import Told, listen, percentile
from lowbit.models.forward import run_all
from lowbit.runs.activation_stats import record_peaks
from lowbit.runs.manifest import Manifest, manifest_of
from lowbit.runs.reading import run_scheme
from lowbit.runs.streamed_model import StreamedModel, batches_of, passes
from token_kinds import kinds_of_tokens, without_rare

POSITIONS = (1, 16, 64, 256)  # the first position of each range; the last one is open
LEAST = 16  # tokens of a kind; others are taken together
SEEN = (1.0, 1.5, 2.0)  # upper ends of ranges of ``Observed.beyond``; the last range is open


@dataclass
class Observed:
    """A model on disk that notes, as it runs, what a text brings that the calibration tokens did not.

    Attributes:
        model: the model.
        shown: which of the batches, in their order, are calibration tokens; they come first.
        beyond: of each token of the text, the largest ratio over channels and blocks of a hidden state's absolute
            value to the channel's largest one on the calibration tokens: ``(windows, length)`` a batch.
        inputs: by a linear's input, ``7.mlp.down_proj``, each channel's largest absolute value ``(in,)`` on the
            calibration tokens and on the text.
    """

    model: StreamedModel
    shown: Sequence[bool]
    beyond: list[Tensor] = field(default_factory=list)
    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Number of decoder layers."""
        return self.model.blocks

    def enter(self, ids: Tensor) -> Tensor:
        """Hidden states at the input of block 0."""
        return self.model.enter(ids)

    def scores(self, ids: Tensor, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits of some positions."""
        return self.model.scores(ids, hidden, start, stop)

    def through(self, index: int, batches: Sequence[Tensor]) -> list[Tensor]:
        """Run all batches through a block, and note what is in ``Observed``."""
        block = self.model.block(index)
        params, quantized = block.quantized_params(), self.model.scheme is not None
        outputs: list[Tensor] = []
        peaks: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        for x, shown in zip(batches, self.shown, strict=True):
            own = self.model.skeleton.for_length(block, x.shape[1])
            with record_peaks(own) as found:
                outputs.append(run_all(own, x, params, quantized=quantized, batch=len(x)))
            for name, statistics in found.items():
                value = statistics["peak"]
                peaks[shown][name] = torch.maximum(peaks[shown].get(name, value), value)
        self.inputs |= {
            name: (peaks[True][name], value) for name, value in peaks[False].items() if name in peaks[True]
        }
        self._note(outputs)
        return outputs

    def _note(self, outputs: Sequence[Tensor]) -> None:
        """Raise ``beyond`` to the ratios behind one more block."""
        shown = [y.abs().amax((0, 1)) for y, calibrated in zip(outputs, self.shown, strict=True) if calibrated]
        largest = torch.stack(shown).amax(0).clamp(min=1e-30)
        ratios = [
            (y.abs() / largest).amax(-1) for y, calibrated in zip(outputs, self.shown, strict=True) if not calibrated
        ]
        before = self.beyond or [torch.zeros_like(ratio) for ratio in ratios]
        self.beyond = [torch.maximum(*pair) for pair in zip(before, ratios, strict=True)]


def measure(model: str, run: Path, calibrated: str, text: str, length: int, tokens: int) -> dict[str, Any]:
    """Figures of one run on a text.

    Args:
        model: its float model.
        run: its folder.
        calibrated: the text that it was calibrated on, as for ``lowbit quantize``.
        text: as for ``lowbit evaluate``.
        length, tokens: of a window of the text, and of the text at most.

    Returns:
        ``recipe``, ``scheme``, ``bits_per_weight``; ``notes`` of the run, such as a raised damping; ``corpora`` and
        ``sizes`` of calibration and text; ``perplexity`` and ``float_perplexity``; ``kinds``, ``positions`` and
        ``beyond``: tables of ``excess``; ``blocks``: each block's error on the calibration tokens and on the text;
        ``inputs``: ``ranges`` by a linear's input.
    """
    source = resolve(model)
    tokenizer = load_tokenizer(source.folder)
    manifest = manifest_of(run)
    if manifest is None:
        raise SystemExit(f"{run} is no finished run folder: give what lowbit quantize wrote")
    shown = drawn_again(manifest, calibrated, tokenizer, run)
    windows = evaluation(text, tokenizer, length, tokens)
    exact, other = StreamedModel(source.folder), StreamedModel(run)
    groups = list(passes(batches_of([shown.ids, windows.ids]), exact.width))
    if len(groups) > 1:
        raise SystemExit(f"{tokens} tokens do not fit into one pass: give fewer")
    calibration_batches = [which == 0 for which, _ in groups[0]]
    models = [Observed(one, calibration_batches) for one in (exact, other)]
    records = listen(models[0], models[1:], groups, [shown.first, windows.first])
    kinds = [kinds_of_tokens(ids, lambda part: decode(tokenizer, part)) for ids in windows.ids.tolist()]
    return {
        "recipe": manifest.identity.recipe_name,
        "scheme": run_scheme(manifest).name,
        "bits_per_weight": manifest.bits_per_weight,
        "corpora": [shown.corpus, windows.corpus],
        "sizes": [list(shown.ids.shape), list(windows.ids.shape)],
        "notes": [f"block {row.block}: {note}" for row in manifest.blocks for note in row.notes],
        **tables(records[1], windows.first, kinds, torch.cat(models[0].beyond)),
        "blocks": [
            [sum(batches) / told.tokens for batches in zip(*told.block_error, strict=True)]
            for told in (records[0][1], records[1][1])
        ],
        "inputs": {name: ranges(*pair) for name, pair in models[1].inputs.items()},
    }


def drawn_again(manifest: Manifest, text: str, tokenizer: Any, run: Path) -> Tokens:
    """The calibration tokens of a run; ends the program where ``text`` does not give them."""
    data = manifest.identity.data
    tokens = calibration(text, tokenizer, data.samples, data.length, manifest.identity.seed, bos=data.bos)
    if tokens.hash != data.hash:
        raise SystemExit(f"{run} was calibrated on {data.corpus}: --calibration {text} has other tokens")
    return tokens


def tables(told: Sequence[Told], first: int, kinds: Sequence[Sequence[str]], beyond: Tensor) -> dict[str, Any]:
    """Excess by kind of token, by position and by what was shown.

    Args:
        told: records of the float model and of the run on the text.
        first: position of a window's first scored token.
        kinds: of each token of each window.
        beyond: ``(windows, length)``, as in ``Observed``.
    """
    exact, run = (torch.cat(record.loss) for record in told)
    scored = range(first, first + exact.shape[1])
    own_kinds = without_rare([window[position] for window in kinds for position in scored], LEAST)
    positions = [_range(POSITIONS, position) for _ in kinds for position in scored]
    # A loss is of the token that follows: what a position brings shows in the prediction made there.
    ratios = [_upper(SEEN, float(ratio)) for ratio in beyond[:, first - 1 : -1].flatten()]
    return {
        "perplexity": float(run.mean().exp()),
        "float_perplexity": float(exact.mean().exp()),
        "kinds": excess(own_kinds, exact, run),
        "positions": excess(positions, exact, run, [_range(POSITIONS, start) for start in POSITIONS]),
        "beyond": excess(ratios, exact, run, [_upper(SEEN, end) for end in (*SEEN, float("inf"))]),
    }


def excess(
    labels: Sequence[str], exact: Tensor, run: Tensor, order: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Losses by label, in a given order of labels, or those with the most excess in sum first.

    Args:
        labels: of each token.
        exact, run: losses in nats, as many.
        order: all labels that there may be.

    Returns:
        ``tokens``, the float model's mean loss ``float``, and of the excess ``mean``, ``median``, ``p99`` and
        ``share``, its sum as a share of that over all tokens.

    >>> found = excess(["a", "b", "a"], torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 5.0, 3.5]))
    >>> [(name, row["tokens"], row["mean"], row["share"]) for name, row in found.items()]
    [('b', 1, 3.0, 0.75), ('a', 2, 0.5, 0.25)]
    """
    exact, difference = exact.flatten().double(), (run - exact).flatten().double()
    total = float(difference.sum())
    rows = {}
    for label in dict.fromkeys(labels):
        mine = torch.tensor([one == label for one in labels])
        own = difference[mine]
        rows[label] = {
            "tokens": len(own),
            "float": float(exact[mine].mean()),
            "mean": float(own.mean()),
            "median": percentile(own, 50),
            "p99": percentile(own, 99),
            "share": float(own.sum()) / total if total else 0.0,
        }
    by_share = sorted(rows, key=lambda label: -rows[label]["share"])
    return {label: rows[label] for label in order or by_share if label in rows}


def ranges(shown: Tensor, text: Tensor) -> dict[str, float]:
    """What a text adds to the ranges of a linear's input.

    Args:
        shown, text: each channel's largest absolute value ``(in,)`` on the calibration tokens and on the text.

    Returns:
        ``tensor``: ratio of the largest values of all channels; ``channel``: the largest ratio of a channel's;
        ``share`` of channels whose value is more than doubled.

    >>> ranges(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
    {'tensor': 1.5, 'channel': 3.0, 'share': 0.5}
    """
    ratio = text / shown.clamp(min=1e-30)
    tensor = float(text.max() / shown.max().clamp(min=1e-30))
    return {"tensor": tensor, "channel": float(ratio.max()), "share": float((ratio > 2).double().mean())}


def _range(starts: Sequence[int], position: int) -> str:
    """The range of a position as text.

    >>> _range((1, 16, 64), 20), _range((1, 16, 64), 80)
    ('16 to 63', '64 on')
    """
    index = max(i for i, start in enumerate(starts) if start <= max(position, starts[0]))
    last = index == len(starts) - 1
    return f"{starts[index]} on" if last else f"{starts[index]} to {starts[index + 1] - 1}"


def _upper(ends: Sequence[float], value: float) -> str:
    """The range of a ratio as text.

    >>> _upper((1.0, 2.0), 1.5), _upper((1.0, 2.0), 7.0)
    ('up to 2.0', 'above 2.0')
    """
    found = next((end for end in ends if value <= end), None)
    return f"above {ends[-1]}" if found is None else f"up to {found}"
