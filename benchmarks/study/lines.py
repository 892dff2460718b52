"""On which line of a TOML file each key is: Python's tomllib does not say."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable

Path = tuple[str | int, ...]

_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'",
    re.DOTALL,
)
_KEY = re.compile(r"[A-Za-z0-9_-]+|" + r'"(?:[^"\\\n]|\\.)*"' + r"|'[^'\n]*'")
_GAP = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")  # with comments, across lines
_PLAIN = re.compile(r"[^,\]}\n#]*")


def lines(text: str) -> dict[Path, int]:
    """The line, counted from 1, of every key, and of every entry of an array, of a text that tomllib can read.

    >>> lines("a = 1\\n[b]\\nc = [2,\\n 3]")
    {('a',): 1, ('b',): 2, ('b', 'c'): 3, ('b', 'c', 0): 3, ('b', 'c', 1): 4}
    """
    return _Reader(text).read()


def line_of(found: dict[Path, int], path: Path) -> int | None:
    """The line of a path, or of the longest beginning of it that has one."""
    while path:
        if path in found:
            return found[path]
        path = path[:-1]
    return None


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[Path, int] = {}
        self.entries: dict[Path, int] = {}  # an array of tables → how many there were so far

    def read(self) -> dict[Path, int]:
        table: Path = ()
        while self.skip(_BLANK) < len(self.text):
            if self.take("[["):
                table = self.header(self.keys())
                self.note(table)
                self.entries[table] = self.entries.get(table, -1) + 1
                table = (*table, self.entries[table])
                self.note(table)
                self.take("]]")
            elif self.take("["):
                table = self.header(self.keys())
                self.note(table)
                self.take("]")
            else:
                self.pair(table)
        return self.found

    def header(self, keys: list[str]) -> Path:
        """A table's path: an array of tables on the way stands for its last entry."""
        path: Path = ()
        for key in keys[:-1]:
            path = (*path, key)
            if path in self.entries:
                path = (*path, self.entries[path])
        return (*path, keys[-1])

    def pair(self, table: Path) -> None:
        path = table
        for key in self.keys():
            path = (*path, key)
            self.note(path)
        self.take("=")
        self.value(path)

    def keys(self) -> list[str]:
        keys = [self.key()]
        while self.take("."):
            keys.append(self.key())
        return keys

    def key(self) -> str:
        self.skip(_GAP)
        match = _KEY.match(self.text, self.at)
        assert match is not None, "tomllib has read this text"
        self.at = match.end()
        word = match.group()
        return str(tomllib.loads(f"x = {word}")["x"]) if word[0] in "\"'" else word

    def value(self, path: Path) -> None:
        self.skip(_GAP)
        if self.take("["):
            self.inside("]", lambda n: self.entry((*path, n)))
        elif self.take("{"):
            self.inside("}", lambda _: self.pair(path))
        else:
            match = _STRING.match(self.text, self.at) or _PLAIN.match(self.text, self.at)
            assert match is not None, "plain text may be empty"
            self.at = match.end()

    def entry(self, path: Path) -> None:
        self.note(path)
        self.value(path)

    def inside(self, end: str, read: Callable[[int], None]) -> None:
        n = 0
        while self.skip(_BLANK) < len(self.text) and not self.take(end):
            read(n)
            n += 1
            self.skip(_BLANK)
            self.take(",")

    def note(self, path: Path) -> None:
        # The first mention: a table may be named again by what is inside it.
        self.found.setdefault(path, self.text.count("\n", 0, self.at) + 1)

    def take(self, token: str) -> bool:
        self.skip(_GAP)
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def skip(self, what: re.Pattern[str]) -> int:
        match = what.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return self.at
