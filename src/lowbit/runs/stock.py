"""Whether stock ``transformers`` computes a run folder's model as it was simulated, and what it needs for that.

Its quantized linears have codes and no ``weight``. Some classes reach for that weight: RecurrentGemma, RWKV, xLSTM
and ModernBERT's decoder when they draw initial values, which loading a folder makes them do, and Falcon's linears in
a ``forward`` of their own. The config of such a run asks for dense weights at load time, and the model computes with
the same values.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lowbit.models.packed import drawn_from_outside, draws_into_weights
from lowbit.models.skeleton import Skeleton
from lowbit.quant.compressed_tensors import stock_loads
from lowbit.quant.scheme import ModelFormats
from lowbit.runs.stock_experts import stock_experts


def dense_where_needed(skeleton: Skeleton, formats: ModelFormats) -> ModelFormats:
    """The formats, made dense at load time where the model's class needs that and the loader can do it."""
    if _needs_weights(skeleton, formats) is None:
        return formats
    dense = _made_dense(formats)
    return formats if stock_loads(dense, skeleton.architecture.embed, two_d_inputs=False) else dense


def _made_dense(formats: ModelFormats) -> ModelFormats:
    return replace(formats, modules={name: replace(own, dense=True) for name, own in formats.modules.items()})


def why_not_stock(skeleton: Skeleton, formats: ModelFormats) -> str | None:
    """Why stock ``transformers`` cannot run the formats as simulated, or ``None`` if it can."""
    architecture = skeleton.architecture
    if (why := stock_experts(skeleton, formats)) is not None:
        return why
    if turned := architecture.transposed() & formats.modules.keys():
        name = min(turned)
        return f"{name} is stored as (in, out), and compressed-tensors quantizes linears that are stored as (out, in)"
    if not formats.dense and (needs := _needs_weights(skeleton, formats)) is not None:
        why = stock_loads(_made_dense(formats), architecture.embed, two_d_inputs=False)
        return f"{needs}, which packed linears do not have, and {why}"
    return stock_loads(formats, architecture.embed, two_d_inputs=_two_d_inputs(skeleton, formats))


def _two_d_inputs(skeleton: Skeleton, formats: ModelFormats) -> bool:
    """Whether some quantized input has no dimension of sequences."""
    architecture = skeleton.architecture
    flat = {f"{architecture.blocks}.{i}.{name}" for i, kind in enumerate(architecture.layers) for name in kind.flat}
    flat |= {name for name in architecture.linears() if architecture.is_experts(name)}
    return any(formats.input(name) is not None for name in flat & formats.modules.keys())


def _needs_weights(skeleton: Skeleton, formats: ModelFormats) -> str | None:
    """What in the model's class needs weights that packed linears do not have, or ``None``."""
    if (own := _computes_itself(skeleton, formats)) is not None:
        return f"{own} multiplies with its weight in code of its own"
    if draws_into_weights(skeleton.model):
        return f"{type(skeleton.model).__name__} draws initial values into weights"
    if (drawer := _drawer(skeleton, formats)) is not None:
        return f"{drawer} draws initial values into weights"
    return None


def _drawer(skeleton: Skeleton, formats: ModelFormats) -> str | None:
    """The class that draws initial values into quantized linears within it, as ModernBERT's decoder does."""
    blocks, kinds = skeleton.architecture.blocks, skeleton.architecture.layers
    for kind in skeleton.architecture.kinds():
        index = kinds.index(kind)
        packed = [name for name in kind.linears if f"{blocks}.{index}.{name}" in formats.modules]
        packed = [name for name in packed if not skeleton.architecture.is_experts(f"{blocks}.{index}.{name}")]
        if (found := drawn_from_outside(skeleton.model, skeleton.layers[index], packed)) is not None:
            return found
    return None


def _computes_itself(skeleton: Skeleton, formats: ModelFormats) -> str | None:
    """A quantized linear whose class has another ``forward`` than ``nn.Linear``, as Falcon's."""
    for index, (layer, kind) in enumerate(zip(skeleton.layers, skeleton.architecture.layers, strict=True)):
        for name in kind.linears:
            full = f"{skeleton.architecture.blocks}.{index}.{name}"
            if full not in formats.modules or skeleton.architecture.is_experts(full):
                continue
            if type(layer.get_submodule(name)).forward is not nn.Linear.forward:
                return full
    return None
