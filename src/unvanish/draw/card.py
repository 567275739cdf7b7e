"""The display of an object in a notebook: a picture, and the facts in words."""

from base64 import b64encode
from html import escape
from io import BytesIO

from matplotlib.axes import Axes

from unvanish.draw.axes import figure_of

_FRAME = "max-width:46rem;font-family:system-ui,sans-serif"
_FACTS = "margin:.4rem 0 0;font-size:.85rem;white-space:pre;overflow-x:auto;background:none"


def card(axes: Axes, title: str, facts: str) -> str:
    """Self-contained HTML: the axes' figure as an image, and the facts, escaped."""
    image = BytesIO()
    figure_of(axes).savefig(image, format="png", dpi=110, facecolor="white")
    source = f"data:image/png;base64,{b64encode(image.getvalue()).decode()}"
    return (
        f'<div style="{_FRAME}"><img src="{source}" alt="{escape(title)}" style="max-width:100%">'
        f'<pre style="{_FACTS}">{escape(facts)}</pre></div>'
    )
