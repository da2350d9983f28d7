"""Charts as one SVG file, that stands without the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

from markupsafe import Markup

from finebits.report.svg import text_at

HEAD = 26.0  # pixels of a title


def figure(charts: Sequence[tuple[str, Markup]]) -> str:
    """Charts (title, drawing), one under the other, in the page's style.

    >>> from finebits.report.svg import drawing
    >>> text = figure([("first", drawing(10, 20, "first")), ("second", drawing(10, 30, "second"))])
    >>> text.count("<svg "), 'viewBox="0 0 10 102"' in text
    (3, True)
    """
    made, height, width = list[Markup](), 0.0, 0.0
    for title, chart in charts:
        across, down = (float(n) for n in re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])
        made.append(text_at(8.0, height + HEAD - 8, title, "title"))
        made.append(Markup(str(chart).replace("<svg ", f'<svg y="{height + HEAD:.0f}" width="{across:.0f}" height="{down:.0f}" ', 1)))
        height, width = height + HEAD + down, max(width, across)
    style = resources.files("finebits.report").joinpath("page.css").read_text(encoding="utf-8")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"><style>{style}</style>'
    return f'{head}<rect width="100%" height="100%" style="fill: var(--paper)"/>{Markup("").join(made)}</svg>\n'
