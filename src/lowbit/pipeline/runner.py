"""The walk over the blocks: float model in, run folder out.

Two sets of hidden states go through the model side by side: ``x_fp`` through the float blocks, ``x_q`` through the
quantized ones. After each window of blocks its shards are written and read back, and ``x_q`` goes through the blocks
as read: a run checks what it ships, and a resumed run does the same for the blocks that are already written. There is
no other state, so a resumed run ends with the same bytes as an uninterrupted one.

The processes of a job take the same walk: they share forward passes, statistics and gradients, each holds all
results, and the first one writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.analysis.linear_error import layer_sensitivity
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.checkpoints.writing import write_tensors
from lowbit.distributed.exchange import by_first
from lowbit.errors import LowbitError
from lowbit.methods.gptq import GPTQ
from lowbit.methods.input_ranges import without_input_ranges
from lowbit.methods.kv_clips import with_kv_clips
from lowbit.methods.statistics import everyones
from lowbit.methods.tune import Tune
from lowbit.models.block import LEAST_TOKENS, Block, Calib
from lowbit.models.build import tied_tensors
from lowbit.models.forward import run_all, run_quantized
from lowbit.models.offload import release_free_memory, select_sequences
from lowbit.models.prefix import Prefix
from lowbit.models.rotated_values import with_rotated_values
from lowbit.models.shard import States, states_of
from lowbit.models.skeleton import Skeleton
from lowbit.models.stored_names import StoredNames
from lowbit.pipeline.block_writing import check_block, write_block
from lowbit.pipeline.head import head_codes, head_gram, head_step, nearest
from lowbit.pipeline.hidden_states import all_finite, embedded, hidden_state_error
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.shared_run import check_same_bits, exist, see
from lowbit.progress import say, track
from lowbit.quant.range_estimators import MSE, RangeEstimator
from lowbit.runs.activation_stats import FLOAT, MAP, QUANTIZED, record_peaks
from lowbit.runs.folder import FIRST, REST, block_file, notes_file, pictures_file
from lowbit.runs.latent_weights import write_latents
from lowbit.runs.manifest import BlockRow
from lowbit.runs.plan import Plan
from lowbit.runs.reading import read_block, read_dequantized
from lowbit.runs.routing import Routing


def _with_kv_notes(block: Block) -> Block:
    """The block with a note on each layer in which a kv scheme quantizes nothing."""
    for index, kind in zip(block.indices, block.kinds, strict=True):
        if block.kv is not None and kind.attention is None:
            text = "the layer has no attention function, so there are no Q, K and V to quantize"
            block = block.with_notes("kv", text, layer=index)
    return block


def _with_kept_notes(block: Block) -> Block:
    """The block with a note on each layer some of whose experts stay float."""
    for index, kind in zip(block.indices, block.kinds, strict=True):
        if kind.kept:
            text = f"these experts stay float, as code of the model's own computes them: {', '.join(kind.kept)}"
            block = block.with_notes("experts", text, layer=index)
    return block


@dataclass
class Walk:
    """One run's pass over a model.

    Attributes:
        checkpoint: the float model.
        skeleton: the model without its blocks; ``walk`` fills it.
        recipe: the steps to apply.
        plan: formats and layout of every module, checked against the model.
        out: the run folder, already claimed.
        device, dtype: device and dtype of forward passes; arithmetic on weights is always float32.
        latents: store the latent weights for a later end-to-end step.
        input_range: how the ranges of static inputs are estimated.
        least_tokens, every_token: of each block, see ``Block``.
        importance: of each block by full name of a linear, see ``Block``.
        names: what the model's tensors are called in its files, and in the run's.
        prefix: the prefix of every text, behind which the skeleton is; ``None``: none.
        rows: the manifest's rows, one per finished block.
        observed: activation statistics and learned maps for the report, by tensor name.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    plan: Plan
    out: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 4
    latents: bool = False
    input_range: RangeEstimator = MSE
    least_tokens: int = LEAST_TOKENS
    every_token: bool = False
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    names: StoredNames = field(default_factory=StoredNames)
    prefix: Prefix | None = None
    rows: list[BlockRow] = field(default_factory=list)
    observed: dict[str, Tensor] = field(default_factory=dict)

    def walk(self, ids: Tensor) -> States:
        """Quantize every block against calibration tokens ``(sequences, length)``; write the shared parameters first.

        Returns the float model's last hidden states, on ``offload.storage_device``, or a process's share of them.
        """
        shared = self.checkpoint.read(self.skeleton.shared_names)
        self._fill(shared)
        x_fp = embedded(self.skeleton, ids, self.device, self.batch)
        by_first(partial(self._write_shared, shared))
        x_q = x_fp
        if self.plan.embed in self.plan.formats.modules:
            see(self.out / REST)
            self._fill(self._shipped_shared(shared))
            x_q = embedded(self.skeleton, ids, self.device, self.batch)
        del shared
        layers = len(self.skeleton.layers)
        for start in track(range(0, layers, self.recipe.window), "quantizing"):
            count = min(self.recipe.window, layers - start)
            x_fp, x_q = self._window(start, count, x_fp, x_q)
            release_free_memory()
        if (step := head_step(self.recipe, self.plan)) is not None:
            if exist(self.out / FIRST / REST):
                self._keep_head()
            else:
                self._quantize_head(step, ids, x_q)
        return x_fp

    def _keep_head(self) -> None:
        """Take the head that ``tune`` has trained the blocks with, whatever their hidden states are now."""
        see(self.out / FIRST / REST)
        first, head = replace(self, out=self.out / FIRST)._shard(REST), f"{self.plan.head}."
        packed = first.read([name for name in first.names if name.startswith(head)])
        by_first(partial(self._write_head, {name.removeprefix(head): value for name, value in packed.items()}))

    def _quantize_head(self, step: GPTQ, ids: Tensor, hidden: States) -> None:
        """Replace the head's codes by those for the last hidden states; a resumed run comes to the same ones.

        They are fitted in closed form: a later step's validation split is not for them, see ``_visible``.
        """
        tune = next((step for _, step in self.recipe.steps if isinstance(step, Tune) and step.schedule.epochs), None)
        if tune is not None:
            train, _ = tune.schedule.split(len(ids))
            ids, hidden = ids[train], select_sequences(hidden, train)
        own, head = self.plan.formats.modules[self.plan.head], f"{self.plan.head}.weight"
        gram = head_gram(self.skeleton, ids, hidden, step, own.input)
        name = f"{self.plan.embed}.weight" if self.plan.untie else head
        weight = self.checkpoint.read([name], torch.float32)[name].to(gram.device)
        packed = own.layout.pack(head_codes(weight, own.weight, gram, ids.numel(), step))
        by_first(partial(self._write_head, packed))

    def _write_head(self, packed: Mapping[str, Tensor]) -> None:
        shard = self._shard(REST)
        tensors = shard.read(shard.names) | {f"{self.plan.head}.{key}": value.cpu() for key, value in packed.items()}
        write_tensors(self.out / REST, self.names.stored_all(tensors))

    def float_block(self, start: int, count: int = 1) -> Block:
        """Layers of the float model, for sequences of the calibration length."""
        params: dict[str, Tensor] = {}
        for index in range(start, start + count):
            shapes = self.skeleton.parameter_shapes(index)
            params |= block_params(self.checkpoint, self.skeleton.architecture.blocks, index, shapes)
            params |= {} if self.prefix is None else self.prefix.params(index)
        on_device = {name: value.to(self.device) for name, value in params.items()}
        block = self.skeleton.block(start, on_device, count, self.plan.formats)
        own = {n: self.importance[full] for n in block.linears() if (full := block.full_name(n)) in self.importance}
        importance = {name: value.to(block.device) for name, value in own.items()}
        return replace(block, least_tokens=self.least_tokens, every_token=self.every_token, importance=importance)

    def fill_float(self) -> None:
        """Fill the skeleton with the float model's embeddings, norms and head."""
        self._fill(self.checkpoint.read(self.skeleton.shared_names))

    def skeletons(self, ids: Tensor) -> tuple[Skeleton, Skeleton]:
        """Embeddings and head of the float and the quantized model, after a walk over ``ids``; may be one object."""
        self.fill_float()
        shipped = self.skeleton
        if {self.plan.embed, self.plan.head} & set(self.plan.formats.modules):
            # A skeleton of its own: later steps measure the inputs of this one's head as they are.
            shipped = self.skeleton.empty(untied=self.plan.untie)
            self._fill(self._shipped_shared(shipped.shared_names), shipped)
            if (inputs := self.plan.formats.input(self.plan.head)) is not None:
                shipped.quantize_head_input(inputs)
        for skeleton in (self.skeleton, shipped):
            skeleton.embed(ids[:1].to(self.device))
        return self.skeleton, shipped

    def _shipped_shared(self, shared: Iterable[str]) -> dict[str, Tensor]:
        return read_dequantized(self._shard(REST), shared, self.plan.formats.modules)

    def _shard(self, file: str) -> Checkpoint:
        """A file that the run wrote, by the model's names."""
        shard = Checkpoint(self.out, [file])
        shard.rename(self.names.rename)
        return shard

    def _fill(self, shared: Mapping[str, Tensor], skeleton: Skeleton | None = None) -> None:
        skeleton = skeleton or self.skeleton
        skeleton.fill({name: value.to(self.device, self.dtype) for name, value in shared.items()})
        skeleton.model.to(self.device)

    def _window(self, start: int, count: int, x_fp: States, x_q: States) -> tuple[States, States]:
        """One window: run it in float, quantize it unless its shards exist, then run the shards' blocks."""
        began = time.monotonic()
        block = self.float_block(start, count)
        routing = Routing(block)
        with record_peaks(block) as seen:
            y_fp = run_all(block, x_fp, batch=self.batch, taps=routing.taps)
        routing.gather()
        self._observe(FLOAT, {name: stats["peak"] for name, stats in everyones(seen).items()})
        if not all_finite(y_fp):
            raise LowbitError(
                f"block {start}: the float model's own output is NaN or infinite; its weights are broken, or too "
                "large for --dtype float16"
            )
        if not exist(*(self.out / block_file(i) for i in block.indices)):
            self.quantize(block, Calib(x_fp, x_q, y_fp, self.batch, self.input_range), began)
        del block
        notes: list[tuple[list[str], dict[str, Any]]] = []
        for index in range(start, start + count):
            see(self.out / notes_file(index), self.out / block_file(index))
            shard = self._shard(block_file(index))
            shipped = read_block(shard, self.skeleton, index, self.plan.formats, self.device)
            with record_peaks(shipped) as seen:
                x_q = run_quantized(shipped, x_q, self.batch)
            self._observe(QUANTIZED, {name: stats["peak"] for name, stats in everyones(seen).items()})
            if (self.out / pictures_file(index)).exists():
                pictures = Checkpoint(self.out, [pictures_file(index)])
                self._observe(MAP, pictures.read(pictures.names))
            stored = read_json(self.out / notes_file(index))
            notes.append((stored["notes"], stored.get("record", {})))
        # Float hidden states exist only at the window's end, so the blocks of a window share one error.
        error = hidden_state_error(x_q, y_fp, self.device, self.batch)
        if not math.isfinite(error):
            raise LowbitError(f"block {start}: the quantized model's output is NaN or infinite: use another recipe")
        for index, (texts, record) in enumerate(notes, start):
            steps, tokens = record.get("steps", {}), routing.tokens(index)
            self.rows.append(BlockRow(index, texts, error, record["sensitivity"], steps, tokens))
        return y_fp, x_q

    def quantize(self, block: Block, calib: Calib, began: float) -> None:
        """Apply the block steps to a float block and write its shards.

        Args:
            block: layers of the float model.
            calib: hidden states before and behind them.
            began: when work on them began, by ``time.monotonic``.
        """
        quantized = with_kv_clips(with_rotated_values(_with_kept_notes(_with_kv_notes(block))), calib)
        for position, (_, step) in enumerate(self.recipe.block_steps):
            if step.keeps_function and step.schedule is None:
                # It moves maps, and ranges of inputs that an earlier step left do not fit what it makes of them.
                quantized = without_input_ranges(quantized)
            quantized = step(quantized, self._visible(position, calib))
        first = states_of(calib.x_fp, torch.arange(1)).to(self.device)
        sensitivity = layer_sensitivity(quantized, first)
        check_same_bits(quantized)
        by_first(lambda: self.write(quantized, sensitivity, time.monotonic() - began))
        for note in quantized.notes:
            say(f"block {note.layer}: {note.text}")

    def _visible(self, position: int, calib: Calib) -> Calib:
        """A step's calibration data: a closed-form step does not see the validation split of a later learned step.

        Otherwise GPTQ or a refit would overfit these sequences, the learned step's start would look too good on them,
        and its result would be discarded.
        """
        later = (method.schedule for _, method in self.recipe.steps[position + 1 :])
        schedule = next((schedule for schedule in later if schedule is not None and schedule.epochs), None)
        if schedule is None or not self.recipe.block_steps[position][1].closed_form:
            return calib
        train, _ = schedule.split(len(calib.x_q))
        x_fp, x_q, y_fp = (select_sequences(states, train) for states in (calib.x_fp, calib.x_q, calib.y_fp))
        return replace(calib, x_fp=x_fp, x_q=x_q, y_fp=y_fp)

    def _observe(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        self.observed |= {f"{kind}.{name}": value.cpu() for name, value in tensors.items()}

    def write(self, block: Block, sensitivity: Mapping[int, Any], seconds: float) -> None:
        """Check a block and write it, shards last: an existing shard is complete, and its block was checked."""
        check_block(block, [step for _, step in self.recipe.block_steps])
        if self.latents:
            write_latents(self.out, block)
        write_block(self.out, block, self.names, sensitivity, seconds)

    def _write_shared(self, shared: Mapping[str, Tensor]) -> None:
        """Write embeddings, norms and head in their own dtype, or rounded to nearest where an override says so."""
        if (self.out / REST).exists():
            return
        tensors = dict(shared)
        head = f"{self.plan.head}.weight"
        if self.plan.untie:
            tensors[head] = tensors[f"{self.plan.embed}.weight"].clone()
            tied = tied_tensors(self.skeleton.model, self.skeleton.config, self.plan.head)
            tensors |= {name: tensors[other].clone() for name, other in tied.items() if other in shared}
        for module in (self.plan.embed, self.plan.head):
            if (formats := self.plan.formats.modules.get(module)) is not None:
                weight, format = tensors.pop(f"{module}.weight").float(), formats.weight
                stored = formats.layout.pack(nearest(weight, format, self.recipe))
                tensors |= {f"{module}.{key}": value for key, value in stored.items()}
        write_tensors(self.out / REST, self.names.stored_all(tensors))
