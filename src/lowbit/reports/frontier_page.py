"""The page of a frontier: expected divergence over the size of the file, and the sizes that were made in full."""

from __future__ import annotations

from markupsafe import Markup, escape

from lowbit.allocation.frontier import Frontier
from lowbit.reports.charts import Series, lines

STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem}svg{width:100%}"
    "td,th{padding:.2rem .6rem;text-align:right}.rule{stroke:#8884}.tick,.label{font-size:12px;fill:currentColor}"
    ".series{stroke:currentColor;fill:none}.s-0{color:#2266aa}.s-1{color:#bb5500}.s-2{color:#228844}"
    ".s-3{color:#aa3377}.s-4{color:#777711}.s-5{color:#555555}circle{fill:currentColor}"
)


def render(found: Frontier) -> str:
    """One self-contained HTML document without scripts."""
    series = [Series("expected", [(p.size_bytes / 1e6, p.expected) for p in found.points], 0)]
    if found.full:
        series.append(
            Series("measured, rounded to nearest", [(p.size_bytes / 1e6, p.measured) for p in found.full], 1)
        )
    for place, name in enumerate(found.full[0].kl if found.full else {}):
        series.append(
            Series(f"measured on {name}", [(p.size_bytes / 1e6, p.kl[name]) for p in found.full], 2 + place)
        )
    chart = lines("Divergence by size", series, "MB", "KL, nats per token", log=True)
    key = Markup("").join(Markup('<li class="s-{}">{}</li>').format(int(one.style) % 6, one.name) for one in series)
    title = f"{found.model} in {found.target}"
    rows = [_row("th", ["bytes", "expected KL", *(name for name in (found.full[0].kl if found.full else {}))])]
    for point in found.full:
        rows.append(
            _row("td", [f"{point.size_bytes:,}", f"{point.expected:.4g}", *_scores(point.perplexity, point.kl)])
        )
    table = Markup("<table>{}</table>").format(Markup("").join(rows)) if found.full else Markup("")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f"<figure>{chart or ''}</figure><ul>{key}</ul>\n{table}</body></html>\n"
    )


def _scores(perplexity: dict[str, float], kl: dict[str, float]) -> list[str]:
    return [f"KL {kl[name]:.4f}, perplexity {perplexity[name]:.3f}" for name in kl]


def _row(tag: str, cells: list[str]) -> Markup:
    cell = Markup(f"<{tag}>{{}}</{tag}>")  # tags of this file; cells are escaped
    return Markup("<tr>{}</tr>").format(Markup("").join(cell.format(text) for text in cells))
