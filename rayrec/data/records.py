"""Where one CSV record ends and the next begins, even where quotes are broken.

In: bytes of CSV text and its number of columns. Out: record boundaries, and the text with each broken record marked.
It must not know what the columns mean. A quote that is never closed costs its own record, not the rest of the file.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

QUOTE, NEWLINE = ord('"'), ord("\n")
BROKEN_QUOTE = "broken_quote"

_FIELD = rb'(?:"(?:[^"]|"")*"|[^",\r\n][^,\r\n]*|)'
_MARK = b"\x00"


@lru_cache
def _record(n_columns: int) -> re.Pattern[bytes]:
    return re.compile(_FIELD + rb"(?:," + _FIELD + rb"){%d}\r?" % (n_columns - 1))


_ANY_RECORD = re.compile(_FIELD + rb"(?:," + _FIELD + rb")*\r?")


def next_boundary(window: bytes, n_columns: int, sure: int = 2) -> int:
    """The place in `window` just after a newline that surely ends a record; -1 if there is none.

    Sure means that the line before and the `sure` lines after are whole records of `n_columns` fields: a newline
    inside a quoted text is told from one between records without reading the file from its start. Only a quoted
    text whose own lines look like whole records can deceive it. Where no place is sure, the first newline is taken.
    """
    lines = window.split(b"\n")
    whole = [_record(n_columns).fullmatch(line) is not None for line in lines]
    place = len(lines[0]) + 1
    for n in range(1, len(lines) - 1 - sure):
        place += len(lines[n]) + 1
        if all(whole[n : n + 1 + sure]):
            return place
    return window.find(b"\n") + 1 or -1


def mark_broken_records(text: bytes, n_columns: int) -> tuple[bytes, list[bytes]]:
    """Replace each record whose quotes are broken by a mark that no parser takes for a record.

    Returns the text, in which every record but the marked ones can be parsed on its own, and the marked records in
    their order. `is_mark` knows a mark again. A record over several lines is sound if its quotes close and it has
    `n_columns` fields.
    """
    suspects = _suspect_lines(text)
    if not len(suspects):
        return text, []
    lines = text.split(b"\n")
    broken: list[bytes] = []
    odd = {int(line) for line in suspects if lines[line].count(b'"') % 2}
    odd_order = sorted(odd)
    mark = _MARK if n_columns > 1 else _MARK + b"," + _MARK
    done = -1
    for line in suspects.tolist():
        if line <= done or _ANY_RECORD.fullmatch(lines[line]):
            continue
        if line in odd:
            place = odd_order.index(line) + 1 if len(odd_order) < 64 else _bisect(odd_order, line)
            if place < len(odd_order):
                closing = odd_order[place]
                if _record(n_columns).fullmatch(b"\n".join(lines[line : closing + 1])):
                    done = closing
                    continue
        broken.append(lines[line])
        lines[line] = mark
    return b"\n".join(lines), broken


def is_mark(text: str) -> bool:
    """Whether an unparsable row's text is the mark of a broken record."""
    return text.rstrip("\r\n").strip(",").startswith("\x00")


def _bisect(order: list[int], line: int) -> int:
    return int(np.searchsorted(order, line, side="right"))


def _suspect_lines(text: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Numbers of the lines where some quote neither opens, closes nor escapes, or whose quotes are odd in number."""
    raw = np.frombuffer(text, np.uint8)
    quote_Q = np.flatnonzero(raw == QUOTE)
    if not len(quote_Q):
        return np.empty(0, np.int64)
    line_Q = np.searchsorted(np.flatnonzero(raw == NEWLINE), quote_Q)
    first_Q = np.r_[True, line_Q[1:] != line_Q[:-1]]
    start_Q = np.maximum.accumulate(np.where(first_Q, np.arange(len(quote_Q)), 0))
    opens_Q = (np.arange(len(quote_Q)) - start_Q) % 2 == 0
    before_Q = np.where(quote_Q > 0, raw[quote_Q - 1], NEWLINE)
    after_Q = np.where(quote_Q + 1 < len(raw), raw[np.minimum(quote_Q + 1, len(raw) - 1)], NEWLINE)
    sound_Q = np.where(opens_Q, np.isin(before_Q, list(b',\n"')), np.isin(after_Q, list(b',\n\r"')))
    last_Q = np.r_[first_Q[1:], True]
    return np.unique(line_Q[~sound_Q | (last_Q & opens_Q)])
