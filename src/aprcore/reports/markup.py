"""HTML from nested elements: whatever is not markup already is escaped."""

from __future__ import annotations

from html import escape

from aprcore.ground.visible import visible

# Longer than any sentence of the engine; a hostile name of a megabyte is cut.
TEXT_LIMIT = 4000
# Elements of HTML that have no closing tag.
VOID = frozenset({"img", "input", "meta", "br"})


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | int | float | bool) -> Markup:
    r"""An element; children that are not `Markup` are text.

    What does not print in them is spelled out: a direction mark in a token would turn the rest of
    the line around.

    Args:
        name: Of the element.
        children: Markup or text, in order.
        attributes: Underlines stand for hyphens, and one at the end is dropped (`class_`). True
            is an attribute without a value; False and "" leave it out.
    """
    opening = f"<{name}{''.join(map(_attribute, attributes, attributes.values()))}>"
    if name in VOID:
        return Markup(opening)
    return Markup(f"{opening}{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children after one another."""
    return Markup("".join(map(_child, children)))


def _child(child: str) -> str:
    return child if isinstance(child, Markup) else escape(visible(child, TEXT_LIMIT))


def _attribute(name: str, value: str | int | float | bool) -> str:
    if value is False or value == "":
        return ""
    shown = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {shown}"
    # A data URI is longer than any text, and made here.
    text = value if isinstance(value, Markup) else escape(visible(str(value), TEXT_LIMIT))
    return f' {shown}="{text}"'
