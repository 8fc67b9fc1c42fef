"""What a hostile or damaged file does to the parts of a sound one.

A builder of a format passes every number, text and value that it writes through a `Chaos`, which
changes some of them. What is computed from them, lengths and checksums, comes afterwards: so a
change reaches the part of a reader that looks at it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")

EDGES = (0, 1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 1 << 20, 1 << 24,
         (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 53, (1 << 63) - 1, 1 << 63,
         (1 << 64) - 1)  # fmt: skip
HOSTILE_TEXTS = (
    "", " ", "\0", "\x1b]52;c;UFdO\x07\x1b[2J", "\u202eevil\u2066\u2028", "a\nb\r\nc", "[bold]m[/]",
    "</td><script>x</script>", "../../etc/passwd", "/", ".", "..", "~", "~x", "%s%n{0}",
    "é" * 40, "\U0001f4a9", "\ufeff", "'\"\\`$(id)", "layer-4000000000", "layer-٣",
    "-1", "1e999", "nan", "²", "Infinity", "A" * 300, "(" * 200, "." * 200,
    "\x9b31m", "__metadata__", "file:///etc/passwd",
)  # fmt: skip
LONG_TEXTS = ("A" * 5000, "(" * 3000, "a." * 2000, "é" * 30_000, "[" * 60_000, "▁" * 20_000)
# Written into JSON as they are: no value of Python's stands for them.
RAW_JSON = ("1e999", "-1e999", "1e-999", "NaN", "Infinity", "-Infinity", "-0", "9" * 400,
            "9" * 5000, "0.0000000001", "[" * 500 + "]" * 500, "[" * 30_000,
            '{"a":' * 400 + "1" + "}" * 400,
            '"\\ud800"', '"\\udc00\\u0000"', '"\\u001b[2J"', "truefalse", "'a'", "")  # fmt: skip
VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0,
          1e308, 5e-324, [], {}, [[]], [None], {"": None}, "", "x", [1, "a", None, 2.5],
          [0] * 1000)  # fmt: skip
_RAW = "@raw:"
# Readers are tried on small files.
LARGEST_BYTES = 1 << 20


class Chaos:
    """Changes some of what passes through it.

    Attributes:
        random: Where its choices come from.
    """

    def __init__(self, source: random.Random, *, sound: bool = False) -> None:
        """Draw how much is changed; nothing at all if it is to be `sound`."""
        self.random = source
        # One input has a change or two, the next one many; some have none but those of bytes.
        self._rate = 0.0 if sound else source.choice((0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1))
        self._has_repeated = False
        self._damage_rate = 0.0 if sound else 0.25 if self._rate else 0.95

    def strikes(self, times: float = 1.0) -> bool:
        """Whether to change this part."""
        return self._rate > 0 and self.random.random() < self._rate * times

    def number(self, value: int, bits: int = 64, *, signed: bool = False) -> int:
        """A number, maybe another one, that fits into `bits`."""
        if self.strikes():
            draw = self.random.random()
            if draw < 0.4:
                value = self.random.choice(EDGES)
            elif draw < 0.6:
                value += self.random.choice((-8, -4, -1, 1, 4, 8))
            elif draw < 0.8:
                value ^= 1 << self.random.randrange(bits)
            elif draw < 0.9:
                value *= self.random.choice((2, 3, 1000, 1 << 20))
            else:
                value = self.random.getrandbits(bits)
        value &= (1 << bits) - 1
        return value - (1 << bits) if signed and value >> (bits - 1) else value

    def shape(self, sizes: Sequence[int], bits: int = 63) -> list[int]:
        """Sizes of a tensor, maybe such that there is nothing in it and yet no end to it."""
        found = self.items([self.number(size, bits) for size in sizes])
        if self.strikes(0.5):
            found = self.random.sample([0, 1 << 31, 1 << 40, (1 << 62) + 1], 3)
        return found

    def pick(self, value: Value, others: Sequence[Value]) -> Value:
        """A value, maybe one of `others`."""
        return self.random.choice(others) if self.strikes() else value

    def odd(self, value: Value, others: Sequence[Value]) -> Value:
        """A value, in four inputs of ten one of `others`."""
        is_odd = self._damage_rate > 0 and self.random.random() < 0.4
        return self.random.choice(others) if is_odd else value

    def text(self, value: str) -> str:
        """A text, maybe another one."""
        if not self.strikes():
            return value
        draw = self.random.random()
        if draw < 0.45:
            return self.random.choice(HOSTILE_TEXTS)
        if draw < 0.5:
            return self.random.choice(LONG_TEXTS)
        at = self.random.randint(0, len(value))
        if draw < 0.7:
            return value[:at]
        if draw < 0.8:
            return value[at:] + value[:at]
        if draw < 0.9:
            return re.sub(r"\d+", lambda _: str(self.random.choice(EDGES)), value, count=1)
        return value[:at] + self.random.choice(HOSTILE_TEXTS) + value[at:]

    def items(self, values: Sequence[Value]) -> list[Value]:
        """A sequence, maybe with some of it gone, twice, elsewhere or repeated without end."""
        found = list(values)
        if not found or not self.strikes(2):
            return found
        at = self.random.randrange(len(found))
        draw = self.random.random()
        if draw < 0.35:
            del found[at]
        elif draw < 0.65:
            found.insert(self.random.randint(0, len(found)), found[at])
        elif draw < 0.85:
            self.random.shuffle(found)
        else:
            # Once an input: a list of lists of lists of a hundred each has no end.
            count = self.random.choice((1, 10, 100))
            found += [found[at]] * (1 if self._has_repeated else count)
            self._has_repeated |= count > 1
        return found

    def tree(self, value: Any, depth: int = 0) -> Any:
        """A value of JSON, maybe with parts of it replaced, gone, doubled or nested deeply."""
        if self.strikes(0.6):
            return self._other(value, depth)
        match value:
            case dict():
                pairs = self.items(list(value.items()))
                return {self.text(key): self.tree(one, depth + 1) for key, one in pairs}
            case list() | tuple():
                # Of a long list the first: each costs time.
                few = [self.tree(one, depth + 1) for one in value[:40]]
                return self.items([*few, *value[40:]])
            case str():
                return self.text(value)
            case bool() | None | bytes():
                return value
            case int():
                return self.number(value, 64, signed=value < 0)
            case float() if self.strikes():
                return self.random.choice((0.0, -1.0, 1e308, 5e-324, float("inf"), float("nan")))
        return value

    def _other(self, value: Any, depth: int) -> Any:
        draw = self.random.random()
        if draw < 0.35:
            return self.random.choice(VALUES)
        if draw < 0.5:
            return _RAW + self.random.choice(RAW_JSON)
        if draw < 0.6:
            return str(value)[:1000]
        if draw < 0.7:
            return [value]
        if draw < 0.8:
            return {"a": value}
        if draw < 0.9:
            for _ in range(self.random.choice((3, 70, 130, 300))):
                value = [value]
            return value
        return self.random.choice(HOSTILE_TEXTS)

    def json(self, value: Any) -> bytes:
        """A value as JSON, after `tree`, with keys that are there twice."""
        text = to_json(self.tree(value))
        if self.strikes(0.5):
            keys = re.findall(rb'"[^"\\]{1,40}": ', text)
            if len(keys) > 1:
                one, other = self.random.sample(keys, 2)
                text = text.replace(one, other)
        return text

    def bytes(self, data: bytes, other: bytes = b"") -> bytes:
        """A file, maybe damaged: cut, flipped, with a part moved, repeated or of another file."""
        if self.random.random() < self._damage_rate:
            for _ in range(self.random.choice((1, 1, 1, 2, 4, 16))):
                data = self._damage(data, other)
                if len(data) > LARGEST_BYTES:  # a part repeated fiftyfold, and again, and again
                    break
        return data

    def _damage(self, data: bytes, other: bytes) -> bytes:
        if not data:
            return self.random.choice((b"\0", b"{", b"PK\3\4", other[:100]))
        at, draw = self.random.randrange(len(data)), self.random.random()
        # The beginning is where a format says what follows.
        if self.random.random() < 0.5:
            at = min(at, self.random.randrange(min(len(data), 128)))
        if draw < 0.3:
            flipped = data[at] ^ (1 << self.random.randrange(8))
            return data[:at] + bytes([flipped]) + data[at + 1 :]
        if draw < 0.45:
            return (
                data[:at]
                + self.random.choice((b"\0", b"\1", b"\x7f", b"\x80", b"\xff"))
                + data[at + 1 :]
            )
        if draw < 0.6:
            size = self.random.choice((2, 4, 8))
            number = self.random.choice(EDGES) & ((1 << 8 * size) - 1)
            return data[:at] + number.to_bytes(size, "little") + data[at + size :]
        if draw < 0.75:
            return data[:at]
        end = min(len(data), at + self.random.choice((1, 4, 16, 64, 256)))
        if draw < 0.82:
            return data[:at] + data[end:]
        if draw < 0.9:
            return data[:end] + data[at:end] * self.random.choice((1, 2, 50)) + data[end:]
        if draw < 0.97 and other:
            start = self.random.randrange(len(other))
            return data[:at] + other[start : start + end - at] + data[end:]
        return data + self.random.randbytes(self.random.choice((1, 4, 100)))


def to_json(value: Any) -> bytes:
    """JSON of any tree, with what `RAW_JSON` has in it as it stands."""
    text = json.dumps(value)
    return re.sub(
        rf'"{_RAW}((?:[^"\\]|\\.)*)"', lambda found: json.loads(f'"{found[1]}"'), text
    ).encode("utf-8", "surrogatepass")


def to_toml(value: dict[str, Any]) -> bytes:
    """TOML of a table of tables, lists and plain values: all of it inline, under quoted keys."""
    lines = [f"{json.dumps(str(key))} = {_inline(one)}" for key, one in value.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _inline(value: Any) -> str:
    match value:
        case dict():
            pairs = (f"{json.dumps(str(key))} = {_inline(one)}" for key, one in value.items())
            return "{" + ", ".join(pairs) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_inline, value)) + "]"
        case str() if value.startswith(_RAW):
            return value.removeprefix(_RAW)
        case bool() | str():
            return json.dumps(value)
        case None:
            return '""'
        case float():
            return repr(value)
    return str(value)
