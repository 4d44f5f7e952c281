"""What a target has for a model: the footprint of its file, and the formats in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowbit.checkpoints.copy_tensors import copied_size
from lowbit.errors import LowbitError, canonical
from lowbit.exporters import exporter_of
from lowbit.exporters.fit import Misfit
from lowbit.exporters.footprint import FloatModel, Footprint
from lowbit.exporters.offered import Refuses
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import shapes_of
from lowbit.pipeline.opened import Opened, computed
from lowbit.pipeline.recipe import load_recipe
from lowbit.pipeline.request import model_name
from lowbit.pipeline.target import subject_of
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme import Scheme
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.plan import Plan, linear_shapes, make_plan
from lowbit.runs.stock_experts import read_together


@dataclass(frozen=True)
class Target:
    """A target of ``lowbit fit``.

    Attributes:
        footprint: of a model; the last argument is llama.cpp's name of the pre-tokenizer.
        runtime: the target runtime of the run, a name of ``RUNTIMES``; ``None``: its run folder is the file.
    """

    footprint: Callable[[FloatModel, Skeleton, str | None], Footprint]
    runtime: str | None

    @property
    def export(self) -> str | None:
        """The target of the export; ``None``: there is nothing to export."""
        return None if self.runtime is None else RUNTIMES[self.runtime].target


def _gguf(model: FloatModel, skeleton: Skeleton, pre: str | None) -> Footprint:
    from lowbit.exporters.gguf_footprint import footprint

    return footprint(model, pre)


def _vllm(model: FloatModel, skeleton: Skeleton, pre: str | None) -> Footprint:
    from lowbit.exporters.folder_footprint import footprint

    architecture = skeleton.architecture
    groups = [
        tuple(f"{architecture.blocks}.{index}.{name}" for name in group)
        for index, kind in enumerate(architecture.layers)
        for group in kind.groups
    ]
    groups = [kept for group in groups if (kept := tuple(name for name in group if name in model.modules))]
    return footprint(model, skeleton, groups, _refusal("vllm", skeleton), "vllm")


def _transformers(model: FloatModel, skeleton: Skeleton, pre: str | None) -> Footprint:
    from lowbit.exporters.folder_footprint import footprint

    def refuses(plan: Plan, scheme: Scheme) -> Misfit | None:
        return None if plan.stock is None else Misfit("weight", plan.stock)

    together = read_together(skeleton)
    groups = [(name,) for name in model.modules if name not in set(together)]
    return footprint(model, skeleton, [*groups, *([together] if together else [])], refuses, None)


def _onnx(model: FloatModel, skeleton: Skeleton, pre: str | None) -> Footprint:
    from lowbit.exporters.onnx_footprint import footprint

    return footprint(model, skeleton, _refusal("onnxruntime", skeleton))


def _executorch(model: FloatModel, skeleton: Skeleton, pre: str | None) -> Footprint:
    from lowbit.exporters.pte_footprint import footprint

    return footprint(model, skeleton, _refusal("executorch", skeleton))


def _refusal(runtime: str, skeleton: Skeleton) -> Refuses:
    def refuses(plan: Plan, scheme: Scheme) -> Misfit | None:
        return _misfit(runtime, plan, scheme, skeleton)

    return refuses


TARGETS = {
    "llama.cpp": Target(_gguf, "llama.cpp"),
    "onnxruntime": Target(_onnx, "onnxruntime"),
    "executorch": Target(_executorch, "executorch"),
    "vllm": Target(_vllm, "vllm"),
    "transformers": Target(_transformers, None),
}


def target_of(given: str) -> str:
    """The target of that name, in any case; an unknown one raises an error that lists the known ones."""
    return canonical("target", given, TARGETS)


def footprint_of(target: str, model: str, opened: Opened, pre: str | None = None) -> Footprint:
    """The footprint of a model that was opened as ``model`` in a target's file.

    Raises:
        LowbitError: the target does not compute this model.
    """
    if pre is not None and target != "llama.cpp":
        raise LowbitError(f"--pre {pre} given: it names a pre-tokenizer of llama.cpp, and the target is {target}")
    skeleton = opened.skeleton
    architecture = skeleton.architecture
    _check_architecture(target, skeleton)
    routers = architecture.routers()  # float unless somebody asks: what they choose is no matter of bits
    facts = FloatModel(
        opened.config,
        opened.source.folder,
        model_name(model),
        opened.checkpoint,
        {name: tuple(shape) for name, shape in shapes_of(skeleton).items()},
        {name: shape for name, shape in linear_shapes(skeleton).items() if name not in routers},
        architecture.embed,
        architecture.head,
        skeleton.tied,
        copied_size(opened.checkpoint.folder, opened.others.files) if _carries(target) else 0,
    )
    footprint = TARGETS[target].footprint(facts, skeleton, pre)
    if not footprint.weights:
        raise LowbitError(f"{target} has no format for any weight of this model: give another --target")
    # Layers that read the text look it up in the float embedding, so that ``quantize`` has no formats for it.
    return footprint.without_formats(architecture.embed) if computed(opened).reads_text else footprint


def _carries(target: str) -> bool:
    """Whether the target's file has what a run carries over as it is."""
    runtime = TARGETS[target].runtime
    return runtime is None or exporter_of(RUNTIMES[runtime].target).carries


def _check_architecture(target: str, skeleton: Skeleton) -> None:
    """Refuse a model that the target does not compute in any format."""
    runtime, scheme = TARGETS[target].runtime, parse_scheme("w8a16-sym")
    if runtime is None:
        return
    if skeleton.architecture.text_model and not exporter_of(RUNTIMES[runtime].target).text_models:
        raise LowbitError(
            f"{target} exports hold a text model alone, and {skeleton.config.architectures[0]} has other parts: give "
            "--target llama.cpp or transformers"
        )
    misfit = _misfit(runtime, make_plan(skeleton, scheme), scheme, skeleton)
    if misfit is not None and misfit.field == "architecture":
        raise LowbitError(f"{target} does not support this model: {misfit.why}")


def _misfit(runtime: str, plan: Plan, scheme: Scheme, skeleton: Skeleton) -> Misfit | None:
    subject = subject_of(plan, scheme, load_recipe("rtn"), skeleton)
    return exporter_of(RUNTIMES[runtime].target).misfit(subject)
