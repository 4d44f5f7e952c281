"""``lowbit.merge``: base model and LoRA adapter as one model folder, which everything else takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoints.adapters import read_adapter
from lowbit.checkpoints.companions import CONFIG, companions, copy_companion
from lowbit.checkpoints.gguf_reader import ShardWriter, build
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.kinds import what_is
from lowbit.checkpoints.resolve import load_config, resolve
from lowbit.checkpoints.shipped_config import shipped_config, untie
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.paths import user_path
from lowbit.pipeline.merge_base import MergeBase
from lowbit.progress import say, track
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
    Where the base ties head and embedding and the adapter changes one of them, both are written, and untied.

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
    config = load_config(source.folder, trust_remote_code)
    base_model = MergeBase(source.folder, config, trust_remote_code)
    changed = base_model.changed(content)
    shipped = shipped_config(read_json(source.folder / CONFIG), trust_remote_code)
    if changed.untied:
        untie(shipped)

    def write(work: Path) -> None:
        shards = ShardWriter(work)
        for name in track(changed.names, f"merging {folder.name}"):
            shards.add(name, changed.value(name))
        shards.close()
        for name in companions(source.folder, code=trust_remote_code):
            copy_companion(source.folder, work, name)
        for name in companions(folder, code=False):
            copy_companion(folder, work, name)
        write_json(work / CONFIG, shipped)

    build(final, write)
    if changed.untied:
        say(f"{final} has head and embedding as two tensors: the adapter changes them apart, the base ties them")
    return Merged(final, len(content.changes), len(content.replaced))
