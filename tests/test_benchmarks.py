"""What the tables measure: every row is a recipe that exists, and a wider layer computes what the layer did."""

from __future__ import annotations

import doctest
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.models.forward import run
from lowbit.pipeline.recipe import load_recipe, recipe_from_dict, with_settings
from lowbit.quant.scheme_names import parse_scheme
from tiny import block_of, tiny_model, tiny_tokenizer

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import ablate_affinequant
import ablate_qllm
import merge_error
import online_ops
import peers_page
import peers_tools
import results
import results_page
import results_protocol
import rows
import runtimes_page
import small_llama
import turns
import widths


def _module(name: str) -> Any:
    """A benchmark whose name one of the tests' own modules has, too."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", Path(rows.__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their fields' types
    spec.loader.exec_module(module)
    return module


formats = _module("formats")


def test_every_row_of_the_ablations_is_a_recipe():
    for _, cases in ablate_qllm.tables(2).values():
        for name, case in cases:
            recipe_from_dict({"steps": list(case.steps), "window": case.window}, name)
    for _, cases in ablate_affinequant.TABLES.values():
        for _, settings in cases:
            with_settings(load_recipe("affinequant"), [f"affinequant.{setting}" for setting in settings])


@pytest.mark.parametrize("module", [rows, results_protocol, results_page, peers_page, peers_tools])
def test_examples_of_tables(module):
    assert doctest.testmod(module).failed == 0


def test_every_row_of_the_results_is_a_recipe_and_says_its_scheme():
    for scheme, recipes in results.ROWS.items():
        for recipe in recipes:
            load_recipe(recipe)
        told = results_page.described(scheme)
        assert ("asymmetric" in told) == (scheme not in ("w8a16", "w4a16g64-sym", "w8a8-sym", "w4a8g64-sym"))
        assert "queries, keys and values float" in told
    assert "queries, keys and values 4 bits, asymmetric, per token and head" in results_page.described("w4a8kv4")
    ranges = "inputs 8 bits, asymmetric, 32 calibrated ranges of consecutive channels"
    assert ranges in results_page.described("w4a8-static32")
    assert "inputs 8 bits, asymmetric, one calibrated range;" in results_page.described("w4a8-static")


def test_the_results_have_a_row_of_every_system_that_the_papers_compare_with():
    measured = {recipe for recipes in results.ROWS.values() for recipe in recipes}
    assert measured >= {"smoothquant", "outlier-suppression+", "llm-int8", "zeroquant", "zeroquant-lkd", "rptq"}
    assert measured >= {"rtn", "gptq", "awq", "omniquant", "affinequant", "qllm", "qronos", "sparsegpt", "rounding"}


def _measured(perplexity, kl, exact=20.0, **more):
    """Figures on two texts: on ``b`` the ratio to the float model is four times that on ``a``, or 1 with it."""
    run = {"perplexity": perplexity, "kl_mean": kl, "ratio": perplexity / exact}
    other = {**run, "ratio": run["ratio"] * (1 if perplexity == exact else 4)}
    texts = {name: {"tokens": 64, "data_hash": "0f", "runs": [one]} for name, one in (("a", run), ("b", other))}
    spent = {"evaluation_cpu_seconds": 600.0, "wall_seconds": 1800.0}
    return {"texts": texts, "protocol": {"special": ""}, **spent, **more}


def _with_lambada(row, perplexity):
    task = {"metrics": {"perplexity": perplexity}, "documents": 5, "total": 9, "version": 1.0, "source": "package"}
    scores = {"tasks": {"lambada_openai": {**task, "data_hash": "0f"}}, "protocol": {"lm_eval": "0.4"}}
    return {**row, "lambada": scores}


def _cost(seconds):
    versions = {"torch": "2.13.0"}
    cost = {"cpu_seconds": seconds, "peak_memory_bytes": 8e8}
    return {"bits_per_weight": 4.25, "cost": cost, "versions": versions}


def test_a_scheme_of_the_results_has_its_own_table_with_float_in_the_first_row():
    """Means, deviations and ratios by hand, of two seeds; the second recipe takes three times the first one's CPU."""
    protocol = results.Protocol("builtin", (("Text", "a"),), 1024, 0)
    rows_ = {
        "float": [_measured(20.0, 0.0)],
        "rtn": [_measured(30.0, 0.5, **_cost(10.0))],
        "awq": [_measured(30.0, 0.5, **_cost(10.0)), _measured(32.0, 0.7, **_cost(10.0))],
        "gptq": [_measured(25.0, 0.25, **_cost(30.0))],
    }
    lines = results_page.table(protocol, "w4a16g64-sym", rows_, seeds=2)
    assert lines[0] == "## w4a16g64-sym"
    assert "| float | 32 | 20.000 | 0.0000 | 1.000 | 1.000 | - | - |" in lines
    assert "| rtn | 4.250 | 30.000 | 0.5000 | 3.000 | 6.000 | 1.0 | 0.80 GB |" in lines
    measured = "31.000 ± 1.414 | 0.6000 ± 0.1414"
    assert f"| awq | 4.250 | {measured} | 3.100 ± 0.141 | 6.200 ± 0.283 | 1.0 | 0.80 GB |" in lines
    assert "| gptq (1 of 2 seeds) | 4.250 | 25.000 | 0.2500 | 2.500 | 5.000 | 3.0 | 0.80 GB |" in lines


