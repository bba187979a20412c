from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatminima.study.toml_lines import TomlLines

TEXT = '''# a comment
a = 1
"q u".b = [
  1, # x ]
  2,
]
s = """
[no]
x = 1
"""

[t.u]
k = {a = 1, b = {c = 2}}
[[m]]
n = 1
[m.options]
z = 3
[[m]]
n = 2
[[m.deep]]
w = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 2), (("q u", "b"), 3), (("q u", "b", 1), 3), (("s",), 7), (("t", "u", "k"), 13),
        (("t", "u", "k", "b", "c"), 13), (("t", "u", "none"), 12), (("m",), 14), (("m", 0, "n"), 15),
        (("m", 0, "options", "z"), 17), (("m", 1), 18), (("m", 1, "n"), 19), (("m", 1, "deep", 0, "w"), 21),
        (("nowhere",), 1), ((), 1),
    ],
)  # fmt: skip
def test_lines_of_every_kind_of_entry(path: tuple[str | int, ...], line: int) -> None:
    assert TomlLines(TEXT).line(path) == line


def test_windows_line_ends() -> None:
    assert TomlLines(TEXT.replace("\n", "\r\n")).line(("m", 1, "deep", 0, "w")) == 21


@given(st.lists(st.tuples(st.text(string.ascii_lowercase, min_size=1), st.integers(0, 3)), unique_by=lambda t: t[0]))
def test_line_of_a_key_whatever_stands_between(keys: list[tuple[str, int]]) -> None:
    rows, expected = [], {}
    for name, blanks in keys:
        rows += ["# [comment]"] * blanks
        rows.append(f"{name} = [")
        expected[name] = len(rows)
        rows += ["  '''", "[not.a.table]", "''',", "]"]
    toml = TomlLines("\n".join(rows))
    assert {name: toml.line((name,)) for name in expected} == expected
