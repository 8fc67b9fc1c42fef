"""A terminal's screen as a picture (SVG), and several of them as a recording (asciicast)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby, zip_longest
from typing import NamedTuple

from pyte.screens import Char

Cells = Sequence[Sequence[Char]]

# In the units of the picture. A font of 10 is 6 wide or a little more in every common monospace;
# each run of text is told its length, so that columns stay in line whatever the font.
FONT, WIDTH, HEIGHT, BASELINE = 10, 6, 12, 9
MARGIN, TITLE_HEIGHT = 6, 18
# The ground of the picture's frame, and its ink: as dark as the explorer.
GROUND, INK = "#14171c", "#e4e7eb"
PAGE_FONT = '"Fira Code", ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace'

# Block characters are drawn as what they stand for: fonts leave gaps between one and the next.
# Character to x, y, width and height, in eighths of a cell.
BLOCKS = {
    "█": (0, 0, 8, 8),
    "▀": (0, 0, 8, 4),
    "▐": (4, 0, 4, 8),
    "▔": (0, 0, 8, 1),
    "▕": (7, 0, 1, 8),
    **{chr(0x2580 + n): (0, 8 - n, 8, n) for n in range(1, 8)},  # ▁ to ▇
    **{chr(0x2590 - n): (0, 0, n, 8) for n in range(1, 8)},  # ▏ to ▉
}


class Look(NamedTuple):
    """How a cell's text looks.

    Attributes:
        ink: Colour of the text.
        bold, italic, underlined: As they say.
    """

    ink: str
    bold: bool
    italic: bool
    underlined: bool

    @property
    def rules(self) -> str:
        """The same in CSS."""
        rules = [f"fill:{self.ink}"]
        if self.bold:
            rules.append("font-weight:bold")
        if self.italic:
            rules.append("font-style:italic")
        if self.underlined:
            rules.append("text-decoration:underline")
        return ";".join(rules)


def draw_screen(cells: Cells, title: str) -> str:
    """A screen as SVG that fetches nothing, under a title."""
    columns, rows = len(cells[0]), len(cells)
    width, height = columns * WIDTH + 2 * MARGIN, rows * HEIGHT + TITLE_HEIGHT + MARGIN
    looks: dict[Look, str] = {}
    shapes: list[str] = []
    for row, line in enumerate(cells):
        shapes += _draw_grounds(line, row * HEIGHT)
        shapes += _draw_texts(line, row * HEIGHT, looks)
    styles = "".join(f".{name}{{{look.rules}}}\n" for look, name in looks.items())
    name = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{name}</title>\n"
        f"<style>text{{font-family:{PAGE_FONT};font-size:{FONT}px;white-space:pre}}\n"
        f"{styles}</style>\n"
        f'<rect width="{width}" height="{height}" rx="5" fill="{GROUND}"/>\n'
        f'<text x="{width / 2:g}" y="12" fill="{INK}" text-anchor="middle">{name}</text>\n'
        f'<g transform="translate({MARGIN} {TITLE_HEIGHT})">\n'
        + "".join(f"{shape}\n" for shape in shapes)
        + "</g>\n</svg>\n"
    )


def look_alike(cells: Cells, others: Cells) -> bool:
    """Whether nobody could tell two screens apart."""
    return all(
        one == other or (one.data, _codes(one)) == (other.data, _codes(other))
        for line, other_line in zip(cells, others, strict=True)
        for one, other in zip(line, other_line, strict=True)
    )


def _draw_grounds(line: Sequence[Char], y: int) -> Iterator[str]:
    column = 0
    for ground, run in groupby(line, _ground):
        length = len(list(run))
        if ground != GROUND:
            yield _rectangle(column * WIDTH, y, length * WIDTH, HEIGHT, ground)
        column += length


def _draw_texts(line: Sequence[Char], y: int, looks: dict[Look, str]) -> Iterator[str]:
    """The texts and blocks of a line; new looks are given names."""
    column = 0
    for (look, block), run in groupby(line, lambda cell: (_look(cell), BLOCKS.get(cell.data))):
        text = "".join(cell.data for cell in run)
        if block is not None:
            left, top, width, height = block
            # One that fills its cell from side to side goes on in the next.
            count = len(text) if width == 8 else 1
            for place in range(0, len(text), count):
                yield _rectangle(
                    (column + place) * WIDTH + left * WIDTH / 8, y + top * HEIGHT / 8,
                    count * width * WIDTH / 8, height * HEIGHT / 8, look.ink,
                )  # fmt: skip
        elif shown := text.strip():
            x = (column + len(text) - len(text.lstrip())) * WIDTH
            name = looks.setdefault(look, f"s{len(looks)}")
            yield (
                f'<text x="{x}" y="{y + BASELINE}" class="{name}"'
                f' textLength="{len(shown) * WIDTH}">{escape(shown, quote=False)}</text>'
            )
        column += len(text)


def _rectangle(x: float, y: float, width: float, height: float, color: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{color}"'
        ' shape-rendering="crispEdges"/>'
    )


def _look(cell: Char) -> Look:
    ink = _color(cell.fg, INK) if not cell.reverse else _color(cell.bg, GROUND)
    return Look(ink, cell.bold, cell.italics, cell.underscore)


def _ground(cell: Char) -> str:
    return _color(cell.bg, GROUND) if not cell.reverse else _color(cell.fg, INK)


def _color(digits: str, default: str) -> str:
    """A colour as CSS says it. On a terminal of all colours the explorer uses no named ones."""
    if digits == "default":
        return default
    int(digits, 16)
    return f"#{digits}"


def record_screens(screens: Iterable[tuple[str, Cells]], seconds: int) -> str:
    """Screens as an asciicast, each for some seconds, with what happens as its marker.

    Source: https://docs.asciinema.org/manual/asciicast/v2/
    """
    lines: list[object] = []
    shown: Cells = ()
    time_s = 0
    for told, cells in screens:
        drawn = "".join(
            _encode(line, number, old)
            for number, (line, old) in enumerate(zip_longest(cells, shown, fillvalue=()), 1)
        )
        hide_cursor = "" if shown else "\x1b[?25l"
        lines += [(time_s, "m", told), (time_s, "o", f"{hide_cursor}{drawn}")]
        shown = cells
        time_s += seconds
    lines.append((time_s, "o", "\x1b[0m\x1b[?25h"))
    header = {"version": 2, "width": len(shown[0]), "height": len(shown), "title": "aprtui"}
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in (header, *lines))


def _encode(line: Sequence[Char], number: int, old: Sequence[Char]) -> str:
    """What a terminal is sent to show a line where it showed an old one."""
    changed = [
        place for place, (cell, before) in enumerate(zip_longest(line, old)) if cell != before
    ]
    if not changed:
        return ""
    first, last = changed[0], changed[-1] + 1
    encoded = [f"\x1b[{number};{first + 1}H"]
    before: tuple[str, ...] = ("",) * 5
    for codes, run in groupby(line[first:last], _codes):
        news = ";".join(code for code, old_code in zip(codes, before) if code != old_code)
        encoded.append(f"\x1b[{news}m" + "".join(cell.data for cell in run))
        before = codes
    return "".join(encoded)


def _codes(cell: Char) -> tuple[str, ...]:
    """A cell's look in the codes of a terminal, each of which replaces one of its kind."""
    look = _look(cell)
    return (
        "1" if look.bold else "22",
        "3" if look.italic else "23",
        "4" if look.underlined else "24",
        f"38;2;{_numbers(look.ink)}",
        f"48;2;{_numbers(_ground(cell))}",
    )


def _numbers(color: str) -> str:
    return ";".join(map(str, bytes.fromhex(color.removeprefix("#"))))