def test_the_page_of_results_has_lambada_the_time_and_only_what_was_measured():
    """Two rows of 600 CPU seconds of evaluation and half an hour each, one of which took 2400 to quantize."""
    protocol = results.Protocol("builtin", (("Text", "a"), ("Other", "b")), 1024, 5)
    exact = _with_lambada(_measured(20.0, 0.0), 60.0)
    rtn = _with_lambada(_measured(30.0, 0.5, **_cost(2400.0)), 75.25)
    told = results_page.page(protocol, exact, {"w4a4": {"rtn": [rtn]}}, seeds=3)
    assert "| float | 32 | 20.000 | 0.0000 | 20.000 | 0.0000 | 60.00 | 1.000 | 1.000 | - | - |" in told
    assert "| rtn | 4.250 | 30.000 | 0.5000 | 30.000 | 0.5000 | 75.25 | 3.000 | 6.000 | 1.0 | 0.80 GB |" in told
    assert "**Time** for this page: 1.0 CPU hours, 1.0 hours of wall time." in told
    assert "5 of 9 documents" in told
    assert "torch 2.13.0" in told
    assert told.count("## ") == 2
    assert all(len(one) <= 118 for one in told.splitlines() if not one.startswith("|"))


@pytest.mark.parametrize(("wikitext2", "held_back"), [(None, "Technical"), (Path("texts"), "Multilingual")])
def test_the_last_text_of_the_results_is_one_that_no_row_was_calibrated_on(wikitext2, held_back):
    protocol = results.protocol_of(wikitext2, Path("ptb.txt"), 1024, 0, "auto")
    assert protocol.texts[-1] == (held_back, f"builtin:{held_back.lower()}")
    first = "Wikipedia" if wikitext2 is None else "WikiText-2"
    assert [heading for heading, _ in protocol.texts][:4] == [first, "PTB", "C4", "Multilingual"]
    assert dict(protocol.texts)["PTB"] == "ptb.txt"
    assert "PTB" not in dict(results.protocol_of(wikitext2, None, 1024, 0, "auto").texts)
    assert (wikitext2 is None) == (protocol.calibration == "builtin")
    texts = {text: {"tokens": 1024 - i, "data_hash": "0f"} for i, (_, text) in enumerate(protocol.texts)}
    exact = {**_measured(20.0, 0.0), "texts": texts}
    told = "\n".join(results_page.intro(protocol, exact, {}, 3))
    assert f"no row saw text of the kind *{held_back}*" in told
    assert f"{held_back} {1025 - len(texts)}" in told


