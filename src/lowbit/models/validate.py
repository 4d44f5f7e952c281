"""Checks that a checkpoint matches its config, before any work and from headers where they suffice."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.stored import Header
from lowbit.errors import LowbitError, one_line, shown
from lowbit.models.architecture import Architecture
from lowbit.models.block import Block
from lowbit.models.build import empty_model, is_tied, text_config, tied_tensors
from lowbit.models.experts import state_shapes
from lowbit.models.families import architecture_of
from lowbit.models.forward import run
from lowbit.models.skeleton import Skeleton
from lowbit.models.stored_experts import settle_experts
from lowbit.models.stored_names import StoredNames, use_model_names
from lowbit.models.stored_rows import settle_rows
from lowbit.progress import say, track
from lowbit.quant.scheme import ModuleFormats
from lowbit.quant.static_clusters import SIZES
from lowbit.sources.checkpoint import open_checkpoint

FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names
# Fields for layers behind the last one, which predict several tokens and which the library's classes do not have.
PREDICTORS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
PROBE = 2  # tokens that show whether a model computes
_DTYPES = {
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
}
_DTYPES |= {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}


@contextmanager
def report_build_errors(folder: Path) -> Iterator[None]:
    """Report errors of transformers on an invalid ``config.json``, which may be of many types, as ``LowbitError``."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,  # of a package that the model's own code needs
        LookupError,
        NameError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise  # of a device: the config is right, the device is too small
        advice = "install what its code needs" if isinstance(error, ImportError) else "fetch it again"
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise LowbitError(f"no model can be built from {folder / 'config.json'} ({reason}): {advice}") from error


def open_weights(
    folder: Path, config: Any, run: bool = False, trust_remote_code: bool = False
) -> tuple[Checkpoint, StoredNames]:
    """A model's tensors by the model's names, as floats, and what they are called in its files.

    Args:
        folder: the folder.
        config: its config; it loses ``quantization_config``, and is settled by ``settle_tied``.
        run: it is a run folder, whose codes its manifest describes.
        trust_remote_code: permit code of the model's own.

    Raises:
        LowbitError: the config is of no known architecture, or names, layers or weights do not match it.
    """
    checkpoint = open_checkpoint(folder, config, run=run)
    architecture = architecture_of(config)
    _check_count(checkpoint, config, architecture)
    with report_build_errors(folder):
        names = use_model_names(checkpoint, config, architecture, trust_remote_code)
    settle_tied(checkpoint, config)
    return checkpoint, names


