"""Peak memory against depth: a run holds embeddings, one block and activations, not the model.

Makes random checkpoints of growing depth, of a Llama or of a mixture with 64 experts a layer, quantizes each in a
process of its own and prints the process's peak resident memory, as a table and as JSON. Fails if twice the layers
add 5 % or more.

With ``--ranks`` the processes of a job instead: the peak of each, beside that of a single process with as many
windows as it has. That is what a process may hold: embeddings, one block, and its share of the hidden states. Fails
if one takes 10 % more.

    python benchmarks/memory.py [--model llama|mixture] [--layers 8 16 32] [--json FILE]
    python benchmarks/memory.py --ranks 2 [--samples 64] [--length 512] [--recipe gptq]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# An expert's matrix takes 256 KiB. Below the threshold it would come from the heap, whose freed blocks stay with the
# process wherever a longer-lived one lies above them: the peak would grow with what a run keeps of each layer.
QUIET = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}
WORK = """
import json, sys
from lowbit.pipeline.peak_memory import peak_memory_bytes
import lowbit
before = peak_memory_bytes()
folder, out, recipe, scheme = sys.argv[1:]
lowbit.quantize(folder, out, scheme=scheme, recipe=recipe, data=folder + "/text.txt", samples=8, length=128)
found = lowbit.evaluate(out, data=folder + "/text.txt", length=128, tokens=1024)
print(json.dumps({"before": before, "peak": peak_memory_bytes(), "perplexity": list(found.perplexity.values())[0]}))
"""


# In each process of a job, which writes its peak into a file of its own.
WORK_OF_RANK = """
import json, os, sys
from pathlib import Path
from lowbit.pipeline.peak_memory import peak_memory_bytes
import lowbit
before = peak_memory_bytes()
folder, out, recipe, scheme, samples, length, said = sys.argv[1:]
protocol = {"data": folder + "/text.txt", "samples": int(samples), "length": int(length)}
lowbit.quantize(folder, out, scheme=scheme, recipe=recipe, **protocol)
found = {"before": before, "peak": peak_memory_bytes()}
Path(said, os.environ.get("RANK", "0") + ".json").write_text(json.dumps(found))
"""


COMMON = {"vocab_size": 1024, "tie_word_embeddings": True, "dtype": "float32"}
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "architectures": ["LlamaForCausalLM"],
}
MIXTURE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "architectures": ["Qwen3MoeForCausalLM"],
}
LAYERS = {"llama": [8, 16, 32], "mixture": [4, 8, 16]}  # with fewer the allocator's caches have not grown yet


def config_of(model: str, layers: int) -> Any:
    """The config of a model of ``layers`` layers."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    if model == "llama":
        return LlamaConfig(**COMMON, **LLAMA, num_hidden_layers=layers)
    return Qwen3MoeConfig(**COMMON, **MIXTURE, num_hidden_layers=layers)


def make_checkpoint(folder: Path, model: str, layers: int) -> int:
    """A random model of ``layers`` layers, written layer by layer; returns its bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lowbit.checkpoints.writing import write_index, write_tensors
    from lowbit.models.skeleton import Skeleton

    config = config_of(model, layers)
    config.save_pretrained(folder)
    generator, skeleton = torch.Generator().manual_seed(0), Skeleton(config)

    def random(*shape: int) -> torch.Tensor:
        return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02

    shards: dict[str, list[str]] = {}
    for i in range(layers):
        shapes = skeleton.parameter_shapes(i)
        tensors = {f"model.layers.{i}.{name}": random(*shape) for name, shape in shapes.items()}
        write_tensors(folder / f"layer-{i}.safetensors", tensors)
        shards[f"layer-{i}.safetensors"] = list(tensors)
    width = config.hidden_size
    rest = {"model.embed_tokens.weight": random(1024, width), "model.norm.weight": random(width)}
    write_tensors(folder / "rest.safetensors", rest)
    shards["rest.safetensors"] = list(rest)
    write_index(folder, shards)
    vocab = {f"w{i}": i for i in range(1024)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    ids = torch.randint(0, 1024, (4096,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(model: str, layers: int, recipe: str, scheme: str) -> dict[str, Any]:
    """Peak memory of one run in its own process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        size = make_checkpoint(folder, model, layers)
        command = [sys.executable, "-c", WORK, str(folder), str(Path(name) / "out"), recipe, scheme]
        # Without these glibc keeps freed blocks, now more, now fewer: the peak would be its habit.
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
    return {"layers": layers, "model_bytes": size, "import_bytes": found["before"], "peak_bytes": found["peak"]}


