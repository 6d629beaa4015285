"""A page as a tree of elements, by the standard library alone."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br"}


class Element:
    """A tag with its attributes and what is inside it."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes, self.inside = tag, attributes, list[Element | str]()

    @property
    def text(self) -> str:
        return " ".join(self._raw().split())

    def _raw(self) -> str:
        parts = (part if isinstance(part, str) else part._raw() for part in self.inside)
        return " " if self.tag == "br" else "".join(parts)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def all(self, tag: str = "", within: str = "", **attributes: str) -> list[Element]:
        """Every element below with this tag, class and attributes, in order."""
        found = []
        for part in self.inside:
            if isinstance(part, Element):
                own = part.tag == (tag or part.tag) and (not within or within in part.classes)
                found += [part] if own and attributes.items() <= part.attributes.items() else []
                found += part.all(tag, within, **attributes)
        return found

    def one(self, tag: str = "", within: str = "", **attributes: str) -> Element:
        (element,) = self.all(tag, within, **attributes)
        return element


class Parser(HTMLParser):
    """Builds the tree; refuses a tag that is closed by another."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID and self.open.pop().tag == tag, f"unexpected </{tag}>"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parse(page: bytes) -> Element:
    parser = Parser()
    parser.feed(page.decode())
    parser.close()
    (root,) = parser.open
    return root


def cells(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.inside if isinstance(cell, Element)] for row in table.all("tr")]
