"""How a record shows itself in a notebook: its picture, and the facts that its repr states."""

from base64 import b64encode
from html import escape
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure

_FRAME = "max-width:46rem;font-family:system-ui,sans-serif"
_FACTS = "margin:.4rem 0 0;font-size:.85rem;white-space:pre-wrap;background:none"


def card(record: Any) -> str:
    """Self-contained HTML: the picture of `record.plot()` as an image, and its repr, escaped."""
    axes = record.plot()
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110, facecolor="white")
    source = f"data:image/png;base64,{b64encode(image.getvalue()).decode()}"
    facts = escape(repr(record))
    return (
        f'<div style="{_FRAME}"><img src="{source}" alt="{escape(type(record).__name__)}" style="max-width:100%">'
        f'<pre style="{_FACTS}">{facts}</pre></div>'
    )