def test_interrupted_results_go_on_and_what_calibrates_nothing_is_measured_once(tmp_path, monkeypatch):
    """All recipes of a seed come first; the second command measures what the first left out."""
    asked, out = [], tmp_path / "results.md"

    def measure(self, cells):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.extend(cells)
        costs = [{} if recipe == "float" else _cost(1.0) for _, recipe, _ in cells]
        return [_measured(20.0 + len(asked), 0.1, **cost) for cost in costs]

    monkeypatch.setattr(results, "MEASURED", tmp_path)
    monkeypatch.setattr(results, "together", lambda cells: rows.together(cells, 2))
    monkeypatch.setattr(results_protocol, "MEASURED", tmp_path)
    monkeypatch.setattr(results.Protocol, "measure", measure)
    texts = (("Text", "a"), ("Other", "b"))
    monkeypatch.setattr(results, "protocol_of", lambda *given: results.Protocol("builtin", texts, 64, 0))
    monkeypatch.setattr(results, "os", SimpleNamespace(environ={}))
    command = ["results.py", "--scheme", "w8a8", "--seeds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        results.main()
    first = [("w8a8", name, 0) for name in ("rtn", "smoothquant", "outlier-suppression+")]
    assert asked == [("-", "float", 0), *first, ("w8a8", "smoothquant", 1)]
    assert "| outlier-suppression+ (1 of 2 seeds) |" in out.read_text()
    asked[:] = []
    results.main()
    assert asked == [("w8a8", "outlier-suppression+", 1)]
    assert "seeds)" not in out.read_text()
    asked[:] = []
    monkeypatch.setattr(sys, "argv", [*command, "--recipe", "llm-int8"])
    results.main()
    assert asked == []


def test_a_row_has_the_cost_of_quantizing_and_not_of_evaluating(monkeypatch):
    """Two blocks of 0.7 and 0.8 GB, and no time in processes; then an evaluation with figures of the same names."""

    def command(verb, *words):
        if verb == "compare":
            told = {"runs": [{}], "ratios": [{}], "calibrated": [{}], "peak_memory_bytes": 5e9}
            return {**_measured(9.0, 0.1), **told}
        folder = Path(words[words.index("--out") + 1])
        folder.mkdir()
        blocks = [{"seconds": 3.0, "peak_memory_bytes": 7e8}, {"seconds": 4.0, "peak_memory_bytes": 8e8}]
        (folder / "lowbit-timing.json").write_text(json.dumps({"blocks": blocks}))
        (folder / "lowbit.json").write_text(json.dumps({"versions": {}}))
        return {"bits_per_weight": 4.25, "warnings": [], "seconds": 8.0, "peak_memory_bytes": 8e8}

    monkeypatch.setattr(results_protocol, "lowbit", command)
    (row,) = results.Protocol("builtin", (("Text", "a"),), 1024, 0).measure([("w4a16g64-sym", "rtn", 0)])
    assert row["cost"] == {"cpu_seconds": 0.0, "peak_memory_bytes": 800_000_000}


def test_cpu_seconds_are_those_of_the_processes_started():
    """A process that counts for at least 0.2 CPU seconds, whatever its wall time."""
    loop = "import time\nwhile time.process_time() < 0.2: pass"
    _, seconds = rows.cpu_seconds(lambda: {"code": subprocess.run([sys.executable, "-c", loop]).returncode})
    assert 0.2 <= seconds < 5


def test_figures_are_kept_by_what_they_measured_and_by_the_sources(tmp_path, monkeypatch):
    made = []

    def measure():
        made.append(1)
        return {"figure": len(made)}

    what = rows.Row("demo", "w4a4", "rtn", 30)
    assert rows.kept(tmp_path, what, measure, fresh=False) == {"figure": 1}
    assert rows.kept(tmp_path, what, measure, fresh=False) == {"figure": 1}
    assert rows.kept(tmp_path, what, measure, fresh=True) == {"figure": 2}
    assert rows.kept(tmp_path, rows.Row("demo", "w4a4", "rtn", 30, blocks=4), measure, fresh=False) == {"figure": 3}
    monkeypatch.setattr(rows, "sources", lambda: "others")
    assert rows.found(tmp_path, what) is None
    assert rows.found(tmp_path, what, any_code=True) == {"figure": 2}
    assert rows.outdated(tmp_path, [what, "not measured"]) == "1 of 1 rows are of an earlier state of the sources."
    assert rows.kept(tmp_path, what, measure, fresh=False) == {"figure": 4}
    assert rows.outdated(tmp_path, [what]) == ""
    assert rows.missing_first(tmp_path, [what, "b", "a"], lambda cell: cell) == ["b", "a", what]


def test_figures_are_kept_without_the_folders_of_a_machine_and_texts_by_what_they_hold(tmp_path):
    texts = [tmp_path / name / "wiki.raw" for name in "ab"]
    for text in texts:
        text.parent.mkdir()
        text.write_text("one")
    assert rows.text_identity(str(texts[0])) == rows.text_identity(str(texts[1]))
    assert rows.text_identity("builtin:c4") == "builtin:c4"
    row = {"texts": {str(texts[0]): 1}, "warnings": [f"{texts[0]} parts from {texts[1]}: 3/4"]}
    clean = {"texts": {"wiki.raw": 1}, "warnings": ["wiki.raw parts from wiki.raw: 3/4"]}
    assert rows.kept(tmp_path / "kept", "x", lambda: row, fresh=False) == clean
    assert rows.found(tmp_path / "kept", "x") == clean


def test_speeds_are_measured_in_turns_and_compared_within_each_round(monkeypatch):
    """A machine that gets slower by the round leaves ratios alone: ``b`` takes twice as long as ``a``."""
    now, told = [0.0], []
    monkeypatch.setattr(turns.time, "process_time", lambda: now[0])

    def start(name, cost):
        def spend(seconds):
            now[0] += seconds * (1 + told.count(name))

        def begin():
            told.append(name)
            return lambda: spend(10 * cost), lambda _: spend(cost)

        return begin

    timed = turns.speeds({"a": start("a", 1.0), "b": start("b", 2.0)}, 512, threads=1)
    assert told == ["a", "b"] * (turns.ROUNDS + 1)
    assert timed["a"]["prefill"] == pytest.approx([512 / 10 / slow for slow in (3, 4, 5, 6, 7)])
    found = turns.medians(timed, lambda _: "b")
    assert found["a"] == pytest.approx({"prefill": 10.24, "prefill_ratio": 2, "decode": 0.2, "decode_ratio": 2})


def test_a_text_beside_the_simulations_parts_at_the_first_other_token():
    model = tiny_model("llama").eval()
    given = torch.tensor([[1, 2, 3]])
    answer = model.generate(given, max_new_tokens=turns.ANSWER, do_sample=False, eos_token_id=None)[0, 3:].tolist()

    class Tokenizer:
        def __call__(self, prompt, return_tensors):
            return type("Found", (), {"input_ids": given})

        def decode(self, ids):
            return " ".join(map(str, ids))

    found = turns.beside(model, Tokenizer(), "x", lambda ids, tokens: answer[:tokens] if ids == [1, 2, 3] else [])
    assert (found["same"], found["gap"]) == (turns.ANSWER, None)
    other = (answer[4] + 1) % model.config.vocab_size
    found = turns.beside(model, Tokenizer(), "x", lambda ids, tokens: [*answer[:4], other, *answer[5:tokens]])
    scores = model(torch.tensor([[1, 2, 3, *answer[:4]]])).logits[0, -1].detach()
    assert found["same"] == 4
    assert found["gap"] == pytest.approx(float((scores[answer[4]] - scores[other]) / scores.std()))


def test_the_page_says_what_is_better_and_worse_at_equal_size():
    sizes = {"float F32": (540, 36.0), "lowbit Q5_0": (105, 37.5), "llama.cpp Q5_0": (105, 38.0)}
    sizes |= {"llama.cpp Q4_K_M, imatrix": (105.5, 37.0), "llama.cpp Q4_0": (92, 39.0)}
    made = [{"file": name, "bytes": mb * 1e6, "perplexity": value} for name, (mb, value) in sizes.items()]
    lines = runtimes_page.equal_size(made)
    assert "* **lowbit Q5_0**, 105.0 MB, perplexity 37.500." in lines
    assert "  Better than it: llama.cpp Q4_K_M with imatrix (37.000, -1.3%)." in lines
    assert "  Worse than it: llama.cpp Q5_0 (38.000, +1.3%)." in lines


def test_the_page_on_onnx_compares_graphs_of_one_level():
    speeds = {"prefill": 1, "prefill_ratio": 1, "decode": 1, "decode_ratio": 1}
    values = {"float": 9.0, "lowbit, level 0": 10.0, "onnxruntime, level 0": 12.5}
    made = [{"file": name, "bytes": 1e8, "perplexity": value, **speeds} for name, value in values.items()]
    lines = runtimes_page.graphs(made, {"lowbit, level 0": 10.001})
    assert "| lowbit, level 0 | 100.0 | 10.000 | 10.001 | 1 | 1.00 | 1 | 1.00 |" in lines
    assert "* lowbit, level 0: -20.0% in perplexity against theirs, at equal size." in lines


@pytest.mark.parametrize("kind", ["norm", "channels"])
def test_a_wider_layer_computes_what_the_layer_did(kind):
    block, x = block_of(tiny_model("llama"), 1, dtype=torch.float64)
    for edge in (edge for edge in block.edges() if edge.kind == kind):
        weight = torch.cat([dst.read(block.params) for dst in edge.readers])
        copies = torch.ones(weight.shape[1], dtype=torch.long)
        copies[[3, 20]] = torch.tensor([2, 3])
        done = widths.wider(block, edge, weight, copies)
        assert done.weight(edge.readers[0].module).shape[1] == weight.shape[1] + 3
        error = (run(done, x) - run(block, x)).abs().max() / run(block, x).abs().max()
        assert error < 1e-7  # 1/3 is stored in float32


def test_the_merge_error_of_random_linears_falls_with_the_precision():
    found = merge_error.merge_error(64, 0)
    errors = found.errors
    assert found.condition > 64
    assert errors["float64"] < 1e-20 < 1e-16 < errors["float32 linears, float64 map"] < errors["float32"] < 1e-4
    lines = merge_error.table(16, 2)
    assert len(lines) == 5
    assert all(line.count("|") == 4 for line in lines)


def test_the_page_of_native_formats_has_a_row_for_each_with_means_over_seeds():
    def of(*values):
        names = ("llama.cpp", "simulation", "simulation, inputs at 8 bits")
        return [dict(zip(names, (value, value + 1, value + 2), strict=True)) for value in values]

    formats = {"q4_k": {"ours": of(10.0, 12.0), "imatrix": of(13.0), "plain": {"llama.cpp": 15.0}}}
    model = {"float": {"perplexity": 9.0}, "source": {"distance": 1e-6}, "formats": formats}
    told = dict.fromkeys(("recipe", "calibration", "evaluation", "runtime"), "x")
    page = runtimes_page.native({**told, "models": {"Tiny": model}})
    assert "| `q4_k` | 11.000 ± 1.414 | 13.000 | 15.000 | 12.000 ± 1.414 | 13.000 ± 1.414 |" in page
    assert "KL" not in page
    formats["q4_k"]["ours"] = [{**one, "KL": 0.25} for one in of(10.0, 12.0)]
    formats["q4_k"] |= {"imatrix": [{"llama.cpp": 13.0, "KL": 0.5}], "plain": {"llama.cpp": 15.0, "KL": 1.0}}
    assert "| `q4_k` | 0.250000 ± 0.000000 | 0.500000 | 1.000000 |" in runtimes_page.native(
        {**told, "models": {"Tiny": model}}
    )
    assert "Perplexity of the float model: 9.000." in page
    assert "differ from\nthose of the model that lowbit reads from the file by 1.0e-06 of their spread." in page


def test_the_learning_rate_rises_over_25_steps_and_ends_at_zero():
    values = [small_llama.rate(step, 500) for step in (0, 24, 500)]
    assert values == pytest.approx([0.00012, 0.003, 0.0], abs=1e-12)


def test_the_small_llama_has_rows_of_256_and_is_trained_once(tmp_path, monkeypatch):
    """Three steps; every linear's width is a multiple of 256, and a second call reads the folder."""
    monkeypatch.setattr(small_llama, "smaller_tokenizer", lambda tokenizer: tiny_tokenizer(merge=True))
    monkeypatch.setattr(small_llama, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(small_llama, "resolve", lambda name: SimpleNamespace(folder=None))

    def windows(data, tokenizer, n, length, seed):
        return SimpleNamespace(ids=torch.randint(3, 90, (n, 16), generator=torch.Generator().manual_seed(seed)))

    monkeypatch.setattr(small_llama, "calibration", windows)
    folder = small_llama.small_llama(tmp_path / "model", steps=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    widths_ = {m.in_features for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    assert widths_ == {256, 768}
    monkeypatch.setattr(small_llama, "calibration", None)
    assert small_llama.small_llama(folder) == folder


def test_every_cell_of_the_formats_is_a_scheme_that_fits_and_a_recipe_with_its_settings():
    for scheme in formats.SCHEMES:
        found = parse_scheme(scheme)
        for width in (576, 1536):
            found.weight.groups(width)
            if found.act is not None:
                found.act.check_width(width)
    for recipe, settings in formats.RECIPES.values():
        with_settings(load_recipe(recipe), settings)


def test_the_table_of_formats_has_the_measured_rows_and_leaves_the_rest_of_the_page():
    protocol = formats.Protocol("texts/wiki.valid.raw", "builtin")
    row = {"bits_per_weight": 4.5, "bytes": 1.5e8, "perplexity": 31.237}
    cells = {("", "float"): {"perplexity": 20.0}, ("nvfp4", "rtn"): row}
    told = formats.table(protocol, cells | {("nvfp4", "gptq"): row | {"perplexity": 29.0}})
    assert "| `nvfp4` | 4.500 | 150 | 31.24 | | 29.00 | | |\n" in told
    assert "mxfp4" not in told
    assert "`wiki.valid.raw`, seed 0" in told
    assert "the built-in text\nin windows of 512; the float model has 20.00." in told
    page = f"before\n{formats.BEGIN}old\n{formats.END}\nafter\n"
    where = (formats.BEGIN, formats.END, formats.PAGE)
    put = rows.put(page, told, *where)
    assert put == f"before\n{formats.BEGIN}{told}{formats.END}\nafter\n"
    assert rows.put(put, told, *where) == put
    with pytest.raises(SystemExit, match="are gone"):
        rows.put("before\n", told, *where)
    assert formats.BEGIN in formats.PAGE.read_text()


def test_an_interrupted_table_of_formats_goes_on(tmp_path, monkeypatch):
    """The second command measures what the first left out, and nothing twice."""
    page, asked = tmp_path / "formats.md", []
    page.write_text(formats.BEGIN + formats.END)

    def measure(self, scheme, recipe):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((scheme, recipe))
        return {"perplexity": 20.0 + len(asked), "bits_per_weight": 4.25, "bytes": 1e8}

    monkeypatch.setattr(formats, "PAGE", page)
    monkeypatch.setattr(formats, "MEASURED", tmp_path / "kept")
    monkeypatch.setattr(formats.Protocol, "measure", measure)
    command = ["formats.py", "--only", "mxfp4", "--only", "fp8", "--recipe", "rtn", "--recipe", "gptq"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        formats.main()
    assert asked == [("", "float"), ("mxfp4", "rtn"), ("fp8", "rtn")]
    assert "| `fp8` | 4.250 | 100 | 23.00 | | | | |" in page.read_text()
    asked[:] = []
    formats.main()
    assert asked == [("mxfp4", "gptq"), ("fp8", "gptq")]
    assert "| `mxfp4` | 4.250 | 100 | 22.00 | | 21.00 | | |" in page.read_text()
    asked[:] = []
    monkeypatch.setattr(sys, "argv", command[:3])
    formats.main()  # of mxfp4 the recipes that are missing
    assert asked == [("mxfp4", "rtn+search"), ("mxfp4", "awq+gptq"), ("mxfp4", "affinequant+gptq")]
    assert "| `fp8` | 4.250 | 100 | 23.00 | | 22.00 | | |" in page.read_text()


@pytest.mark.parametrize("kind", online_ops.KINDS)
def test_online_ops_stand_at_every_input_and_are_taken_away_again(kind):
    model, ids = tiny_model("llama"), torch.arange(3, 11)[None]
    widths = [width for _, _, width in online_ops.places(model)]
    assert widths == 3 * [64, 64, 64, 96]  # two norms, o_proj, down_proj
    with torch.no_grad():
        plain = model(ids).logits
        with online_ops.with_ops(model, kind):
            assert not torch.allclose(model(ids).logits, plain, atol=1e-2)
        assert torch.equal(model(ids).logits, plain)


def test_the_table_of_online_ops_has_shares_of_a_pass():
    model = tiny_model("llama")
    lines = online_ops.table({"kronecker": {"prefill": [1.2, 1.25, 1.3], "decode": [2.0]}}, model)
    linears = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    macs = 3 * (3 * 64 * (8 + 8) + 96 * (8 + 12)) / linears
    assert lines[-1] == f"| `kronecker` | {100 * macs:.1f} % | 20.0 % | 50.0 % |"
