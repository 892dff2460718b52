from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study.lines import line_of, lines

TEXT = '''# a = 0
name = "x # no comment"   # tasks = [1]
purpose = """two
lines = 1, [not a table] and a \\""" quote"""
raw = \'\'\'
[neither]
\'\'\'
"quoted key" = 'it"s'
tasks = [  # all
    "digits",  # [arms]

    ["a", "]"],
]
point.x = 1
point . y = { z = [1, { w = 2 }], "é" = 3 }
tuning = { trials = 4, startup = 2 }
when = 2026-11-25 02:24:59

[table]
lr = 1e-3

[ table . inner ]
p = inf

[[arms]]
name = "A"
[arms.search]
lr = { low = 1e-3, high = 1 }

[[arms]]
name = "B"
[[arms.more]]
k = 1
[[arms.more]]
k = 2
'''


def paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [longer for key, each in inside for longer in ((*path, key), *paths(each, (*path, key)))]


def test_every_key_has_the_line_on_which_it_is():
    found = lines(TEXT)
    expected = set(paths(tomllib.loads(TEXT)))
    assert set(found) >= expected
    assert set(found) - expected == set()
    at = TEXT.splitlines()
    for path, line in found.items():
        name = path[-1] if isinstance(path[-1], str) else None
        if name is not None:
            assert name in at[line - 1], (path, line)
    assert found["tasks", 0] == 10
    assert found["tasks", 1, 1] == 12
    assert found["point", "y", "z", 1, "w"] == 15
    assert found["arms", 0, "search", "lr", "high"] == 28
    assert found["arms", 1, "name"] == 31
    assert found["arms", 1, "more", 1, "k"] == 35
    assert line_of(found, ("arms", 1, "search", "lr")) == 30
    assert line_of(found, ("seeds",)) is None
    assert line_of(found, ()) is None


_scalars = st.one_of(st.integers(-9, 9), st.booleans(), st.text("ab\"'#[]{}=,\\\n ", max_size=6))
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab. é", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def written(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)} = {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",\n # ], x = 1\n ".join(written(each) for each in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value)


@given(st.dictionaries(st.text("ab. é", max_size=3), _values, max_size=4))
def test_it_finds_the_keys_that_tomllib_finds(content):
    text = "\n".join(f"{written(key)} = {written(value)}" for key, value in content.items())
    assert tomllib.loads(text) == content
    assert set(lines(text)) == set(paths(content))


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing", "\r\na = 1\r\n[b]\r\nc = 2\r\n"])
def test_texts_of_little(text):
    assert set(lines(text)) == set(paths(tomllib.loads(text)))
