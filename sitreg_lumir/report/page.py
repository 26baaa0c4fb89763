"""HTML by parts: text is escaped unless it was made here, and a page may load and run nothing but its own content."""

import base64
import hashlib
import html
from importlib import resources
from pathlib import Path

from sitreg_lumir import __version__
from sitreg_lumir.io.atomic import writing

_VOID = frozenset({"img", "input", "link", "meta"})
_CONTROLS = (*range(0x09), 0x0B, *range(0x0E, 0x20), *range(0x7F, 0xA0))
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_REPLACED = dict.fromkeys((*_CONTROLS, *_REORDERING), "\ufffd")


class Html(str):
    """Markup, as opposed to text that is still to be escaped."""


def escape(value: object) -> Html:
    """``value`` as text of a page or an attribute; :class:`Html` stays as it is.

    Control characters, halves of surrogate pairs (undecodable file names) and signs that reverse the reading
    direction become the replacement character: a name must not pass itself off as another.
    """
    if isinstance(value, Html):
        return value
    text = str(value).translate(_REPLACED).encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(text, quote=True))


def join(*parts: object) -> Html:
    """The parts one after the other, each escaped unless it is :class:`Html`."""
    return Html("".join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element.

    Args:
        name: of the element.
        children: its content; what is not :class:`Html` is escaped.
        attributes: ``class_`` means ``class``, ``data_layer`` ``data-layer``; True stands for an attribute without
            value, None and False leave it out.
    """
    shown = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            label = key if key in ("viewBox", "preserveAspectRatio") else key.rstrip("_").replace("_", "-")
            shown += f" {label}" if value is True else f' {label}="{escape(value)}"'
    return Html(f"<{name}{shown}>" if name in _VOID else f"<{name}{shown}>{join(*children)}</{name}>")


def write_page(file: Path, title: str, *body: object) -> None:
    """Writes a page that needs no other file; ``file`` keeps its old content if that fails.

    Its policy forbids the net, and any style or script but the package's own, known by their hashes: markup that
    slipped through would stay without effect.

    Args:
        file: where the page goes; its folder is made.
        title: of the window.
        body: parts of the page.

    Raises:
        InputError: ``file`` cannot be written.
    """
    style, script = _packaged("report.css"), _packaged("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),  # without it a browser asks the server for an icon
        tag("style", Html(style)),
    )
    made = tag("footer", f"Made by sitreg-lumir {__version__}. This file holds all it shows and loads nothing.")
    content = tag("html", head, tag("body", tag("main", *body, made), tag("script", Html(script))), lang="en")
    with writing(file) as temporary:
        temporary.write_text(f"<!doctype html>\n{content}\n", encoding="utf-8", newline="\n")


def _packaged(name: str) -> str:
    return resources.files("sitreg_lumir.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
