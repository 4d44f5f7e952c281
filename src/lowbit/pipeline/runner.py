"""The walk over the blocks: float model in, run folder out.

Two streams of hidden states go through the model side by side: ``x_fp`` through the float blocks, ``x_q`` through
the quantized ones. After each window of blocks its shards are written, read back, and ``x_q`` goes through what
was read: a run checks what it ships, and one that starts again does just the same for the blocks that it finds
done. There is no other state, so a run that was killed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import math
import re
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.analysis.linear_error import damages
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params, read_json, write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.models.block import Block, Calib, relative_error, run_all
from lowbit.models.offload import home, joined, parts, taken
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe
from lowbit.progress import say, track
from lowbit.quant.affine import minmax_grid, quantize
from lowbit.quant.compressed_tensors import pack
from lowbit.quant.scheme import Scheme
from lowbit.runs.activation_stats import FLOAT, MAP, QUANTIZED, watched
from lowbit.runs.folder import ONLINE, REST, block_file, dequantized, notes_file, pictures_file, read_block
from lowbit.runs.latent_weights import write_latents
from lowbit.runs.plan import Plan

STARTED = 16  # sequences that are embedded at once on a GPU


def peak_memory_bytes() -> int:
    """The most memory that this process has held resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def entered(skeleton: Skeleton, ids: Tensor, device: str) -> Tensor:
    """What block 0 is called with for ``ids`` ``(sequences, length)``, made on ``device``, at the streams' home."""
    where = home(device)
    if where == torch.device(device):
        return skeleton.start(ids.to(device))
    return joined((skeleton.start(some.to(device)) for some in ids.split(STARTED)), len(ids), where)


def stream_error(got: Tensor, wanted: Tensor, device: str, batch: int) -> float:
    """``relative_error`` of two streams; for a GPU summed there, over parts."""
    on = torch.device(device)
    if home(on) == on:
        return relative_error(got, wanted)
    sums = torch.zeros(2, dtype=torch.float64, device=on)
    for ours, exact in zip(parts(got, batch, on), parts(wanted, batch, on), strict=True):
        sums += torch.stack([(ours - exact).double().square().sum(), exact.double().square().sum()])
    return float(sums[0] / sums[1].clamp(min=1e-300))


