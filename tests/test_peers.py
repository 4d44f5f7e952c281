"""Other tools beside ``lowbit``: what a driver gives back, what is kept, and what the page says of it."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.data.windows import Tokens
from tiny import save_tiny

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import peers
import peers_job
import peers_tools
from peers_page import Page
from rows import together

SCHEME = "w4a16g64-sym"
# A driver that needs no package: it rounds to nearest, and counts how often it is started.
DRIVER = """
import sys
sys.path.insert(0, {benchmarks!r})
import torch
from peers_job import job
given = job()
with open({log!r}, "a") as file:
    print(given.method, given.bits, given.group, given.symmetric, given.seed, given.steps, file=file)
model = given.float_model()
assert given.ids().shape == (2, 16)
most = 2 ** (given.bits - 1) - 1
linears = {{n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}}
given.write(model, {{n: (w / w.abs().max() * most).round() * w.abs().max() / most for n, w in linears.items()}})
"""


@dataclass(frozen=True)
class Here(peers_tools.Tool):
    """A tool whose environment is the one that runs the tests."""

    file: str = ""

    @property
    def script(self):
        return Path(self.file)

    @property
    def python(self):
        return Path(sys.executable)

    def check(self):
        return {self.package: self.version, "torch": "2"}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The driver above as the only tool, for a tiny model."""
    script = tmp_path / "driver.py"
    benchmarks = str(Path(peers_job.__file__).parent)
    script.write_text(DRIVER.format(benchmarks=benchmarks, log=str(tmp_path / "log")))
    found = Here("tool", "1.0", "none", str(script))
    monkeypatch.setattr(peers_tools, "TOOLS", {"tool": found})
    monkeypatch.setattr(peers, "TOOLS", {"tool": found})
    monkeypatch.setattr(peers, "PEERS", {"Tool RTN": peers_tools.Peer("tool", "rtn", learns=True)})
    monkeypatch.setattr(peers, "BUILD", tmp_path / "build")
    monkeypatch.setattr(peers, "ROWS", tmp_path / "build/rows")
    monkeypatch.setattr(peers, "WORK", tmp_path / "build/work")
    monkeypatch.setattr(peers, "MODEL", str(tmp_path / "m"))
    monkeypatch.setattr(peers, "lowbit", in_process)
    save_tiny(tmp_path / "m", "llama", hidden_size=64, intermediate_size=128)
    return tmp_path


def in_process(verb, *words):
    """``lowbit compare`` without a process of its own."""
    assert verb == "compare"
    options = next(at for at, word in enumerate(words) if word.startswith("--"))
    value = {words[i]: words[i + 1] for i in range(options, len(words), 2)}
    sizes = {"length": int(value["--length"]), "tokens": int(value["--tokens"])}
    found = lowbit.compare(words[0], words[1:options], data=value["--data"], **sizes)
    return json.loads(json.dumps(found.to_dict()))


def protocol_of(folder, steps=7):
    text = str(folder / "m/calib.txt")
    return peers.Protocol(text, (text,), samples=2, length=16, window=32, tokens=64, steps=steps)


def test_a_tool_quantizes_on_the_tokens_that_are_drawn_and_its_folder_is_compared(tool):
    protocol = protocol_of(tool)
    first, row = protocol.measure([(SCHEME, "Tool RTN", 3), ("w2a16g64-sym", "Tool RTN", 3)])
    assert first["texts"] != row["texts"]
    (row,) = protocol.measure([(SCHEME, "Tool RTN", 3)])
    assert row["texts"] == first["texts"]  # whatever is compared beside it
    assert (tool / "log").read_text() == "rtn 4 64 True 3 7\nrtn 2 64 True 3 7\nrtn 4 64 True 3 7\n"
    assert row["bits_per_weight"] == 4.25
    assert row["cpu_seconds"] > 0.1
    (text,) = row["texts"].values()
    assert 0 < text["runs"][0]["kl_mean"] < 1
    (tokens,) = (tool / "build/tokens").iterdir()
    assert torch.equal(load_file(tokens)["ids"], protocol.drawn(3).ids)
    assert list((tool / "build/work").iterdir()) == []


