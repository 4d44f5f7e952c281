"""The page of a frontier: expected divergence by size, the sizes made in full, and other quantizers' files."""

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
    names = list(found.full[0].kl) if found.full else []
    theirs = f"{found.target}'s own quantizer"
    for maker, files in (("", found.full), (f"{theirs}, ", found.quantizer)):
        for name in names if files else ():
            points = [(made.size_bytes / 1e6, made.kl[name]) for made in files]
            series.append(Series(f"{maker}measured on {name}", points, len(series)))
    chart = lines("Divergence by size", series, "MB", "KL, nats per token", log=True)
    key = Markup("").join(Markup('<li class="s-{}">{}</li>').format(int(one.style) % 6, one.name) for one in series)
    title = f"{found.model} in {found.target}"
    rows = [_row("th", ["file", "bytes", "expected KL", *names])]
    made = [(p.size_bytes, "lowbit", f"{p.expected:.4g}", _scores(p.perplexity, p.kl)) for p in found.full]
    made += [(p.size_bytes, f"{theirs}: {p.name}", "-", _scores(p.perplexity, p.kl)) for p in found.quantizer]
    for size, name, expected, scores in sorted(made):
        rows.append(_row("td", [name, f"{size:,}", expected, *scores]))
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
