"""Text from others: whatever it is, one line of characters that can be seen is left."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import is_all

from fedq.text import LONGEST, clean

ANY = st.text(st.characters(exclude_categories=()), max_size=2 * LONGEST)


@given(ANY | st.binary(max_size=5 * LONGEST))
def test_what_is_left_is_one_printable_line_that_stays_as_it_is(text: str | bytes) -> None:
    cleaned = clean(text)
    assert cleaned.isprintable()
    assert len(cleaned) <= LONGEST
    assert clean(cleaned) == cleaned
    cleaned.encode()


def test_no_character_of_a_forbidden_category_is_left() -> None:
    for first in range(0, sys.maxunicode + 1, 64 if is_all() else 64 * 9):
        cleaned = clean("".join(map(chr, range(first, min(first + 64, sys.maxunicode + 1)))), 4000)
        found = {unicodedata.category(character) for character in cleaned} - {"Zs"}
        assert not found & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}, first
        assert set(cleaned) & {character for character in cleaned if character.isspace()} <= {" "}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain words, Größe 3 µm: 模型", "plain words, Größe 3 µm: 模型"),
        ("one\ntwo\r\n\tthree\u2028four\x85", "one two three four"),
        ("\x1b[2Jgone\x9b31m", r"\x1b[2Jgone\x9b31m"),
        ("a\u202eb\u2066c\u200bd\ufeffe", r"a\u202eb\u2066c\u200bd\ufeffe"),
        ("\ud800 \U000e0041 \ufe0f \u3164", r"\ud800 \U000e0041 \ufe0f \u3164"),
        (b"\xff\xfe ok", "\ufffd\ufffd ok"),
        (b"", ""),
    ],
)
def test_examples(text: str | bytes, cleaned: str) -> None:
    assert clean(text) == cleaned.replace(r"\U000e0041", "\\U000e0041")


def test_long_text_says_that_it_goes_on() -> None:
    assert clean("x" * LONGEST) == "x" * LONGEST
    assert clean("x" * (LONGEST + 1)) == "x" * (LONGEST - 3) + "..."
    assert clean("\x1b" * LONGEST).endswith("...")
    assert clean(b"x" * 10**7, 10) == "xxxxxxx..."
