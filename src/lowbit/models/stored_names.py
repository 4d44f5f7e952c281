"""The names that a model's tensors have in files, where they are not the model's own.

Checkpoints of models with several parts keep the names of the classes that they were first written for:
``language_model.model.layers.0`` for ``model.language_model.layers.0``. The library renames tensors as it loads them,
by rules that each class has, and adds or takes off the name of the base model. The same rules are used here, so a
name means what it means there. A run folder keeps its source's names, which every loader of the source knows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.models.architecture import Architecture
from lowbit.models.build import empty_model, is_composite
from lowbit.models.experts import state_shapes


def as_it_is(name: str) -> str:
    """The rule of a model whose files have its own names."""
    return name


@dataclass(frozen=True)
class StoredNames:
    """How names in a model's files and names in the model correspond.

    Attributes:
        rename: from a name in a file to the model's.
        modules: module paths of the model, and those in its files where they differ.
    """

    rename: Callable[[str], str] = as_it_is
    modules: Mapping[str, str] = field(default_factory=dict)

    def stored(self, name: str) -> str:
        """The name in a file of a tensor, by the model's name; what a module gets when it is quantized included.

        >>> names = StoredNames(modules={"model.text": "text.model"})
        >>> names.stored("model.text.layers.0.up_proj.weight_scale"), names.stored("lm_head.weight")
        ('text.model.layers.0.up_proj.weight_scale', 'lm_head.weight')
        """
        path, rest = name, ""
        while path:
            if path in self.modules:
                return self.modules[path] + rest
            path, _, last = path.rpartition(".")
            rest = f".{last}{rest}"
        return name

    def stored_all(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """A mapping by the model's names, by names in files."""
        return {self.stored(name): value for name, value in tensors.items()}


Rule = Callable[[str], str]  # from a name in a file to another name


def renaming(model: Any, listed: Collection[str]) -> tuple[Rule, Rule]:
    """From a name in a file to the model's, as the library finds it; and by the rules of the model's class alone.

    Args:
        model: the library's.
        listed: names of its tensors, and of those that these are split into.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    base = f"{model.base_model_prefix}."

    def by_rules(stored: str) -> str:
        name: str = apply_renamings(stored, rules)
        return name

    def is_listed(name: str) -> bool:
        """Whether the model has the tensor, or a weight in its module: that of one may be packed into several."""
        return name in listed or f"{name.rpartition('.')[0]}.weight" in listed

    def rename(stored: str) -> str:
        name = by_rules(stored)
        # The last one: the library keeps a name that it knows and would rename to one that it does not.
        choices = (name, base + name, name.removeprefix(base), stored)
        return next((choice for choice in choices if is_listed(choice)), name)

    return rename, by_rules


def use_model_names(
    checkpoint: Checkpoint, config: Any, architecture: Architecture, trust_remote_code: bool = False
) -> StoredNames:
    """From now on ``checkpoint`` has the model's names for its tensors; those of experts are of blocks.

    Args:
        checkpoint: the model's files.
        config: its config.
        architecture: its architecture.
        trust_remote_code: permit code of the model's own.

    Raises:
        LowbitError: two tensors of the checkpoint have one name in the model.
    """
    model = empty_model(config, trust_remote_code)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    listed = {*shapes, *state_shapes(architecture, shapes)}
    rename, apply_rules = renaming(model, listed)
    stored = checkpoint.names
    checkpoint.rename(rename)
    if not is_composite(config):
        return StoredNames(rename)
    renamed = {apply_rules(name): name for name in stored}
    pairs = {name: file for name, file in renamed.items() if name in listed and name != file}
    names = StoredNames(rename, _modules(pairs.items()))
    exact = all(rename(names.stored(name)) == name for name in listed)
    return names if exact else StoredNames(rename)


def _modules(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Module paths that differ, from pairs of tensors' names: the shortest ones that the pairs agree on.

    >>> _modules([("model.text.norm.weight", "text.model.norm.weight"), ("model.see.a.weight", "see.a.weight")])
    {'model.text': 'text.model', 'model.see': 'see'}
    """
    out: dict[str, str] = {}
    for name, file in pairs:
        ours, theirs = name.split("."), file.split(".")
        while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
            ours, theirs = ours[:-1], theirs[:-1]
        out.setdefault(".".join(ours), ".".join(theirs))
    return out
