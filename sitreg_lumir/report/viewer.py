"""The part of a report that shows one pair: three planes, a slider each, and ways to compare."""

import json

from sitreg_lumir.report.colours import Coloured
from sitreg_lumir.report.page import Html, tag
from sitreg_lumir.report.pictures import GRID_MM, Plane

_DIRECTIONS = {"axial": "LRAP", "coronal": "LRSI", "sagittal": "PASI"}  # left, right, top, bottom of a picture
_MODES = (("plain", "Images"), ("edges", "Edges of fixed"), ("checker", "Checkerboard with fixed"), ("blend", "Blend"))
_PANELS = (  # layer, layer under it, heading, description
    ("fixed", None, "Fixed", "fixed image"),
    ("moving", None, "Moving, before", "moving image before registration"),
    ("warped", None, "Moving, after", "moving image after registration"),
    ("grid", "warped", "Deformed grid", "grid of the moving image, deformed with it"),
    ("jacobian", "fixed", "Jacobian", "Jacobian determinant in colours over the fixed image"),
    ("disagreement", "fixed", "Members differ", "how far the members differ, in colours over the fixed image"),
)


def viewer(planes: list[Plane], coloured: dict[str, Coloured], key: str) -> Html:
    """The pictures of one pair.

    Without scripts one slice of each plane is shown; the ways to compare work, since they are done by the style sheet.

    Args:
        planes: as :func:`~sitreg_lumir.report.pictures.render` gives them.
        coloured: the layers of that kind, for the legend.
        key: letters and digits, different for each viewer of a page.
    """
    modes = [
        tag(
            "label",
            tag("input", type="radio", name=f"mode-{key}", value=mode, checked=mode == "plain"),
            tag("span", text),
        )
        for mode, text in _MODES
    ]
    larger = tag("label", tag("input", type="checkbox", value="larger"), tag("span", "Larger"), class_="toggle")
    toolbar = tag(
        "div",
        tag("fieldset", tag("legend", "Show"), *modes, class_="modes"),
        larger,
        class_="toolbar",
    )
    without = tag("noscript", tag("p", "The sliders need JavaScript; one slice of each plane is shown.", class_="hint"))
    shown = [_plane(plane, key) for plane in planes]
    return tag("div", toolbar, without, *shown, _legend(coloured), class_="viewer")


def _plane(plane: Plane, key: str) -> Html:
    name, last = f"slice-{key}-{plane.name}", len(plane.indices) - 1
    text = f"voxel {plane.indices[plane.start]}, {plane.start + 1} of {last + 1}"
    slider = tag("input", type="range", id=name, min=0, max=last, step=1, value=plane.start, aria_valuetext=text)
    control = tag(
        "div",
        tag("label", tag("span", plane.name.capitalize(), class_="unseen"), " Slice", for_=name),
        slider,
        tag("output", text, for_=name),
        class_="slider",
        hidden=True,
    )
    panels = [_panel(plane, *panel) for panel in _PANELS if panel[0] in plane.layers]
    # Base64 holds no "<": nothing in this block can end it.
    pictures = Html(json.dumps({"indices": plane.indices, "layers": plane.layers}, separators=(",", ":")))
    data = tag("script", pictures, type="application/json")
    heading = tag("h3", plane.name.capitalize())
    return tag(
        "section",
        tag("div", heading, control, class_="bar"),
        tag("div", *panels, class_="panels"),
        data,
        class_="plane",
    )


def _panel(plane: Plane, layer: str, under: str | None, heading: str, description: str) -> Html:
    alt = f"{description}, {plane.name} slice"
    if under is not None:
        pictures = [_image(plane, under, "", "dim"), _image(plane, layer, alt, "over")]
    else:
        pictures = [_image(plane, layer, alt, "base")]
        if layer != "fixed":
            pictures += [_image(plane, "fixed", "", "over other")]
        pictures += [_image(plane, "edges", "", "over edges")]
    if layer == "fixed":
        places = ("left", "right", "top", "bottom")
        for letter, place in zip(_DIRECTIONS[plane.name], places, strict=True):
            pictures.append(tag("span", letter, class_=f"side {place}", aria_hidden="true"))
    return tag("figure", tag("figcaption", heading), tag("div", *pictures, class_="stage"))


def _image(plane: Plane, layer: str, alt: str, class_: str) -> Html:
    width, height = plane.size
    source = plane.layers[layer][plane.start]
    return tag("img", src=source, alt=alt, width=width, height=height, class_=class_, data_layer=layer)


def _legend(coloured: dict[str, Coloured]) -> Html:
    parts = [
        tag(
            "p",
            tag("b", "Deformed grid: "),
            f"lines every {GRID_MM:g} mm on the moving image, moved with it onto the fixed image.",
        )
    ]
    texts = {
        "jacobian": (
            "Jacobian determinant",
            "volume of the moving image per volume of the fixed one. Clear: the same; blue: smaller in the moving "
            "image; orange: larger; magenta: folded (0 or less).",
        ),
        "disagreement": (
            "Members differ, mm",
            "how far the members' fields (`register --uncertainty`) or updates (`predict --disagreement`) differ.",
        ),
    }
    for layer, (name, text) in texts.items():
        if layer in coloured:
            bar = tag("img", src=coloured[layer].bar, alt="", class_="scale", width=160, height=10)
            ticks = tag("span", *(tag("span", tick) for tick in coloured[layer].ticks), class_="ticks")
            parts.append(tag("div", tag("div", bar, ticks, class_="colours"), tag("p", tag("b", f"{name}: "), text)))
    return tag("div", *parts, class_="legend")
