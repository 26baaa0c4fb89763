"""A page of HTML as a browser sees it."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """What a browser would see of a page: its elements in order, its text, the cells of its tables."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.data: list[Any] = []
        self.rows: list[list[str]] = []
        self._open = ""
        self._cell = False
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            kind = self.elements[-1][1].get("type")
            self.data.append(json.loads(data)) if kind == "application/json" else self.scripts.append(data)
        elif self._open == "style":
            self.styles.append(data)
        else:
            self.text.append(data)
            if self._cell:
                self.rows[-1][-1] += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def row(self, first: str) -> list[str]:
        (match,) = [row for row in self.rows if row and row[0] == first]
        return match