def measure_ranks(folder: Path, ranks: int, options: argparse.Namespace, samples: int) -> list[dict[str, int]]:
    """``before`` and ``peak`` of each process of a job with one thread each, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "work.py").write_text(WORK_OF_RANK)
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        sizes = [str(samples), str(options.length), name]
        command = [*launcher, str(place / "work.py"), str(folder), str(place / "out"), options.recipe, options.scheme]
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *sizes], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        return [json.loads((place / f"{rank}.json").read_text()) for rank in range(ranks)]


def compare_ranks(options: argparse.Namespace) -> None:
    """Print the table of ``--ranks``; fails where a process takes more than its share."""
    from lowbit.distributed.world import World, within
    from lowbit.models.shard import owned_sequences

    with within(World(0, options.ranks)):
        shares = [len(own) for own in owned_sequences(options.samples, 4)]
    layers = (options.layers or LAYERS[options.model])[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, options.model, layers)
        whole = measure_ranks(folder, 1, options, options.samples)[0]
        alone = {share: measure_ranks(folder, 1, options, share)[0] for share in sorted(set(shares))}
        ranks = measure_ranks(folder, options.ranks, options, options.samples)
    print(f"{options.model} of {layers} layers, {options.recipe} {options.scheme}, {options.length} tokens a window")
    heads = f"{'process':<12} {'windows':>8} {'after import MB':>16} {'peak MB':>8}"
    print(f"{heads} {'alone with them MB':>19} {'ratio':>6}")
    print(f"{'alone':<12} {options.samples:>8} {whole['before'] / 1e6:>16.0f} {whole['peak'] / 1e6:>8.0f}")
    rows, worst = [], 0.0
    for rank, (share, own) in enumerate(zip(shares, ranks, strict=True)):
        ratio = own["peak"] / alone[share]["peak"]
        worst = max(worst, ratio)
        rows.append({"rank": rank, "windows": share, **own, "alone": alone[share]["peak"]})
        numbers = f"{own['before'] / 1e6:>16.0f} {own['peak'] / 1e6:>8.0f} {alone[share]['peak'] / 1e6:>19.0f}"
        print(f"{f'{rank} of {options.ranks}':<12} {share:>8} {numbers} {ratio:>6.3f}")
    if options.json:
        options.json.write_text(json.dumps({"whole": whole, "ranks": rows}, indent=1) + "\n")
    if worst > 1.1:
        raise SystemExit(f"a process takes {worst:.3f} of what one alone takes with its windows; 1.1 is allowed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=LAYERS, default="llama")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--recipe", default="gptq")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", type=int, default=1, help="processes of a job")
    parser.add_argument("--samples", type=int, default=64, help="windows, with --ranks")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, with --ranks")
    options = parser.parse_args()
    if options.ranks > 1:
        compare_ranks(options)
        return
    depths = options.layers or LAYERS[options.model]
    rows = [measure(options.model, layers, options.recipe, options.scheme) for layers in depths]
    print(f"{options.model}, {options.recipe} {options.scheme}, calibration 8 x 128 tokens, float32")
    print(f"{'layers':>6} {'model MB':>9} {'after import MB':>16} {'peak MB':>8} {'growth':>7}")
    worst = 0.0
    for i, row in enumerate(rows):
        growth = row["peak_bytes"] / rows[i - 1]["peak_bytes"] - 1 if i else 0.0
        worst = max(worst, growth)
        numbers = [row[key] / 1e6 for key in ("model_bytes", "import_bytes", "peak_bytes")]
        print(f"{row['layers']:>6} {numbers[0]:>9.0f} {numbers[1]:>16.0f} {numbers[2]:>8.0f} {growth:>7.1%}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if worst >= 0.05:
        raise SystemExit(f"peak memory grew by {worst:.1%} with the depth; 5 % is allowed")


if __name__ == "__main__":
    main()
