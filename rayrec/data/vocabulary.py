"""Words to codes: vocabularies with an unknown entry, hashing for huge ones, and the words of titles.

In: columns of text. Out: integer codes, 0 for unknown. It must not know what the words describe.
Hashes are CRC-32 of the UTF-8 text, the same on every machine and in every run.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.catalogue import Ragged

UNKNOWN = ""

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_MARKS = "\u0300-\u036f\u0900-\u0963\u0966-\u0e4e"  # accents and vowel signs, which \w leaves out, and their scripts
_CHUNK = re.compile(rf"[{_CJK}]+|(?:[^\W_{_CJK}]|[{_MARKS}])+")
_ASCII_WORD = re.compile("[a-z0-9]+")
_IS_CJK = re.compile(rf"[{_CJK}]")


@dataclass(frozen=True)
class Vocabulary:
    """The word of each code; code 0 is the unknown, "".

    In a hashed vocabulary each code has a name in place of a word, the same in every one of its size.
    """

    words: list[str]

    @classmethod
    def of_hashes(cls, buckets: int) -> Vocabulary:
        """A vocabulary of `buckets` codes, the unknown one included."""
        return cls([UNKNOWN, *(_bucket_name(code, buckets) for code in range(1, buckets))])

    @property
    def hashed(self) -> bool:
        """Whether codes are hashes of words rather than places in a list."""
        return len(self.words) > 1 and self.words[1] == _bucket_name(1, len(self.words))

    def __len__(self) -> int:
        """The number of codes, the unknown one included."""
        return len(self.words)

    def encode(self, words: pa.Array) -> npt.NDArray[np.int64]:
        """The code of each word ([N] string) in 0..len(self) - 1; null, "" and unknown words are 0. [N] int64."""
        if not self.hashed:
            place = pc.index_in(words, pa.array(self.words[1:], words.type))
            return pc.add(pc.fill_null(place, -1), 1).to_numpy(zero_copy_only=False).astype(np.int64)
        distinct = words.dictionary_encode()
        codes = [hash_code(word, len(self)) if word else 0 for word in distinct.dictionary.to_pylist()]
        place = pc.fill_null(distinct.indices, len(codes)).to_numpy(zero_copy_only=False)
        return np.array([*codes, 0], np.int64)[place]


def build_vocabulary(words: pa.Array, hash_above: int, hash_buckets: int) -> Vocabulary:
    """The vocabulary of `words` ([N] string): the most frequent first, equally frequent ones in order of the text.

    With more than `hash_above` different words, one of `hash_buckets` hashed codes.
    """
    counts = pa.table({"word": words}).group_by("word").aggregate([([], "count_all")])
    counts = counts.filter(pc.not_equal(counts["word"], UNKNOWN))
    if len(counts) > hash_above:
        return Vocabulary.of_hashes(hash_buckets)
    counts = counts.sort_by([("count_all", "descending"), ("word", "ascending")])
    return Vocabulary([UNKNOWN, *counts["word"].to_pylist()])


def _bucket_name(code: int, buckets: int) -> str:
    """Begins with a space, as no word of a trimmed column does."""
    return f" #{code} of {buckets}"


def hash_code(word: str, buckets: int) -> int:
    """A stable code of `word` in 1..buckets - 1."""
    return 1 + zlib.crc32(word.encode("utf-8", "replace")) % (buckets - 1)


def title_words(title: str) -> list[str]:
    """The words of a title, lower-cased: runs of letters and digits; of Chinese and Japanese, characters and pairs.

    >>> title_words("Mum's T-shirt, 红色连")
    ['mum', 's', 't', 'shirt', '红', '色', '连', '红色', '色连']
    """
    if title.isascii():  # most are, and this is three times as fast
        return _ASCII_WORD.findall(title.lower())
    words: list[str] = []
    for chunk in _CHUNK.findall(unicodedata.normalize("NFKC", title).lower()):
        if _IS_CJK.match(chunk):
            words += chunk
            words += map("".join, itertools.pairwise(chunk))
        else:
            words.append(chunk)
    return words


def title_codes(titles: Iterable[str | None], buckets: int) -> Ragged:
    """Hashed words of each title, each word once, in order; no codes for a missing title."""
    code_of: dict[str, int] = {}
    values: list[int] = []
    offsets = [0]
    for title in titles:
        for word in dict.fromkeys(title_words(title)) if title else ():
            code = code_of.get(word)
            if code is None:
                code = code_of[word] = hash_code(word, buckets)
            values.append(code)
        offsets.append(len(values))
    return Ragged(np.array(values, np.int64), np.array(offsets, np.int64))