@dataclass
class Walk:
    """One run's pass over a model.

    Attributes:
        checkpoint: the float model.
        skeleton: the model without its blocks; ``walk`` fills it.
        recipe, scheme: what to do.
        plan: formats and layout of every module, checked against the model.
        out: the run folder, claimed already.
        device, dtype: where and in what the blocks run; maths on weights is float32 everywhere.
        latents: keep where the float weights lie on their grids, for a step behind.
        rows: one for each finished block, for the manifest.
        observed: what the report shows of them, by its name in the file that ``observed`` writes.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    scheme: Scheme
    plan: Plan
    out: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 4
    latents: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    observed: dict[str, Tensor] = field(default_factory=dict)

    def walk(self, ids: Tensor) -> Tensor:
        """Quantize every block against calibration tokens ``(sequences, length)``; write the rest before.

        Returns the float model's last hidden states, where ``feed.home`` says that streams live.
        """
        rest = self.checkpoint.read(self.skeleton.rest_names)
        self._fill(rest)
        x_fp = entered(self.skeleton, ids, self.device)
        self._write_rest(rest)
        x_q = x_fp
        if self.plan.embed in self.plan.specs:
            self._fill(self._shipped_rest(rest))
            x_q = entered(self.skeleton, ids, self.device)
        del rest
        layers = len(self.skeleton.layers)
        for start in track(range(0, layers, self.recipe.window), "quantizing"):
            count = min(self.recipe.window, layers - start)
            x_fp, x_q = self._window(start, count, x_fp, x_q)
        return x_fp

    def float_block(self, start: int, count: int = 1) -> Block:
        """Layers of the float model, for sequences as long as those walked."""
        params: dict[str, Tensor] = {}
        for index in range(start, start + count):
            layer = self.skeleton.layers[index]
            params |= block_params(self.checkpoint, self.skeleton.family.blocks, index, layer)
        return self.skeleton.block(start, {name: value.to(self.device) for name, value in params.items()}, count)

    def skeletons(self, ids: Tensor) -> tuple[Skeleton, Skeleton]:
        """Embeddings and head of the float model and of what ships, after a walk over ``ids``; often one and same."""
        rest = self.checkpoint.read(self.skeleton.rest_names)
        exact = self.skeleton
        if {self.plan.embed, self.plan.head} & set(self.plan.specs):
            exact = self.skeleton.empty()
            self._fill(self._shipped_rest(rest))
            if self.plan.head in self.plan.specs and (inputs := self.scheme.inputs(self.plan.head)) is not None:
                self.skeleton.round_head_input(inputs)
        self._fill(rest, exact)
        for skeleton in (exact, self.skeleton):
            skeleton.start(ids[:1].to(self.device))
        return exact, self.skeleton

    def _shipped_rest(self, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dequantized(Checkpoint(self.out, [REST]), rest, self.plan.specs, self.plan.layout)

    def _fill(self, rest: Mapping[str, Tensor], skeleton: Skeleton | None = None) -> None:
        skeleton = skeleton or self.skeleton
        skeleton.fill({name: value.to(self.device, self.dtype) for name, value in rest.items()})
        skeleton.model.to(self.device)

    def _window(self, start: int, count: int, x_fp: Tensor, x_q: Tensor) -> tuple[Tensor, Tensor]:
        """One window: run it in float, quantize it unless its shards are there, run what the shards hold."""
        began = time.monotonic()
        block = self.float_block(start, count)
        with watched(block) as peaks:
            y_fp = run_all(block, x_fp, batch=self.batch)
        self._see(FLOAT, peaks)
        if not bool(torch.stack(torch.aminmax(y_fp)).isfinite().all()):
            raise LowbitError(
                f"block {start}: the float model's own output is NaN or infinite; its weights are broken, or too "
                "large for --dtype float16"
            )
        if not all((self.out / block_file(i)).exists() for i in block.indices):
            calib = Calib(x_fp, x_q, y_fp, self.batch)
            done = block
            for _, step in self.recipe.block_steps:
                done = step(done, self._shown(step, calib), self.scheme)
            self.write(done, damages(done, x_fp[:1].to(self.device), self.scheme), time.monotonic() - began)
            for note in done.notes:
                say(f"block {_about(note, done)}: {note}")
        del block
        for index in range(start, start + count):
            shard = Checkpoint(self.out, [block_file(index)])
            ours = read_block(shard, self.skeleton, index, self.plan.specs, self.plan.layout, self.device)
            with watched(ours) as peaks:
                x_q = run_all(ours, x_q, ours.quantized_params(), self.scheme, batch=self.batch)
            self._see(QUANTIZED, peaks)
            if (self.out / pictures_file(index)).exists():
                pictures = Checkpoint(self.out, [pictures_file(index)])
                self._see(MAP, pictures.read(pictures.names))
            kept = read_json(self.out / notes_file(index))
            self.rows.append({"block": index, "notes": kept["notes"], **kept.get("record", {})})
        # The float stream is known at the window's end only; a window shares one error.
        error = stream_error(x_q, y_fp, self.device, self.batch)
        if not math.isfinite(error):
            raise LowbitError(f"block {start}: the quantized model's output is NaN or infinite: take another recipe")
        for row in self.rows[-count:]:
            row["relative_error"] = error
        return y_fp, x_q

    def _shown(self, step: Any, calib: Calib) -> Calib:
        """What a step may look at: what is fitted in closed form leaves out the sequences that judge learned steps.

        Had a rounding such as GPTQ's or a refit seen these, the start would look better there than it is, and what
        is learned behind it would be thrown away.
        """
        steps = [method for _, method in self.recipe.steps]
        behind = steps[steps.index(step) + 1 :]
        judge = next((method for method in behind if getattr(method, "epochs", 0)), None)
        if judge is None or not getattr(step, "solves", False):
            return calib
        train, _ = judge.schedule(0).split(len(calib.x_q))
        x_fp, x_q, y_fp = (taken(stream, train) for stream in (calib.x_fp, calib.x_q, calib.y_fp))
        return replace(calib, x_fp=x_fp, x_q=x_q, y_fp=y_fp)

    def _see(self, kind: str, found: Mapping[str, Tensor]) -> None:
        self.observed |= {f"{kind}.{name}": value.cpu() for name, value in found.items()}

    def _check(self, block: Block) -> None:
        """A recipe must leave codes for exactly the planned linears, finite and in range."""
        wanted = {name for name in block.linears() if block.full_name(name) in self.plan.specs}
        if set(block.qweights) != wanted:
            odd = sorted(set(block.qweights) ^ wanted)
            raise RuntimeError(f"block {block.start}: codes and plan differ for {odd}")
        scales = {name: q.grid.scale for name, q in block.qweights.items()}
        for name, value in [*block.params.items(), *block.online.items(), *scales.items()]:
            if not bool(torch.isfinite(value).all()):
                raise LowbitError(f"block {block.start}: '{name}' became NaN or infinite; nothing of it was written")
        for name, q in block.qweights.items():
            if float(q.grid.scale.max()) >= (most := torch.finfo(q.spec.scale_dtype).max):
                raise LowbitError(
                    f"block {block.start}: the weights of '{name}' are so large that their scale would be cut to "
                    f"{most:g}; the checkpoint is broken, or the recipe scaled too much"
                )

    def write(self, block: Block, damage: Mapping[int, Any], seconds: float) -> None:
        """Notes and pictures first, the shard last: a shard that is there is complete, and its block was checked."""
        self._check(block)
        if self.latents:
            write_latents(self.out, block)
        for index in block.indices:
            prefix = f"{index}."
            tensors: dict[str, Tensor] = {}
            for name, value in block.params.items():
                linear = name.removesuffix(".weight")
                if name.startswith(prefix) and linear not in block.qweights:
                    tensors[block.full_name(name)] = value.cpu()
            for name, value in block.online.items():
                if name.startswith(prefix):
                    tensors[f"{block.full_name(name)}{ONLINE}"] = value.detach().float().cpu().contiguous()
            for linear, q in block.qweights.items():
                if linear.startswith(prefix):
                    stored = pack(q, self.plan.layout)
                    tensors |= {f"{block.full_name(linear)}.{key}": value.cpu() for key, value in stored.items()}
            notes = [note for note in block.notes if _about(note, block) == index]
            figures = {"steps": dict(block.record[index])} if index in block.record else {}
            record = {
                "notes": notes,
                "record": {**figures, "damage": damage[index]},
                "seconds": seconds / len(block.layers),
                "peak_memory_bytes": peak_memory_bytes(),
            }
            write_json(self.out / notes_file(index), record)
            pictures = {name: value.cpu() for name, value in block.pictures.items() if name.startswith(prefix)}
            if pictures:
                write_tensors(self.out / pictures_file(index), pictures)
            write_tensors(self.out / block_file(index), tensors)

    def _write_rest(self, rest: Mapping[str, Tensor]) -> None:
        """Embeddings, norms and head in the dtype they came in, rounded to nearest where an override asks for it."""
        if (self.out / REST).exists():
            return
        tensors = dict(rest)
        head = f"{self.plan.head}.weight"
        if self.plan.untie:
            tensors[head] = tensors[f"{self.plan.embed}.weight"].clone()
        for module in (self.plan.embed, self.plan.head):
            if module in self.plan.specs:
                spec, weight = self.plan.specs[module], tensors.pop(f"{module}.weight").float()
                stored = pack(quantize(weight, minmax_grid(weight, spec), spec), self.plan.layout)
                tensors |= {f"{module}.{key}": value for key, value in stored.items()}
        write_tensors(self.out / REST, tensors)


def _about(note: str, block: Block) -> int:
    """The layer that a note names (as in ``7.mlp.up_proj``), or the window's first."""
    found = [i for i in block.indices if re.search(rf"(?<![\w.]){i}\.[a-z_]", note)]
    return found[0] if found else block.start


def check_space(out: Path, needed: int) -> None:
    """Refuse to start where the disk surely ends before the run does; what a stopped run left counts as done."""
    place = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(place).free
    missing = needed - sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if free < missing:
        raise LowbitError(
            f"out of disk: the result takes about {missing:,} more bytes, {place} has {free:,} free; free some space "
            "or choose another --out"
        )
