"""What loads where: the one table that tests run, row by row, and that the pages show.

Its claims cannot go untested: ``test_formats_run.py`` runs every scheme in stock ``transformers``,
``exporters/test_loads.py`` writes and reads back every export named here and sees every other one refused, and the
pages have to hold what ``render`` makes of it. ``python tests/loads.py`` writes the pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO = "-"
FOLDER = "folder"  # the target reads the run folder itself: there is nothing to export
# The dtype in which stock transformers gives the simulated logits; the GGUF type; which other exports there are.
TABLE = """
scheme           transformers gguf   executorch onnx gptq awq vllm gemma
w4a16-sym        float32      Q4_0   yes        yes  yes  yes yes  yes
w4a16g32-sym     float32      Q4_0   yes        yes  yes  yes yes  -
w4a16g32-asym    float32      Q5_0   -          yes  yes  yes yes  -
w3a16g32-sym     float32      Q4_0   yes        yes  yes  -   yes  -
w2a16-asym       float32      Q2_K   yes        yes  yes  -   -    -
w8a16-sym        float32      Q8_0   yes        yes  yes  -   yes  yes
w4a8-sym         float32      -      -          -    -    -   yes  -
w4a8g32-sym-asym float32      -      yes        -    -    -   -    -
w4a4g32-sym-asym float32      -      -          -    -    -   -    -
w8a8             float32      -      -          -    -    -   -    -
w8a8-static      float32      -      -          yes  -    -   -    -
w4a8-sym-static  float32      -      -          yes  -    -   -    yes
w8a8-sym-static  float32      -      -          yes  -    -   -    yes
w4a8g32-sym-static float32    -      -          yes  -    -   -    -
w4a16-static     float32      -      -          yes  -    -   -    -
w4a16g32-static  float32      -      -          yes  -    -   -    -
w8a8-static16    -            -      -          -    -    -   -    -
w4afp8           float32      -      -          -    -    -   -    -
w4afp8g32        float32      -      -          -    -    -   -    -
w4afp8g128       float32      -      -          -    -    -   folder -
w4a16kv4-sym     -            -      -          -    -    -   -    -
fp8              float32      -      -          -    -    -   folder -
fp8a16           float32      F32    -          yes  -    -   folder -
fp8-block        float32      -      -          -    -    -   folder -
fp8-blocka16     float32      F32    -          yes  -    -   folder -
fp8-tensora16    float32      F32    -          yes  -    -   folder -
nvfp4            bfloat16     -      -          -    -    -   folder -
nvfp4a16         bfloat16     NVFP4  -          yes  -    -   folder -
mxfp4            bfloat16     -      -          -    -    -   folder -
mxfp4a8          bfloat16     -      -          -    -    -   -    -
mxfp4a16         bfloat16     MXFP4  -          yes  -    -   folder -
mxfp6a8          bfloat16     -      -          -    -    -   -    -
mxfp6a16         bfloat16     BF16   -          yes  -    -   -    -
mxfp8            bfloat16     -      -          -    -    -   folder -
mxfp8a16         bfloat16     BF16   -          yes  -    -   -    -
q2_k             -            Q2_K   -          -    -    -   -    -
q3_k             -            Q3_K   -          yes  -    -   -    -
q4_k             -            Q4_K   -          -    -    -   -    -
q5_k             -            Q5_K   -          -    -    -   -    -
q6_k             -            Q6_K   -          yes  -    -   -    -
iq4_nl           -            IQ4_NL -          yes  -    -   -    -
q2_0             -            Q2_0   -          yes  -    -   -    -
"""
# The rows of the shorter table.
COMMON = (
    "w4a16g32-sym",
    "w4a16g32-asym",
    "w4a8-sym",
    "w4a8g32-sym-asym",
    "w8a8-static",
    "w4a16g32-static",
    "fp8",
    "nvfp4",
    "nvfp4a16",
    "mxfp4",
    "q4_k",
    "iq4_nl",
)
PAGES = {"docs/formats.md": None, "README.md": COMMON}


@dataclass(frozen=True)
class Loads:
    """Where one scheme loads.

    Attributes:
        scheme: its name.
        transformers: the dtype in which stock ``transformers`` gives the simulated logits; ``None``: it does not.
        exports: what each target of ``lowbit export`` writes, the GGUF type or "yes"; those that refuse are left out.
        folder: targets that read the run folder itself.
    """

    scheme: str
    transformers: str | None
    exports: dict[str, str]
    folder: frozenset[str]


_LINES = [line.split() for line in TABLE.split("\n") if line]
TARGETS = tuple(_LINES[0][2:])
ROWS = {
    name: Loads(
        name,
        None if stock == NO else stock,
        {target: cell for target, cell in zip(TARGETS, cells, strict=True) if cell not in (NO, FOLDER)},
        frozenset(target for target, cell in zip(TARGETS, cells, strict=True) if cell == FOLDER),
    )
    for name, stock, *cells in _LINES[1:]
}


def render(schemes: Iterable[str] | None = None) -> str:
    """The table in Markdown, of all schemes or of some."""
    head = ("scheme", "stock `transformers`", *(f"`{target}`" for target in TARGETS))
    lines = [head, ("---",) * len(head)]
    for row in (ROWS[name] for name in schemes or ROWS):
        lines.append(
            (
                f"`{row.scheme}`",
                row.transformers or "",
                *(FOLDER if target in row.folder else row.exports.get(target, "") for target in TARGETS),
            )
        )
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines)


def with_table(page: str, table: str) -> str:
    """A page with the table between its marks, which the page has once."""
    begin, end = "<!-- loads: made by tests/loads.py -->\n", "\n<!-- /loads -->"
    assert page.count(begin) == page.count(end) == 1
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + table + end, page, flags=re.S)


def main() -> None:
    """Write the pages."""
    for name, schemes in PAGES.items():
        page = ROOT / name
        page.write_text(with_table(page.read_text(), render(schemes)))


if __name__ == "__main__":
    main()
