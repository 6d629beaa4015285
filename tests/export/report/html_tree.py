"""A page as a tree of elements, by the standard library alone."""

from __future__ import annotations

import re
from xml.etree import ElementTree


class Element(ElementTree.Element):
    """A tag with its attributes and what is inside it."""

    @property
    def words(self) -> str:
        return " ".join("".join(self.itertext()).split())

    @property
    def classes(self) -> list[str]:
        return self.get("class", "").split()

    def all(self, tag: str = "*", within: str = "", **attributes: str) -> list[Element]:
        """Every element below with this tag, class and attributes, in order."""
        below = (element for element in self.iterfind(f".//{tag}") if isinstance(element, Element))
        return [e for e in below if within in (*e.classes, "") and attributes.items() <= e.attrib.items()]

    def one(self, tag: str = "*", within: str = "", **attributes: str) -> Element:
        (element,) = self.all(tag, within, **attributes)
        return element


def parse(page: bytes) -> Element:
    """Of a page that is as strict as XML, but for elements that HTML knows to be empty."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(element_factory=Element))
    root = ElementTree.fromstring(re.sub(rb"<(meta|br)\b([^>]*)>", rb"<\1\2/> ", page), parser)
    assert isinstance(root, Element)
    return root


def cells(table: Element) -> list[list[str]]:
    return [[cell.words for cell in row if isinstance(cell, Element)] for row in table.all("tr")]
