"""A model class the whole way: a small random model of it is quantized, loaded again, and run by stock transformers.

The model is the small one that discovery asks, in float32 and with every parameter drawn anew; its tokenizer knows
characters, its text is random words. What is quantized is loaded twice, by ``lowbit.load`` and by ``transformers``
alone, and both compute logits.
"""

from __future__ import annotations

import random
import string
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import lowbit
from lowbit.checkpoints.resolve import load_config
from lowbit.errors import LowbitError, one_line
from lowbit.exporters.verify import relative_error
from lowbit.models.architecture import Architecture
from lowbit.models.discovery.small import small_of
from lowbit.models.discovery.small_model import redraw
from lowbit.models.skeleton import Skeleton
from lowbit.runs.plan import linear_shapes

RECIPES: dict[str, tuple[str, ...]] = {  # with what is set
    "rtn": (),
    "gptq": (),
    "affinequant": ("affinequant.epochs=2",),
}
OK, EQUAL, NO_EDGES = "ok", "equal", "no edges"
SAMPLES, LENGTH = 8, 32  # of the calibration text, and of the ids that logits are compared for
GROUPS = (16, 8, 4, 2, 1)  # the largest that divides every width is taken
CLOSE = 1e-5  # of logits, in units of their spread: the same operations, other order of sums
TEXT = "text.txt"
Step = dict[str, str]
Guard = Callable[[], Any]  # gives a context that ends a step which takes too long


def whole_way(config: Any, folder: Path, guard: Guard) -> Iterator[dict[str, Step]]:
    """Steps by recipe, one more in each value: ``run`` is ``ok`` or a reason, ``stock`` ``equal`` or a reason.

    Args:
        config: of a model type; its small model is made here.
        folder: an empty folder.
        guard: a context for each step.
    """
    done: dict[str, Step] = {}
    try:
        with guard():
            scheme, architecture = prepared(config, folder / "model")
    except Exception as error:  # of the model's own code
        why = reason(error, folder)
        yield {recipe: {"run": why} for recipe in RECIPES}
        return
    for recipe in RECIPES:
        if recipe == "affinequant" and not any(kind.edges for kind in architecture.layers):
            done[recipe] = {"run": NO_EDGES}
        else:
            done[recipe] = step(folder / "model", folder / recipe, scheme, recipe, guard)
        yield dict(done)


def prepared(config: Any, folder: Path) -> tuple[str, Architecture]:
    """The small model of a config, as a folder; the scheme whose groups fit it, and its architecture."""
    write_small(config, folder)
    skeleton = Skeleton(load_config(folder, False))
    widths = [columns for _, columns in linear_shapes(skeleton).values()]
    if not widths:
        raise LowbitError("no linear is found in its layers")
    group = next(group for group in GROUPS if not any(width % group for width in widths))
    return f"w4a16g{group}-sym", skeleton.architecture


def write_small(config: Any, folder: Path) -> None:
    """Write the small model of a config, its tokenizer and a text."""
    small = small_of(config).config
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    redraw(model, 0)
    model.generation_config = GenerationConfig()  # a class's own may not fit small sizes
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    letters = random.Random(0)
    words = ("".join(letters.choices(string.ascii_letters + string.digits, k=5)) for _ in range(600))
    (folder / TEXT).write_text(" ".join(words))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character and three special ones: 98, as small models have 128."""
    characters = [chr(code) for code in range(33, 127)] + ["\u0120"]  # the last is how byte-level text writes a space
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {one: 3 + at for at, one in enumerate(characters)}
    own = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # some classes bring that splitting along
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def step(model: Path, out: Path, scheme: str, recipe: str, guard: Guard) -> Step:
    """Quantize a model folder by one recipe; load the result with ``lowbit.load`` and with ``transformers``."""
    try:
        with guard():
            quantized = lowbit.quantize(
                model,
                out,
                scheme=scheme,
                recipe=recipe,
                settings=RECIPES[recipe],
                data=str(model / TEXT),
                samples=SAMPLES,
                length=LENGTH,
            )
            stock = quantized.manifest.transformers
            simulated = logits(lowbit.load(out, dtype=getattr(torch, stock.dtype)))
            if not simulated.isfinite().all():
                raise LowbitError("the quantized model's logits are not finite")
            if relative_error(simulated, logits(from_stock(model))) == 0:
                raise LowbitError("the quantized model's logits are those of the float model")
    except Exception as error:
        return {"run": reason(error, out.parent)}
    if not stock.loads:
        return {"run": OK, "stock": stock.why_not or "it does not load"}
    try:
        with guard():
            gap = relative_error(logits(from_stock(out, stock.dtype)), simulated)
    except Exception as error:  # transformers raises what its classes raise
        return {"run": OK, "stock": reason(error, out.parent)}
    return {"run": OK, "stock": EQUAL if gap <= CLOSE else f"logits differ by {gap:.1e} of their spread"}


def from_stock(folder: Path, dtype: str = "float32") -> Any:
    """A folder as ``transformers`` loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits ``(LENGTH, vocabulary)`` for random token ids."""
    ids = torch.randint(3, 98, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    found: torch.Tensor = model.eval()(ids, use_cache=False).logits[0].float()
    return found


def reason(error: Exception, folder: Path) -> str:
    """An error in one line, without the folder's path; one that is a bug says its type and where it was raised."""
    text = one_line(error).replace(f"{folder}/", "")
    if isinstance(error, LowbitError | TimeoutError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {text}"


def went(row: dict[str, Any], *recipes: str) -> bool:
    """Whether a row's model went the whole way with these recipes: run, and the same logits from ``transformers``."""
    steps = row.get("steps", {})
    return all(steps.get(recipe) == {"run": OK, "stock": EQUAL} for recipe in recipes)


def ran(row: dict[str, Any], *recipes: str) -> bool:
    """Whether a row's model was quantized by these recipes and loaded again with ``lowbit.load``."""
    steps = row.get("steps", {})
    return all(steps.get(recipe, {}).get("run") == OK for recipe in recipes)
