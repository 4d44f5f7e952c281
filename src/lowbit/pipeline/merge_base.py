"""A base model's tensors with an adapter's changes: which tensor a change is of, and what becomes of tied ones.

An adapter names tensors as the model has them in memory, files may have other names
(``language_model.model.layers.0`` for ``model.language_model.layers.0``); adapters of older releases have those too.
Names are matched as the library renames tensors that it loads, and written as the base's files have them.

Head and embedding may be one tensor. An adapter that changes the embedding leaves the head as it was, and the
reverse: PEFT wraps one of the two modules. The result then has two tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.adapters import Adapter
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.build import empty_model, is_tied
from lowbit.models.stored_names import renaming
from lowbit.models.validate import report_build_errors


class MergeBase:
    """A float model's files under the model's names.

    Attributes:
        checkpoint: its tensors.
        rename: from a name in files to the model's.
        pair: names of the weights of embedding and head if the config ties them and files hold one tensor for both,
            or equal ones; otherwise ``None``.
    """

    def __init__(self, folder: Path, config: Any, trust_remote_code: bool = False) -> None:
        """Read the files' headers.

        Args:
            folder: the model's folder.
            config: its config.
            trust_remote_code: permit code of the model's own.

        Raises:
            LowbitError: no model can be built from the config, or two tensors have one name in it.
        """
        self.checkpoint = Checkpoint(folder)
        with report_build_errors(folder):
            model = empty_model(config, trust_remote_code)
            self.rename, _ = renaming(model, frozenset(model.state_dict()))
        self.checkpoint.rename(self.rename)
        self.pair = self._tied(model) if is_tied(config) else None

    def _tied(self, model: Any) -> tuple[str, str] | None:
        """Names of the weights of embedding and head, of which files hold one, or both with the same values."""
        paths = {id(module): path for path, module in model.named_modules()}
        ends = (paths.get(id(one)) for one in (model.get_input_embeddings(), model.get_output_embeddings()))
        embed, head = (None if path is None else f"{path}.weight" for path in ends)
        if embed is None or head is None:
            return None
        there = [self.checkpoint.find(name) is not None for name in (embed, head)]
        if all(there):
            values = self.checkpoint.read([embed, head])
            return (embed, head) if torch.equal(values[embed], values[head]) else None
        if any(there):
            held, other = (embed, head) if there[0] else (head, embed)
            self.checkpoint.let_stand_in(held, other)
            return embed, head
        return None

    def changed(self, adapter: Adapter) -> Changed:
        """The result of an adapter.

        Raises:
            LowbitError: the adapter changes a weight that the base lacks or has otherwise.
        """
        shapes: dict[str, tuple[int, ...]] = {name: change.shape for name, change in adapter.changes.items()}
        shapes |= {name: tuple(value.shape) for name, value in adapter.replaced.items()}
        sources: dict[str, str] = {}
        for name, shape in shapes.items():
            place = self._place(adapter, name)
            if place in sources:
                raise LowbitError(
                    f"{adapter.folder} changes '{sources[place]}' and '{name}', two names of one tensor of "
                    f"{self.checkpoint.folder}: merge it with the release of peft that it was made with"
                )
            if (ours := self.checkpoint.shape(self.checkpoint.find(place) or place)) != shape:
                raise LowbitError(
                    f"{adapter.folder} changes '{name}' of shape {shape}, {self.checkpoint.folder} has "
                    f"{ours}: give its own base model"
                )
            sources[place] = name
        return self._changed(adapter, sources)

    def _place(self, adapter: Adapter, name: str) -> str:
        """The model's name of a tensor that an adapter changes."""
        for choice in dict.fromkeys((name, self.rename(name))):
            if self.pair and choice in self.pair:
                return choice
            if (stored := self.checkpoint.find(choice)) is not None:
                return stored
        raise LowbitError(
            f"{adapter.folder} changes '{name}', which {self.checkpoint.folder} lacks: give its own base model"
        )

    def _changed(self, adapter: Adapter, sources: dict[str, str]) -> Changed:
        files = {self.checkpoint.name_in_file(name): name for name in self.checkpoint.names}
        touched = [name for name in self.pair or () if name in sources]
        if not self.pair or not touched:
            return Changed(self.checkpoint, adapter, sources, files, untied=False)
        if adapter.ties and len(touched) == 1:  # the other one follows
            sources |= dict.fromkeys(self.pair, sources[touched[0]])
        both = Changed(self.checkpoint, adapter, sources, files, untied=True)
        embed, head = (both.of_model(name) for name in self.pair)
        if torch.equal(embed, head):
            return Changed(self.checkpoint, adapter, sources, files, untied=False)
        for name in self.pair:
            if name not in self.checkpoint.names:
                if self.rename(name) != name:
                    raise LowbitError(
                        f"{adapter.folder} changes '{touched[0]}', which {self.checkpoint.folder} ties to '{name}', "
                        "and the latter has no name of its own in files: merge it with peft"
                    )
                files[name] = name
        return both


@dataclass(frozen=True)
class Changed:
    """The tensors of base and adapter together.

    Attributes:
        checkpoint: the base.
        adapter: the adapter.
        sources: names in the adapter by the model's names.
        files: the model's names by names in files.
        untied: head and embedding are two tensors, where the base has one.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    sources: Mapping[str, str]
    files: Mapping[str, str]
    untied: bool

    @property
    def names(self) -> list[str]:
        """Names in files, sorted."""
        return sorted(self.files)

    def value(self, name: str) -> Tensor:
        """A tensor by its name in files."""
        return self.of_model(self.files[name])

    def of_model(self, name: str) -> Tensor:
        """A tensor by the model's name, in the base's dtype."""
        value, source = self.checkpoint.read([name])[name], self.sources.get(name, "")
        if source in self.adapter.replaced:
            value = self.adapter.replaced[source].to(value.dtype).contiguous()
        return self.adapter.changes[source].apply(value) if source in self.adapter.changes else value