def test_what_a_tool_has_finished_survives_an_evaluation_that_fails(tool, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    protocol, cell = protocol_of(tool), (SCHEME, "Tool RTN", 0)
    monkeypatch.setattr(peers, "lowbit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        protocol.measure([cell])
    monkeypatch.setattr(peers, "lowbit", in_process)
    assert protocol.measure([cell])[0]["cpu_seconds"] > 0.1
    assert (tool / "log").read_text().count("\n") == 1


def test_rows_are_told_apart_by_what_made_them(tool, monkeypatch):
    """A tool's row depends on its steps, its driver and the evaluator, a recipe's on none of them."""
    exact = {"texts": {"a": {"perplexity": 20.0}}}
    cell, ours = (SCHEME, "Tool RTN", 0), (SCHEME, "gptq", 0)
    same = protocol_of(tool).key(cell, exact)
    assert repr(protocol_of(tool).key(cell, exact)) == repr(same)
    assert repr(protocol_of(tool, steps=8).key(cell, exact)) != repr(same)
    assert repr(protocol_of(tool).key(cell, {"texts": {"a": {"perplexity": 20.1}}})) != repr(same)
    assert repr(protocol_of(tool).key(ours, exact)) == repr(protocol_of(tool, steps=8).key(ours, {"texts": {}}))
    assert protocol_of(tool).key(ours, exact)[1] is None
    (tool / "driver.py").write_text("")
    assert repr(protocol_of(tool).key(cell, exact)) != repr(same)


def test_a_driver_that_fails_shows_the_end_of_its_output(tool):
    (tool / "driver.py").write_text("print('loading')\nraise SystemExit('no such method')")
    with pytest.raises(SystemExit, match=r"(?s)ended with 1:.*loading.*no such method"):
        protocol_of(tool).measure([(SCHEME, "Tool RTN", 0)])


def test_a_missing_environment_is_one_line():
    with pytest.raises(SystemExit, match=r"no environment for none 9\.9: add --make-environment"):
        peers_tools.Tool("none", "9.9", "none").check()


def test_an_environment_has_the_torch_that_lowbit_runs_on(tmp_path, monkeypatch):
    """torch comes first and is pinned again beside the package; what is installed stays, another torch is refused."""
    asked, found = [], [None]
    tool = peers_tools.Tool("tool", "1.0", "none")
    monkeypatch.setattr(peers_tools, "BUILD", tmp_path)
    monkeypatch.setattr(peers_tools.venv, "create", lambda folder, **how: asked.append(folder))
    monkeypatch.setattr(peers_tools.Tool, "_pip", lambda self, packages: asked.append(packages))
    monkeypatch.setattr(peers_tools.Tool, "_versions", lambda self: found[0])
    tool.make_environment()
    pinned = f"torch=={torch.__version__.partition('+')[0]}"
    assert asked == [tmp_path / "tool-1.0", [pinned], [pinned, "tool==1.0"]]
    found[0] = {"tool": "1.0", "torch": torch.__version__}
    tool.make_environment()
    assert len(asked) == 3
    assert tool.check() == found[0]
    found[0] = {"tool": "1.0", "torch": "1.0.0"}
    with pytest.raises(SystemExit, match=r"has torch 1\.0\.0, lowbit runs on"):
        tool.check()


@pytest.mark.parametrize("name", ["peers_job", "peers_autoround", "peers_llmcompressor"])
def test_what_runs_in_a_tools_environment_does_not_import_lowbit(name):
    tree = ast.parse((Path(peers_job.__file__).parent / f"{name}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {"lowbit", "rows"} & {module.partition(".")[0] for module in modules}
    assert all((Path(peers_job.__file__).parent / tool.script.name).exists() for tool in peers_tools.TOOLS.values())


def test_codes_are_recovered_from_a_weight_in_bfloat16():
    codes = torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(0))
    scale, zero = torch.rand(8, 2) + 0.01, torch.randint(0, 16, (8, 2)).float()
    exact = ((codes.view(8, 2, 64) - zero[..., None]) * scale[..., None]).view(8, 128)
    stored = exact.bfloat16()
    assert not torch.equal(stored.float(), exact)
    assert torch.equal(peers_job.values_of_codes(stored, scale, zero, 4, 64), exact)
    with pytest.raises(SystemExit, match="not a multiple"):
        peers_job.values_of_codes(exact + scale.mean() / 2, scale, zero, 4, 64)
    with pytest.raises(SystemExit, match="do not fit 4 bits"):
        peers_job.values_of_codes(stored, scale, zero - 1, 4, 64)


def test_a_result_has_the_float_models_parameters_and_no_others(tmp_path):
    save_tiny(tmp_path, "llama")
    given = peers_job.Job("rtn", str(tmp_path), "", str(tmp_path), 4, 64, True, 0, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters()]
    model.extra = torch.nn.Parameter(torch.ones(1))
    module = "model.layers.0.mlp.up_proj"
    value = torch.ones_like(model.get_submodule(module).weight)
    given.write(model, {module: value.bfloat16()})
    written = load_file(tmp_path / "model.safetensors")
    assert sorted(written) == sorted(names)
    assert torch.equal(written[f"{module}.weight"], value)
    assert torch.equal(written["model.norm.weight"], dict(model.named_parameters())["model.norm.weight"])
    with pytest.raises(SystemExit, match=r"no no\.such\.weight"):
        given.write(model, {"no.such": value})


def _row(perplexity, kl, seconds):
    run = {"perplexity": perplexity, "kl_mean": kl, "ratio": perplexity / 20}
    versions = {"torch": "2.13.0", "tool": "1"}
    figures = {"cpu_seconds": seconds, "bits_per_weight": 4.25, "versions": versions}
    return {**figures, "texts": {"a.txt": {"tokens": 64, "perplexity": 20.0, "runs": [run]}}}


def _page(rows):
    exact = {"texts": {"a.txt": {"tokens": 64, "perplexity": 20.0}}, "protocol": {"length": 32}}
    drawn = [Tokens(torch.full((2, 16), seed), "b.txt", seed=seed) for seed in range(2)]
    return Page(drawn, 7, exact, rows, (SCHEME, "w2a16g64-asym"), ("AutoRound",), ("gptq", "rounding"))


def test_the_page_has_means_over_seeds_and_says_which_are_missing():
    rows = {(SCHEME, "AutoRound", 0): _row(30.0, 0.5, 90.0), (SCHEME, "AutoRound", 1): _row(32.0, 0.7, 110.0)}
    text = _page({**rows, (SCHEME, "gptq", 1): _row(25.0, 0.25, 30.0)}).text()
    assert "| float | 32 | 20.000 | 0.0000 | 1.000 | - |" in text
    assert "| AutoRound | 4.250 | 31.000 ± 1.414 | 0.6000 ± 0.1414 | 1.550 ± 0.071 | 100 |" in text
    assert "| `gptq` (1 of 2 seeds) | 4.250 | 25.000 | 0.2500 | 1.250 | 30 |" in text
    assert "2 x 16 tokens of b.txt" in text
    assert "w2a16g64-asym" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_tool_is_ahead_where_no_recipe_of_its_time_is_better():
    """The better recipe takes more time and does not count; the other is ahead in perplexity alone."""
    theirs, ours = (SCHEME, "AutoRound", 0), (SCHEME, "gptq", 0)
    rows = {theirs: _row(30.0, 0.5, 100.0), ours: _row(29.0, 0.6, 100.0), (SCHEME, "rounding", 0): _row(25, 0.2, 101)}
    (line,) = _page(rows).ahead(SCHEME)
    told = "is ahead in KL on a.txt (0.5000, `gptq` 0.6000), beside `gptq`, which takes no more CPU time."
    assert line == f"* **AutoRound** {told}"
    (line,) = _page({**rows, ours: _row(29.0, 0.4, 100.0)}).ahead(SCHEME)
    assert "is behind in every figure" in line
    (line,) = _page({**rows, ours: _row(29.0, 0.4, 102.0)}).ahead(SCHEME)
    assert line == "* **AutoRound**: no recipe takes as little CPU time."


def test_an_interrupted_table_goes_on(tool, monkeypatch):
    """All entries of a seed come before the next seed; the second command measures what the first left out."""
    asked, page = [], tool / "peers.md"
    page.write_text(f"before\n{peers.BEGIN}old\n{peers.END}\nafter\n")

    def measure(self, cells):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.extend(cells)
        return [_row(20.0 + len(asked) + at, 0.1, 10.0) for at in range(len(cells))]

    monkeypatch.setattr(peers.Protocol, "measure", measure)
    monkeypatch.setattr(peers.Protocol, "exact", lambda self, fresh: _page({}).exact)
    monkeypatch.setattr(peers, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(peers, "ENTRIES", ("Tool RTN", "awq+gptq"))
    monkeypatch.setattr(peers, "together", lambda cells: together(cells, 3))
    text = str(tool / "m/calib.txt")
    where = ["--calibration", text, "--samples", "2", "--length", "16", "--scheme", SCHEME, "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *where, "--page", str(page)])
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    assert asked == [(SCHEME, "Tool RTN", 0), (SCHEME, "awq+gptq", 0), (SCHEME, "Tool RTN", 1)]
    assert "`awq+gptq` (1 of 2 seeds)" in page.read_text()
    asked[:] = []
    peers.main()
    assert asked == [(SCHEME, "awq+gptq", 1)]
    text = page.read_text()
    assert "seeds)" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old\n" not in text
    assert peers.BEGIN in peers.PAGE.read_text()