def check_model(
    checkpoint: Checkpoint,
    config: Any,
    modules: Mapping[str, ModuleFormats] | None = None,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Refuse a checkpoint that does not match its config, before a size that the config states takes any memory.

    The model is built on ``meta``, where a parameter has a shape and no storage, and compared with the headers of the
    checkpoint's files. Layers are counted first, since each is an object even there.

    Args:
        checkpoint: the model's files, see ``open_weights``.
        config: its config, settled by ``settle_tied``.
        modules: formats of a run folder's quantized modules by full name.
        trust_remote_code: permit code of the model's own.

    Returns:
        Names of the float checkpoint's tensors that the model's class does not have; of a run folder none.
    """
    architecture = architecture_of(config)
    _check_layers(checkpoint, config, architecture)
    with report_build_errors(checkpoint.folder):
        model = empty_model(config, trust_remote_code)
    tied = tied_tensors(model, config, architecture.head)
    shapes = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    shapes = state_shapes(architecture, shapes)
    modules = modules or {}
    if not modules:
        settle_experts(checkpoint, architecture, shapes)
        settle_rows(checkpoint, model, shapes)
    for module in architecture.transposed() & modules.keys():
        shapes[f"{module}.weight"] = shapes[f"{module}.weight"][::-1]  # codes are (out, in)
    integers = {name for name, value in model.state_dict().items() if not value.is_floating_point()}
    used = check_tensors(checkpoint, shapes, architecture, modules, integers)
    if modules:
        return ()
    unlisted = tuple(name for name in checkpoint.names if name not in used and name not in tied)
    _refuse_in_layers(unlisted, checkpoint, config, model, architecture)
    return unlisted


def _check_count(checkpoint: Checkpoint, config: Any, architecture: Architecture) -> None:
    """Refuse a config with more layers than any list of layers in the checkpoint, whatever that is called there."""
    stored: dict[str, set[int]] = {}
    pattern = re.compile(r"(.*?)\.([0-9]{1,9})\.")
    for name in checkpoint.names:
        if match := pattern.match(name):
            stored.setdefault(match[1], set()).add(int(match[2]))
    _compare_layers(checkpoint, config, architecture, max(map(len, stored.values()), default=0))


def _check_layers(checkpoint: Checkpoint, config: Any, architecture: Architecture) -> None:
    """Refuse a config with more layers than the checkpoint has tensors of."""
    blocks = architecture.blocks
    pattern = re.compile(rf"(?:{re.escape(blocks)}|{re.escape(blocks.removeprefix('model.'))})\.([0-9]{{1,9}})\.")
    stored = len({int(m[1]) for name in checkpoint.names if (m := pattern.match(name))})
    _compare_layers(checkpoint, config, architecture, stored)


def _compare_layers(checkpoint: Checkpoint, config: Any, architecture: Architecture, stored: int) -> None:
    """The config's own number may count halves of layers, as LongCat's does."""
    layers = text_config(config).num_hidden_layers
    if not 1 <= len(architecture.layers) <= stored:
        raise LowbitError(
            f"{checkpoint.folder} has tensors of {stored} layers, its config.json says num_hidden_layers "
            f"{shown(layers)}: they do not match"
        )


def _refuse_in_layers(
    unlisted: Iterable[str], checkpoint: Checkpoint, config: Any, model: Any, architecture: Architecture
) -> None:
    """Refuse a weight or bias in the list of layers that the model does not have: ignored, it would change the model.

    Layers behind the last one are accepted where config or class says that they predict several tokens, and so is
    what the class ignores.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    text = text_config(config)
    extra = [getattr(text, field, None) for field in PREDICTORS]
    last = text.num_hidden_layers + max((n for n in extra if isinstance(n, int)), default=0)
    predictors = {f"{architecture.blocks}.{index}." for index in range(text.num_hidden_layers, last)}
    prefixes = (f"{architecture.blocks}.", f"{architecture.blocks.removeprefix('model.')}.")
    for name in unlisted:
        if not name.startswith(prefixes) or not name.endswith((".weight", ".bias")):
            continue
        if not name.startswith(tuple(predictors)) and not any(pattern.search(name) for pattern in ignored):
            raise LowbitError(
                f"{checkpoint.folder} has a tensor {shown(name)} that its config.json does not imply: they do not "
                "match"
            )


def check_computes(skeleton: Skeleton, first_block: Callable[[], Block], folder: Path) -> None:
    """Refuse a config with which the library's own code cannot compute, by running two tokens through it.

    Configs are checked by nobody until a layer computes: a window that is not set, a probability above 1.

    Args:
        skeleton: the model, filled; what it recorded is forgotten.
        first_block: reads block 0, after ``skeleton`` has embedded a text.
        folder: the model's, for the message.
    """
    device = next(skeleton.model.parameters()).device
    ids = torch.zeros(1, PROBE, dtype=torch.int64, device=device)
    with report_build_errors(folder), torch.no_grad():
        hidden = skeleton.embed(ids)
        block = first_block()
        out = run(block, hidden, block.quantized_params(), quantized=bool(block.qweights))
        skeleton.logits(ids, skeleton.leaves.pack(block.leaves.unpack(out)))  # as if it were the last layer
    skeleton.forget()


def shapes_of(skeleton: Skeleton) -> dict[str, torch.Size]:
    """Shapes of all tensors in a float checkpoint of the model, by the model's names."""
    state, blocks = skeleton.model.state_dict(), skeleton.architecture.blocks
    shapes = {name: state[name].shape for name in skeleton.shared_names}
    for index in range(len(skeleton.layers)):
        shapes |= {f"{blocks}.{index}.{name}": shape for name, shape in skeleton.parameter_shapes(index).items()}
    return shapes


def check_tensors(
    checkpoint: Checkpoint,
    shapes: Mapping[str, torch.Size],
    architecture: Architecture,
    modules: Mapping[str, ModuleFormats],
    integers: Collection[str] = (),
) -> set[str]:
    """Refuse a checkpoint whose tensors do not match its config; only headers are read.

    ``shapes`` are those of the float model; ``modules`` has the formats of the modules that are quantized. Tensors of
    other parts than the text model, and those that are ``integers`` in the model, such as tables of tokens, may be of
    any dtype. Returns the names that the checkpoint has for ``shapes``.
    """
    stored = checkpoint.headers()
    used: set[str] = set()
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module in modules and name != module:
            _check_packed(checkpoint, module, modules[module], tuple(shape), stored)
            continue
        holders = checkpoint.holders(name)
        if not holders:
            raise LowbitError(f"{checkpoint.folder} has no tensor '{name}': it does not match its config.json")
        used.update(holders)
        stored_name, header = holders[0], stored[holders[0]]
        if (part := checkpoint.part(name)) is not None:
            header = Header(part.shape(header.shape), header.dtype)
        if (rows := checkpoint.rows(name)) is not None:
            header = Header(rows.shape([stored[one].shape for one in holders]), header.dtype)
        if header.shape != tuple(shape):
            raise LowbitError(
                f"'{stored_name}' in {checkpoint.folder} has shape {header.shape}, config.json implies "
                f"{tuple(shape)}: they do not match"
            )
        if header.dtype not in FLOATS and name not in integers and not architecture.is_outside(name):
            raise LowbitError(
                f"'{stored_name}' in {checkpoint.folder} is {header.dtype}; allowed: {', '.join(FLOATS)}"
            )
    return used


def _check_packed(
    checkpoint: Checkpoint,
    module: str,
    formats: ModuleFormats,
    shape: tuple[int, ...],
    stored: Mapping[str, Header],
) -> None:
    """Refuse a quantized weight whose tensors are not those of a weight of ``shape``."""
    rows, columns = shape
    tensors = {**formats.layout.stored(formats.weight, rows, columns), **formats.input_tensors}
    for name, expected in tensors.items():
        full = f"{module}.{name}"
        if full not in stored:
            raise LowbitError(f"{checkpoint.folder} has no tensor '{full}': it does not match its lowbit.json")
        if stored[full] != (due := Header(expected.shape, _DTYPES[expected.dtype])):
            raise LowbitError(
                f"'{full}' in {checkpoint.folder} is {stored[full].dtype} {stored[full].shape}; config.json and "
                f"lowbit.json imply {due.dtype} {due.shape}: they do not match"
            )
        if name == SIZES and (covered := int(checkpoint.read([full])[full].sum())) != columns:
            raise LowbitError(
                f"'{full}' in {checkpoint.folder} has clusters of {covered} channels, config.json implies {columns}: "
                "they do not match"
            )
        if name == "weight_shape" and (said := checkpoint.read([full])[full].tolist()) != list(shape):
            raise LowbitError(
                f"'{full}' in {checkpoint.folder} says {said}, config.json implies {list(shape)}: they do not match"
            )


def check_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Refuse NaN and infinite values, by reading every tensor once before any work."""
    for name in track(list(names), "checking weights"):
        checkpoint.read([name])


def settle_tied(checkpoint: Checkpoint, config: Any) -> None:
    """Make config and checkpoint agree on whether head and embedding are one tensor, as ``transformers`` loads them.

    Where the config ties them, either may be stored, and both if they are equal. If both are stored and differ, they
    are not tied: the config is changed, which is said.
    """
    architecture = architecture_of(config)
    head, embed = f"{architecture.head}.weight", f"{architecture.embed}.weight"
    if not is_tied(config) or (stored := checkpoint.find(head)) is None:
        return
    if checkpoint.find(embed) is None:
        checkpoint.let_stand_in(stored, embed)
        return
    weights = checkpoint.read([head, embed])
    if not torch.equal(weights[head], weights[embed]):
        config.tie_word_embeddings = False
        say(
            f"{checkpoint.folder}: '{head}' differs from '{embed}' although config.json ties them: they are read as "
            "two tensors, as transformers does"
        )


def check_ids(ids: torch.Tensor, skeleton: Skeleton, folder: Path) -> None:
    """Refuse token ids beyond the model's embeddings."""
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        raise LowbitError(
            f"the tokenizer in {folder} gives token {int(ids.max())}, the model has {rows} embeddings: they do not "
            "match"
        )
