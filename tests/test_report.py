"""The report: what the page says of one run and of several, and one line for what cannot be reported."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import lowbit
from lowbit.cli.main import call
from lowbit.reports.charts import Series, bars, lines
from lowbit.reports.pixels import signed
from tiny import save_tiny

RECIPES = {
    "rtn": [],
    "affinequant": ["affinequant.epochs=2"],
    "qllm-fold": ["lowrank.epochs=2", "reassemble.tries=2"],
}
SCHEME = "w4a4"


class Page(HTMLParser):
    """Counts of tags and classes, texts, and every address that the page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skip = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skip = tag == "style"

    def handle_data(self, data):
        self.text += "" if self._skip else data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        found = [attributes for name, attributes in self.tags if name == tag]
        return [a for a in found if not kind or kind in (a.get("class") or "").split()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model, three runs of it, and what was measured on them."""
    root = tmp_path_factory.mktemp("report")
    save_tiny(root / "m", "llama")
    text = str(root / "m/calib.txt")
    for recipe, settings in RECIPES.items():
        lowbit.quantize(
            str(root / "m"),
            root / recipe,
            scheme=SCHEME,
            recipe=recipe,
            data=text,
            samples=4,
            length=16,
            settings=settings,
        )
        assert call(["evaluate", str(root / recipe), "--data", text, "--length", "16", "--tokens", "64"]) == 0
    return root


def printed(capsys, *words: object) -> str:
    capsys.readouterr()
    assert call([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def measured(root, tmp_path, capsys):
    """Files with what evaluate printed of the float model, and compare of two runs."""
    sizes = ("--data", root / "m/calib.txt", "--length", "16", "--tokens", "64", "--json")
    (tmp_path / "float.json").write_text(printed(capsys, "evaluate", root / "m", *sizes))
    runs = (root / "rtn", root / "affinequant")
    (tmp_path / "compare.json").write_text(printed(capsys, "compare", root / "m", *runs, *sizes))
    return tmp_path


def page_of(tmp_path: Path, *folders: Path, measured: tuple[Path, ...] = ()) -> Page:
    made = lowbit.report(folders, out=tmp_path / "report.html", measured=measured)
    assert made.size_bytes == made.out.stat().st_size
    return Page(made.out.read_text())


def test_one_run_shows_its_charts(root, tmp_path):
    page = page_of(tmp_path, root / "affinequant")
    charts = {chart["aria-label"].partition(";")[0] for chart in page.all("svg", "chart")}
    for wanted in (
        "relative error by block",
        "Seconds for each block, by run",
        "affinequant: loss of each block on the validation split",
        "affinequant: loss of each block in training",
        "condition number of each learned map by block",
        "error of each linear of affinequant alone",
        "dominance margin of each learned map by block",
        "sign flips at each site by block",
        "mlp: gate_proj, up_proj: largest channel over the median one, by block",
    ):
        assert wanted in charts
    pictures = page.all("img")
    assert sum("learned matrix" in image["alt"] for image in pictures) == 3
    assert sum("channels of" in image["alt"] for image in pictures) == 2 * 4
    assert all(image["src"].startswith("data:image/png;base64,") for image in pictures)
    manifest = json.loads((root / "affinequant/lowbit.json").read_text())
    for said in (manifest["identity"]["data"]["hash"], manifest["files"]["config.json"], "affinequant → rtn", SCHEME):
        assert said in page.text
    assert "--set=affinequant.epochs=2" in page.text


def test_several_runs_stand_side_by_side(root, measured, tmp_path):
    page = page_of(
        tmp_path, *(root / r for r in RECIPES), measured=(measured / "float.json", measured / "compare.json")
    )
    error = next(c for c in page.all("svg", "chart") if c["aria-label"].startswith("relative error by block"))
    for recipe in RECIPES:
        assert f"{recipe}: " in error["aria-label"]
    assert "qllm-fold" in page.text
    for section in ("quality", "where", "losses", "outliers", "matrices", "reassembly", "warnings", "repeat"):
        assert any(a.get("id") == section for a in page.all("section"))
    found = re.sub(r"\s+", " ", page.text)
    exact = json.loads((measured / "float.json").read_text())["perplexity"][str(root / "m/calib.txt")]
    assert "perplexitytokens 64, length 16, bos auto, hash" in found
    assert f"{exact:.4g}" in found
    assert "KL mean, nats" in found
    assert "float: m" in found


def test_a_float_model_stands_in_the_row_of_its_protocol_only(root, measured, tmp_path, capsys):
    sizes = ("--data", root / "m/calib.txt", "--length", "32", "--tokens", "64", "--json")
    (tmp_path / "other.json").write_text(printed(capsys, "evaluate", root / "m", *sizes))
    page = page_of(tmp_path, root / "rtn", measured=(tmp_path / "other.json",))
    assert sum(span.get("title") == "not measured" for span in page.all("span")) == 2


def test_the_page_asks_for_nothing_and_runs_nothing(root, tmp_path):
    page = page_of(tmp_path, *(root / recipe for recipe in RECIPES))
    assert not page.all("script") + page.all("link") + page.all("iframe")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png")), (tag, attributes)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_the_same_runs_give_the_same_page(root, tmp_path):
    pages = [lowbit.report([root / "affinequant"], out=tmp_path / name).out.read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A window of Chromium is 500 pixels wide at least, a frame in it as narrow as a phone. The script stands around the
# page, since the page lets none run in it.
FRAME = """<title></title><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const view = frames[0], page = view.document, box = node => node.getBoundingClientRect();
  const charts = [...page.querySelectorAll("svg.chart")].filter(c => !c.closest("details:not([open])"));
  document.title = JSON.stringify({{
    width: view.innerWidth, needed: page.documentElement.scrollWidth, charts: charts.length,
    drawn: charts.filter(c => box(c).width > 200 && box(c).height > 100 && box(c).right <= view.innerWidth).length,
    pictures: [...page.images].filter(i => i.complete && i.naturalWidth > 0).length,
    text: Math.min(...charts.map(c => box(c.querySelector("text")).height)),
    background: view.getComputedStyle(page.body).backgroundColor}});
}});
</script>"""


def laid_out(page: Path, width: int, dark: bool) -> dict:
    """How Chromium lays a page out at a width."""
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text())))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1400,1000"]
    options += [f"--user-data-dir={page.parent / 'profile'}", frame.as_uri()]
    done = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=300)
    title = re.search(r"<title>(.+?)</title>", done.stdout, re.S)
    assert title, done.stderr[-500:]
    return json.loads(html.unescape(title[1]))


@pytest.mark.heavy
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_chromium_draws_the_charts_and_nothing_overflows(root, measured, tmp_path):
    files = (measured / "float.json", measured / "compare.json")
    page = lowbit.report([root / recipe for recipe in RECIPES], out=tmp_path / "three.html", measured=files).out
    backgrounds = set()
    for width in (1280, 390):
        for dark in (False, True):
            found = laid_out(page, width, dark)
            assert found["width"] == width
            assert found["needed"] <= width
            assert found["charts"] == found["drawn"] > 12
            assert found["pictures"] > 3
            assert found["text"] > 9  # pixels: still to be read on a phone
            backgrounds.add(found["background"])
    assert len(backgrounds) == 2


HOSTILE = '</script><img src=x onerror="alert(1)">&{{7*7}}'


def test_what_a_manifest_says_is_text(root, tmp_path):
    shutil.copytree(root / "affinequant", tmp_path / "run")
    manifest = json.loads((tmp_path / "run/lowbit.json").read_text())
    identity = manifest["identity"]
    identity |= {"model": HOSTILE, "recipe_name": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    identity["data"]["corpus"] = HOSTILE
    manifest["blocks"][0]["notes"] = [HOSTILE]
    manifest["blocks"][0]["steps"][HOSTILE] = manifest["blocks"][0]["steps"]["affinequant"]
    (tmp_path / "run/lowbit.json").write_text(json.dumps(manifest))
    page = page_of(tmp_path, tmp_path / "run")
    assert page.text.count(HOSTILE) >= 6
    assert all("alert" not in (image.get("onerror") or "") for image in page.all("img"))


def test_where_it_can_run_is_what_the_exports_say(root, tmp_path):
    from lowbit.exporters import EXPORTERS

    page = page_of(tmp_path, root / "rtn")
    for name in EXPORTERS:
        assert name in page.text
    assert "inputs are quantized to a4-asym" in page.text


def line(capsys, *words: object) -> str:
    capsys.readouterr()
    assert call([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    return told.err


def test_mistakes_are_one_line(root, measured, tmp_path, capsys):
    out = tmp_path / "page.html"
    (tmp_path / "no.json").write_text('{"perplexity": 3}')
    stranger = json.loads((measured / "float.json").read_text()) | {"fingerprint": "0" * 64}
    (tmp_path / "stranger.json").write_text(json.dumps(stranger))
    cases = [
        ([], ["Missing argument", "DIR"]),
        ([root / "m"], ["is not a run folder", "lowbit quantize"]),
        ([tmp_path / "nowhere"], ["nowhere", "is not a run folder"]),
        ([root / "rtn", root / "rtn"], ["given twice"]),
        ([root / "rtn", "-o", tmp_path], ["is a folder", "report.html"]),
        ([root / "rtn", "-o", tmp_path / "no/page.html"], ["cannot write", "page.html"]),
        ([root / "rtn", "-o", root / "rtn/lowbit.json"], ["is in the run folder", "report.html"]),
        ([root / "rtn", "--measured", tmp_path / "none.json"], ["cannot read", "none.json"]),
        ([root / "rtn", "--measured", tmp_path / "no.json"], ["no.json", "lowbit evaluate --json"]),
        ([root / "rtn", "--measured", tmp_path / "stranger.json"], ["stranger.json", "other models"]),
    ]
    for words, said in cases:
        told = line(capsys, "report", *words, *([] if "-o" in words else ["-o", out]))
        for part in said:
            assert part in told
    assert not out.exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"blocks": None},
        {"blocks": [{"block": 0}]},
        {"blocks": [3]},
        {"blocks": [{"block": 0, "seconds": "1", "peak_memory_bytes": 2}]},
    ],
)
def test_a_broken_timing_file_is_one_line_and_without_it_the_page_is_written(content, root, tmp_path, capsys):
    shutil.copytree(root / "rtn", tmp_path / "run")
    file = tmp_path / "run/lowbit-timing.json"
    file.write_text(json.dumps(content))
    told = line(capsys, "report", tmp_path / "run", "-o", tmp_path / "page.html")
    assert f"{file} is broken: delete it" in told
    file.unlink()
    assert "The timing file is missing" in page_of(tmp_path, tmp_path / "run").text


@pytest.mark.parametrize("place", ["identity.seed", "identity.data.hash", "layouts", "blocks.notes"])
def test_a_manifest_that_lacks_something_is_one_line(place, root, tmp_path, capsys):
    shutil.copytree(root / "rtn", tmp_path / "run")
    manifest = json.loads((tmp_path / "run/lowbit.json").read_text())
    *way, last = place.split(".")
    part = manifest
    for key in way:
        part = part[key] if key != "blocks" else part[key][1]
    del part[last]
    (tmp_path / "run/lowbit.json").write_text(json.dumps(manifest))
    said = line(capsys, "report", tmp_path / "run", "-o", tmp_path / "page.html")
    assert f"no valid '{place.replace('blocks', 'blocks.1')}'" in said


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("identity.recipe.steps", [{}]),
        ("identity.recipe", {}),
        ("identity.scheme.target", 3),
        ("blocks", []),
        ("bits_per_weight", 10**400),
    ],
)
def test_a_manifest_with_a_part_that_nothing_can_read_is_one_line(place, value, root, tmp_path, capsys):
    shutil.copytree(root / "rtn", tmp_path / "run")
    manifest = json.loads((tmp_path / "run/lowbit.json").read_text())
    *way, last = place.split(".")
    part = manifest
    for key in way:
        part = part[key]
    part[last] = value
    (tmp_path / "run/lowbit.json").write_text(json.dumps(manifest))
    assert "no valid '" in line(capsys, "report", tmp_path / "run", "-o", tmp_path / "page.html")


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj", "model.norm", "model.layers.0.mlp.none"])
def test_a_module_that_the_model_does_not_have_is_one_line(name, root, tmp_path, capsys):
    shutil.copytree(root / "rtn", tmp_path / "run")
    manifest = json.loads((tmp_path / "run/lowbit.json").read_text())
    manifest["quantized"].append(name)
    (tmp_path / "run/lowbit.json").write_text(json.dumps(manifest))
    assert f"lists '{name}' as quantized" in line(capsys, "inspect", tmp_path / "run")


def test_what_cannot_be_drawn_is_left_out():
    nan, inf = float("nan"), float("inf")
    assert lines("none", [Series("a", [(0, nan), (1, inf)])], "x", "y") is None
    assert lines("none", [Series("a", [(0, 0.0)])], "x", "y", log=True) is None
    assert bars("none", [], "x", "y") is None
    assert "nan" not in str(lines("some", [Series("a", [(0, nan), (1, 2.0)])], "x", "y"))


def test_a_picture_has_the_colours_of_its_signs():
    import base64
    import struct
    import zlib

    content = base64.b64decode(signed(np.array([[1.0, 0.0], [-0.5, 0.25]])).partition(",")[2])
    assert struct.unpack(">II", content[16:24]) == (2, 2)
    at = content.index(b"IDAT")
    (size,) = struct.unpack(">I", content[at - 4 : at])
    rows = zlib.decompress(content[at + 4 : at + 4 + size])
    pixels = [tuple(rows[9 * y + 1 + 4 * x :][:4]) for y in range(2) for x in range(2)]
    assert pixels[0][3] == 255
    assert pixels[1][3] == 0
    assert pixels[0][0] > pixels[0][2]
    assert pixels[2][0] < pixels[2][2]
    assert pixels[2][3] == round(255 * 0.5**0.4)
