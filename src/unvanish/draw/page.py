"""One self-contained page around one picture: opens offline, needs no script."""

from collections.abc import Sequence
from html import escape
from io import StringIO

from matplotlib.axes import Axes

from unvanish.draw.axes import figure_of

_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; background: white; border-radius: .4rem; overflow-x: auto; }
svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8884; overflow-wrap: anywhere; }
.note { opacity: .75; font-size: .9rem; }
"""


def page(
    title: str, lead: str, axes: Axes, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """The page as HTML: heading, a sentence, the picture as SVG, a table, and notes; all text is escaped."""
    picture = StringIO()
    figure_of(axes).savefig(picture, format="svg", facecolor="white")
    svg = picture.getvalue()
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    foot = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n"
        f'<figure role="img" aria-label="{escape(lead)}">{svg[svg.index("<svg") :]}</figure>\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n{foot}'
        "</body>\n</html>\n"
    )
