"""Reads a report back: its sections, and the charts in it as plotly gets them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.charts: dict[str, Any] = {}
        self.missing: list[str] = []
        self.words: list[str] = []
        self._figure: str | None = None
        self._inside: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "section":
            self.sections.append(named["id"])
        elif tag == "figure":
            self._figure = named["id"]
        elif tag == "p" and named.get("class") == "missing":
            self.missing.append("")
        self._inside.append((tag, named))

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, named = self._inside[-1] if self._inside else ("", {})
        if tag == "script" and named.get("type") == "application/json":
            self.charts[self._figure] = json.loads(data)
        elif tag not in ("script", "style"):
            self.words.append(data)
        if any(one.get("class") == "missing" for _, one in self._inside):
            self.missing[-1] += data


def read_page(path: Path) -> _Page:
    """Parses a report: `sections` (ids), `charts` by id, `missing` (sentences), `words` (all text)."""
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page
