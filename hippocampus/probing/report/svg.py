"""Pictures that may stand in a page: `clean_svg`.

A run folder may come from somebody else. Of an SVG file only what draws is kept, by a list of what
is allowed: no script, no handler, no link, no style for the page around it.
"""

from __future__ import annotations

import re
from html import escape
from xml.etree import ElementTree

from hippocampus.errors import DataError
from hippocampus.probing.report.blocks import visible
from hippocampus.probing.results import Plot

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"

_ELEMENTS = frozenset("""circle clipPath defs desc ellipse g image line linearGradient path pattern
    polygon polyline radialGradient rect stop style svg text title tspan use""".split())  # noqa: SIM905 - to be read
_ATTRIBUTES = frozenset("""class clip-path clip-rule clipPathUnits cx cy d dx dy fill fill-opacity
    fill-rule font-family font-size font-style font-weight fx fy gradientTransform gradientUnits
    height id image-rendering offset opacity patternTransform patternUnits points
    preserveAspectRatio r rotate rx ry shape-rendering stop-color stop-opacity stroke
    stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin stroke-miterlimit
    stroke-opacity stroke-width style text-anchor textLength transform version viewBox width x x1
    x2 y y1 y2""".split())  # noqa: SIM905

# What matplotlib writes, confined to one picture by its class.
_OWN_STYLE = re.compile(r"\s*\.p[0-9a-f]+ \*\s*\{[\w\s:;.-]*\}\s*")
_IMAGE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=\s]*")
_BAD_VALUE = re.compile(r"(?i)url\((?!\s*['\"]?#)|@|expression|\\|/\*")
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")  # a hundredth of a point is not seen


def clean_svg(plot: Plot) -> str:
    """The picture as text to put into HTML, with a name for people who do not see it.

    Raises:
      DataError: it is not an SVG picture.
    """
    if re.search(r"<!(?!--)", plot.svg):  # entities can grow without end
        raise DataError(f"the picture {plot.name} is not plain SVG", "run its probe again")
    try:
        root = ElementTree.fromstring(visible(plot.svg))  # XML has no control characters
    except (ElementTree.ParseError, ValueError, RecursionError):
        raise DataError(f"the picture {plot.name} is not SVG", "run its probe again") from None
    if root.tag != f"{_SVG}svg":
        raise DataError(f"the picture {plot.name} is not SVG", "run its probe again")
    root.set("role", "img")
    root.set("aria-label", visible(f"{plot.title}. {plot.caption}".strip()))
    parts: list[str] = []
    _write(root, parts, True)
    return "".join(parts)


def width_points(svg: str) -> float:
    """Width of the view box, in points; 0 where it says none."""
    found = re.search(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+) [\d.]+"', svg[:2000])
    return float(found[1]) if found else 0.0


def _write(element: ElementTree.Element, parts: list[str], is_root: bool = False) -> None:
    name = str(element.tag).removeprefix(_SVG)
    if name not in _ELEMENTS or (name == "svg" and not is_root):
        return
    if name == "style":
        if _OWN_STYLE.fullmatch(element.text or ""):
            parts.append(f"<style>{element.text}</style>")
        return
    parts.append(f"<{name}")
    for key, value in element.attrib.items():
        if shown := _attribute(name, key, value, is_root):
            parts.append(shown)
    parts.append(">" + escape(element.text or "", quote=False))
    for child in element:
        _write(child, parts)
        parts.append(escape(child.tail or "", quote=False))
    parts.append(f"</{name}>")


def _attribute(element: str, key: str, value: str, is_root: bool) -> str:
    """An attribute as text; "" for one that is left out."""
    if is_root and key in ("role", "aria-label"):
        return f' {key}="{escape(value)}"'
    if key in (_HREF, "href"):
        inside = value.startswith("#") if element == "use" else bool(
            element == "image" and _IMAGE.fullmatch(value))
        return f' href="{escape(value)}"' if inside else ""
    sized_by_the_page = is_root and key in ("width", "height", "style", "id")
    if key not in _ATTRIBUTES or sized_by_the_page or _BAD_VALUE.search(value):
        return ""
    if key == "d":
        value = _LONG_NUMBER.sub(r"\1", value)
    return f' {key}="{escape(value)}"'
