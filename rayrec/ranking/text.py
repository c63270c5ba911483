"""Search: which items a query means, by the words of their title, category and brand.

In: a catalogue, a query. Out: items with a score, best first. It must not know visitors. The index is Tantivy's, in
memory: BM25 over words as written, over their stems, and over pairs of characters for Chinese, Japanese and Korean,
which write no spaces (as Lucene's CJKAnalyzer does). A word may be misspelt by a letter, a long one by two.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
import pyarrow as pa
import tantivy
from tantivy import Filter, Occur, Query, TextAnalyzer, TextAnalyzerBuilder, Tokenizer

from rayrec.catalogue import Catalogue
from rayrec.ranking.retrieval import Floats, Ints

MAX_WORDS: Final = 32
LONGEST_WORD: Final = 40
MISSPELT_FROM, BADLY_FROM = 4, 8
"""Letters from which a word may be misspelt by one letter, and by two."""
STEM, FUZZY = 0.8, 0.3
"""What a match of the stem and of a misspelt word weigh beside one as written."""
HEAP_BYTES: Final = 64 << 20

_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+")


class TextIndex:
    """An index of one catalogue. It lives in memory and takes about a second for 50,000 items."""

    def __init__(self, catalogue: Catalogue) -> None:
        builder = tantivy.SchemaBuilder()
        builder.add_unsigned_field("row", fast=True, indexed=True)
        for name in ("words", "stems", "pairs"):
            builder.add_text_field(name, tokenizer_name=name)
        self._schema = builder.build()
        self._index = tantivy.Index(self._schema)
        self._words, self._stems = _analyzer(None), _analyzer("english")
        self._index.register_tokenizer("words", self._words)
        self._index.register_tokenizer("stems", self._stems)
        self._index.register_tokenizer("pairs", TextAnalyzerBuilder(Tokenizer.whitespace()).build())
        self._write(catalogue, np.arange(1, len(catalogue) + 1))

    def update(self, catalogue: Catalogue, row_R: Ints) -> None:
        """Read the items of these rows ([R] int64) anew. A search that is under way sees the old ones."""
        self._write(catalogue, row_R, again=True)

    def _write(self, catalogue: Catalogue, row_R: Ints, *, again: bool = False) -> None:
        writer = self._index.writer(HEAP_BYTES, 1)
        rows = catalogue.table.select(["title", "category", "brand"]).take(pa.array(row_R - 1))
        columns = [column.to_pylist() for column in rows.columns]
        for row, *parts in zip(row_R.tolist(), *columns, strict=True):
            if again:
                writer.delete_documents_by_query(Query.term_query(self._schema, "row", row))
            text = " ".join(part for part in parts if part).replace("|", " ")
            document = tantivy.Document()
            document.add_unsigned("row", row)
            spaced = _UNSPACED.sub(" ", text)
            document.add_text("words", spaced)
            document.add_text("stems", spaced)
            document.add_text("pairs", " ".join(_pairs(text, whole=True)))
            writer.add_document(document)
        writer.commit()
        writer.wait_merging_threads()
        self._index.reload()

    def search(self, query: str, n: int) -> tuple[Ints, Floats]:
        """The `n` best items for the query, best first ([M] int64), and their share of the best one's score ([M])."""
        found = self._index.searcher()
        hits = found.search(self._query(query), max(1, n), count=False).hits
        if not hits:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        rows = found.fast_field_values("row", [address for _, address in hits])
        score_M = np.array([score for score, _ in hits], np.float32)
        return np.array(rows, np.int64), score_M / score_M.max()

    def _query(self, query: str) -> Query:
        """Any of the words will do; an item that has more of them, and rarer ones, scores higher."""
        spaced = _UNSPACED.sub(" ", query)
        clauses = [self._word(word) for word in self._words.analyze(spaced)[:MAX_WORDS]]
        clauses += [self._term("stems", stem, STEM) for stem in self._stems.analyze(spaced)[:MAX_WORDS]]
        clauses += [self._term("pairs", pair) for pair in _pairs(query, whole=False)[:MAX_WORDS]]
        return Query.boolean_query([(Occur.Should, clause) for clause in clauses])

    def _word(self, word: str) -> Query:
        exact = self._term("words", word)
        if len(word) < MISSPELT_FROM:
            return exact
        letters = 2 if len(word) >= BADLY_FROM else 1
        fuzzy = Query.fuzzy_term_query(self._schema, "words", word, distance=letters)
        return Query.disjunction_max_query([exact, Query.boost_query(fuzzy, FUZZY)])

    def _term(self, field: str, term: str, weight: float = 1.0) -> Query:
        return Query.boost_query(Query.term_query(self._schema, field, term), weight)


def _analyzer(language: str | None) -> TextAnalyzer:
    builder = TextAnalyzerBuilder(Tokenizer.simple()).filter(Filter.remove_long(LONGEST_WORD))
    builder = builder.filter(Filter.lowercase()).filter(Filter.ascii_fold())
    return (builder.filter(Filter.stemmer(language)) if language else builder).build()


def _pairs(text: str, *, whole: bool) -> list[str]:
    """Pairs of neighbours in each run without spaces; a run of one is itself. whole: every character too.

    >>> _pairs("red 连衣裙", whole=False)
    ['连衣', '衣裙']
    """
    found: list[str] = []
    for run in _UNSPACED.findall(text):
        found += [run[at : at + 2] for at in range(len(run) - 1)]
        if whole or len(run) == 1:
            found += list(run)
    return found
