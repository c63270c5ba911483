"""Vocabularies, hashes and title words whose codes are known."""

from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.vocabulary import Vocabulary, build_vocabulary, hash_code, title_codes, title_words

words_or_missing = st.lists(st.one_of(st.none(), st.text(max_size=5)))


def test_frequent_words_come_first_and_ties_in_order_of_the_text() -> None:
    vocabulary = build_vocabulary(pa.array(["b", "c", "a", "b", None, "", "c", "d"]), 10, 10)
    assert vocabulary.words == ["", "b", "c", "a", "d"]
    assert not vocabulary.hashed


def test_unknown_missing_and_empty_words_have_code_0() -> None:
    vocabulary = Vocabulary(["", "red", "blue"])
    assert vocabulary.encode(pa.array(["blue", "red", None, "", "green"])).tolist() == [2, 1, 0, 0, 0]


@pytest.mark.parametrize("words", [[], [None, None], [""]])
def test_a_vocabulary_without_words_knows_only_the_unknown(words: list[str | None]) -> None:
    vocabulary = build_vocabulary(pa.array(words, pa.string()), 10, 10)
    assert vocabulary.words == [""]
    assert vocabulary.encode(pa.array(["red", None])).tolist() == [0, 0]


def test_a_vocabulary_is_hashed_only_above_the_limit() -> None:
    words = pa.array(["a", "b", "c"])
    assert build_vocabulary(words, 3, 64).words == ["", "a", "b", "c"]
    hashed = build_vocabulary(words, 2, 64)
    assert hashed.hashed
    assert len(hashed) == 64
    assert len(set(hashed.words)) == 64  # so that weights can be moved by name
    assert not set(hashed.words[1:]) & set(Vocabulary.of_hashes(32).words)
    assert Vocabulary(list(hashed.words)) == hashed


def test_hashed_codes_are_those_of_the_words() -> None:
    hashed = build_vocabulary(pa.array(["a", "b", "c"]), 2, 64)
    codes = hashed.encode(pa.array(["b", None, "new", "b", ""]))
    assert codes.tolist() == [hash_code("b", 64), 0, hash_code("new", 64), hash_code("b", 64), 0]


@given(words_or_missing, st.integers(1, 20), st.integers(2, 30))
def test_codes_are_in_range_and_known_words_round_trip(words: list[str | None], hash_above: int, buckets: int) -> None:
    column = pa.array(words, pa.string())
    vocabulary = build_vocabulary(column, hash_above, buckets)
    codes = vocabulary.encode(column)
    assert codes.dtype == np.int64
    for word, code in zip(words, codes.tolist(), strict=True):
        if not word:
            assert code == 0
        elif vocabulary.hashed:
            assert 1 <= code < buckets
        else:
            assert vocabulary.words[code] == word


def test_a_hash_is_the_crc_and_does_not_depend_on_the_process() -> None:
    assert hash_code("red", 2**14) == 1 + zlib.crc32(b"red") % (2**14 - 1)
    code = "from rayrec.data.vocabulary import hash_code; print(hash_code('红色', 2**14))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(other.stdout) == hash_code("红色", 2**14)


def test_a_hash_takes_any_text() -> None:
    assert hash_code("\ud800", 2) == 1  # a lone surrogate, and the smallest table


def test_hashes_spread() -> None:
    codes = np.array([hash_code(f"brand {n}", 101) for n in range(10_000)])
    counts = np.bincount(codes, minlength=101)
    assert counts[0] == 0
    assert counts[1:].min() > 50
    assert counts[1:].max() < 150


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Strap top (1)", ["strap", "top", "1"]),
        ("OP T-shirt", ["op", "t", "shirt"]),
        ("Café CRÈME_brûlée", ["café", "crème", "brûlée"]),
        ("ПЛАТЬЕ красное", ["платье", "красное"]),
        ("连衣裙", ["连", "衣", "裙", "连衣", "衣裙"]),
        ("红", ["红"]),
        ("iPhone手机 128GB", ["iphone", "手", "机", "手机", "128gb"]),
        ("ワンピース", ["ワ", "ン", "ピ", "ー", "ス", "ワン", "ンピ", "ピー", "ース"]),
        ("Ｆｕｌｌ ｗｉｄｔｈ", ["full", "width"]),
        ("cafe\u0301", ["café"]),
        ("कुर्ता सूट", ["कुर्ता", "सूट"]),
        ("한국 신발", ["한국", "신발"]),
        ("!!! ---", []),
        ("", []),
    ],
)
def test_words_of_titles(title: str, expected: list[str]) -> None:
    assert title_words(title) == expected


@given(st.text())
def test_words_of_any_title_are_lower_case_and_not_empty(title: str) -> None:
    for word in title_words(title):
        assert word
        assert word == word.lower()


def test_codes_of_titles() -> None:
    codes = title_codes(["Red shoe", None, "shoe RED shoe", ""], 2**14)
    red, shoe = hash_code("red", 2**14), hash_code("shoe", 2**14)
    assert codes.values.tolist() == [red, shoe, shoe, red]
    assert codes.offsets.tolist() == [0, 2, 2, 4, 4]


@given(st.lists(st.one_of(st.none(), st.text(max_size=20)), max_size=10))
def test_codes_of_any_titles_are_in_range(titles: list[str | None]) -> None:
    codes = title_codes(titles, 16)
    assert len(codes) == len(titles)
    assert ((codes.values >= 1) & (codes.values < 16)).all()
