"""What the diagrams are drawn with: boxes, lines and text as SVG that is legible on light and on dark pages.

An SVG that a page shows as a picture knows the reader's colour scheme but not the page's own. So each has a ground of its own,
and its colours, which are classes of a style sheet, follow the scheme together.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

# class: (fill, stroke) on light and on dark ground
FILLS = {
    "ground": (("#ffffff", "#d0d7de"), ("#0d1117", "#30363d")),
    "lane": (("#f6f8fa", "#d8dee4"), ("#151b23", "#30363d")),
    "data": (("#eef1f4", "#59636e"), ("#262c36", "#9198a1")),
    "teacher": (("#ddf4ff", "#0969da"), ("#0f2b48", "#58a6ff")),
    "student": (("#dafbe1", "#1a7f37"), ("#12331f", "#3fb950")),
    "projector": (("#fbefff", "#8250df"), ("#2c2046", "#bc8cff")),
    "loss": (("#fff8c5", "#9a6700"), ("#3a2d0e", "#d29922")),
}
# class: (stroke on light, stroke on dark)
LINES = {
    "from-data": ("#59636e", "#9198a1"),
    "from-teacher": ("#0969da", "#58a6ff"),
    "from-student": ("#1a7f37", "#3fb950"),
    "spatial": ("#8250df", "#bc8cff"),
    "frequency": ("#bc4c00", "#f0883e"),
    "to-loss": ("#9a6700", "#d29922"),
}
INK, MUTED = ("#1f2328", "#e6edf3"), ("#59636e", "#9ea7b3")
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'Liberation Sans', sans-serif"

# as in 49 x 768
TIMES = "\N{MULTIPLICATION SIGN}"

Point = tuple[float, float]


def style_sheet() -> str:
    """The classes, for a light scheme and, in a media query, for a dark one."""

    def rules(scheme: int) -> str:
        found = [f".{name}{{fill:{both[scheme][0]};stroke:{both[scheme][1]}}}" for name, both in FILLS.items()]
        found += [f".{name}{{stroke:{both[scheme]}}}" for name, both in LINES.items()]
        found += [f".{name}-head{{fill:{both[scheme]}}}" for name, both in LINES.items()]
        found += [f".halo{{stroke:{FILLS['ground'][scheme][0]}}}"]
        found += [f"text{{fill:{INK[scheme]}}}.muted{{fill:{MUTED[scheme]}}}"]
        return "".join(found)

    shared = f"text{{font-family:{FONT}}}polyline{{fill:none}}.strong{{font-weight:600}}"
    return f"{shared}{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}"


def picture(width: int, height: int, title: str, description: str) -> ElementTree.Element:
    """An empty picture on a ground with round corners; title and description are what a screen reader says."""
    svg = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": str(width),
            "height": str(height),
            "role": "img",
            "aria-labelledby": "title desc",
        },
    )
    ElementTree.SubElement(svg, "title", {"id": "title"}).text = title
    ElementTree.SubElement(svg, "desc", {"id": "desc"}).text = description
    ElementTree.SubElement(svg, "style").text = style_sheet()
    rectangle(svg, (0.5, 0.5, width - 1, height - 1), "ground", radius=10)
    return svg


def _number(value: float) -> str:
    return f"{value:g}"


def rectangle(
    svg: ElementTree.Element, place: Sequence[float], kind: str, radius: float = 6, dashed: bool = False
) -> None:
    """A rectangle of a class of `FILLS`; place is (x, y, width, height)."""
    names = ("x", "y", "width", "height")
    attributes = {"class": kind, "rx": _number(radius)} | {n: _number(v) for n, v in zip(names, place, strict=True)}
    if dashed:
        attributes["stroke-dasharray"] = "5 4"
    ElementTree.SubElement(svg, "rect", attributes)


def text(
    svg: ElementTree.Element, at: Point, words: str, size: float = 12, anchor: str = "middle", kind: str = ""
) -> None:
    """One line of text whose baseline is at `at`."""
    attributes = {"x": _number(at[0]), "y": _number(at[1]), "font-size": _number(size), "text-anchor": anchor}
    if kind:
        attributes["class"] = kind
    ElementTree.SubElement(svg, "text", attributes).text = words


def box(
    svg: ElementTree.Element,
    place: Sequence[float],
    kind: str,
    title: str,
    lines: Sequence[str] = (),
    stacked: bool = False,
    dashed: bool = False,
) -> None:
    """A box with a title and lines below it, centred; `stacked` shows a second one behind it."""
    x, y, width, height = place
    if stacked:
        rectangle(svg, (x + 6, y - 6, width, height), kind)
    rectangle(svg, place, kind, dashed=dashed)
    middle = x + width / 2
    first = y + height / 2 - (16 * len(lines)) / 2 + 5
    text(svg, (middle, first), title, 13.5, kind="strong")
    for number, line in enumerate(lines, 1):
        text(svg, (middle, first + 16 * number), line, 12, kind="muted")


def arrow(
    svg: ElementTree.Element,
    points: Sequence[Point],
    kind: str,
    head: bool = True,
    dashed: bool = False,
    halo: bool = False,
) -> None:
    """A line through `points` of a class of `LINES`, with a head at its end; `halo` lifts it over what it crosses."""
    (x0, y0), (x, y) = points[-2], points[-1]
    length = max(abs(x - x0), abs(y - y0))
    dx, dy = (x - x0) / length, (y - y0) / length
    shaft = [*points[:-1], (x - 6 * dx, y - 6 * dy) if head else (x, y)]
    path = " ".join(f"{_number(a)},{_number(b)}" for a, b in shaft)
    if halo:
        ElementTree.SubElement(svg, "polyline", {"class": "halo", "points": path, "stroke-width": "7"})
    attributes = {"class": kind, "points": path, "stroke-width": "1.8", "stroke-linejoin": "round"}
    if dashed:
        attributes["stroke-dasharray"] = "4 4"
    ElementTree.SubElement(svg, "polyline", attributes)
    if head:
        across = 4.2
        corners = [(x, y), (x - 8 * dx - across * dy, y - 8 * dy + across * dx)]
        corners.append((x - 8 * dx + across * dy, y - 8 * dy - across * dx))
        tip = " ".join(f"{_number(a)},{_number(b)}" for a, b in corners)
        ElementTree.SubElement(svg, "polygon", {"class": f"{kind}-head", "points": tip})


def strands(svg: ElementTree.Element, points: Sequence[Point], halo: bool = False, gap: float = 6) -> None:
    """The two views side by side along `points`, whose legs are horizontal or vertical: spatial and frequency."""
    for kind, side in (("spatial", -gap / 2), ("frequency", gap / 2)):
        # each point moves across the legs that meet in it, so that both strands turn in parallel
        moved = []
        for number, (x, y) in enumerate(points):
            legs = [(points[i], points[i + 1]) for i in (number - 1, number) if 0 <= i < len(points) - 1]
            for (ax, ay), (bx, by) in legs:
                if ay == by:
                    y = points[number][1] + side * (1 if bx > ax else -1)
                else:
                    x = points[number][0] + side * (-1 if by > ay else 1)
            moved.append((x, y))
        arrow(svg, moved, kind, halo=halo)


def written(svg: ElementTree.Element) -> str:
    """The picture as the text of a file."""
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"
