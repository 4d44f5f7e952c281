"""``lowbit.merge``: base model and LoRA adapter as one model folder, which everything else takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoints.adapters import Adapter, read_adapter
from lowbit.checkpoints.companions import CONFIG, companions, copy_companion
from lowbit.checkpoints.gguf_reader import ShardWriter, build
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.kinds import what_is
from lowbit.checkpoints.resolve import resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.paths import user_path
from lowbit.progress import track
from lowbit.torch_state import own_torch_state


@dataclass(frozen=True)
class Merged:
    """What ``merge`` wrote.

    Attributes:
        out: the model's folder.
        changed: number of weights to which the adapter added something.
        replaced: number of tensors that the adapter has whole.
    """

    out: Path
    changed: int
    replaced: int


@own_torch_state
def merge(
    adapter: str | Path,
    *,
    base: str | Path,
    out: str | Path,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge a LoRA adapter into its base model; the result is an ordinary model folder.

    Weights are added in float32 and rounded to the base's dtype. Tokenizer files of the adapter take precedence.

    Args:
        adapter: the adapter's folder, with ``adapter_config.json``.
        base: the model that it was trained on, given as for ``quantize``. The path that the adapter's config names is
            not read.
        out: a folder that does not exist yet.
        revision, allow_pickle, trust_remote_code: of the base, as for ``quantize``.

    Raises:
        LowbitError: the adapter is of another kind or does not fit the base; nothing is written.
    """
    folder, final = user_path(adapter), user_path(out)
    if final.exists():
        raise LowbitError(f"--out {final} exists: name another, or delete it")
    content = read_adapter(folder)
    source = resolve(str(base), revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if (source.folder / "lowbit.json").is_file() or read_json(source.folder / CONFIG).get("quantization_config"):
        raise LowbitError(f"--base {base} is {what_is(source.folder)}: give the float model")
    checkpoint = Checkpoint(source.folder)
    stored = _matched(checkpoint, content)

    def write(work: Path) -> None:
        shards = ShardWriter(work)
        for name in track(checkpoint.names, f"merging {folder.name}"):
            ours = stored.get(name, "")
            if ours in content.replaced:
                value = content.replaced[ours].to(checkpoint.read([name])[name].dtype).contiguous()
            else:
                value = checkpoint.read([name])[name]
            if ours in content.changes:
                value = content.changes[ours].apply(value)
            shards.add(name, value)
        shards.close()
        for name in companions(source.folder, code=trust_remote_code):
            copy_companion(source.folder, work, name)
        for name in companions(folder, code=False):
            copy_companion(folder, work, name)
        copy_companion(source.folder, work, CONFIG)

    build(final, write)
    return Merged(final, len(content.changes), len(content.replaced))


def _matched(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """The adapter's names by the base's; raises ``LowbitError`` for a weight that the base lacks or has otherwise."""
    shapes: dict[str, tuple[int, ...]] = {name: change.shape for name, change in adapter.changes.items()}
    shapes |= {name: tuple(value.shape) for name, value in adapter.replaced.items()}
    out = {}
    for name, shape in shapes.items():
        stored = checkpoint.find(name)
        if stored is None:
            raise LowbitError(
                f"{adapter.folder} changes '{name}', which {checkpoint.folder} lacks: give its own base model"
            )
        if checkpoint.shape(stored) != shape:
            raise LowbitError(
                f"{adapter.folder} changes '{name}' of shape {shape}, {checkpoint.folder} has "
                f"{checkpoint.shape(stored)}: give its own base model"
            )
        out[stored] = name
    return out
