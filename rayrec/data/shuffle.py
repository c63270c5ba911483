"""A keyed shuffle through files: each task writes one file of P batches, each partition reads its batch of every file.

In: tables and a partition for each row. Out: tables of one partition. It must not know what the rows mean.
Arrow's IPC file format lets a reader fetch one batch without the others, so that P times N pieces of data need only
N files; and nothing passes through the object store, so that memory stays bounded by one partition a task.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rayrec.history import Ints


def partition_of(key: pa.ChunkedArray | pa.Array, n_partitions: int) -> Ints:
    """The partition of each row by its text key (null: 0); the same on every machine. [R] int64."""
    column = key.combine_chunks() if isinstance(key, pa.ChunkedArray) else key
    distinct = column.dictionary_encode()
    words = distinct.dictionary.cast(pa.binary()).to_pylist()
    of_word = np.array([zlib.crc32(word) % n_partitions for word in words] + [0], np.int64)
    return of_word[pc.fill_null(distinct.indices, len(words)).to_numpy(zero_copy_only=False)]


def write_partitions(fs: pafs.FileSystem, path: str, table: pa.Table, partition_R: Ints, n_partitions: int) -> None:
    """Write the rows of `table` as `n_partitions` batches, in order within each."""
    order = np.argsort(partition_R.astype(np.uint16), kind="stable")
    ends = np.cumsum(np.bincount(partition_R, minlength=n_partitions))
    batch = table.take(pa.array(order)).combine_chunks()
    rows = batch.to_batches()[0] if len(batch) else pa.RecordBatch.from_pylist([], batch.schema)
    with fs.open_output_stream(path) as stream, pa.ipc.new_file(stream, table.schema) as file:
        for start, end in zip(np.r_[0, ends[:-1]], ends, strict=True):
            file.write_batch(rows.slice(start, end - start))


def read_partition(fs: pafs.FileSystem, paths: Iterable[str], partition: int) -> pa.Table:
    """The rows of one partition, in the order of `paths`; a column that some files lack is null there."""
    batches = []
    for path in paths:
        with fs.open_input_file(path) as stream:
            batches.append(pa.Table.from_batches([pa.ipc.open_file(stream).get_batch(partition)]))
    return pa.concat_tables(batches, promote_options="default").combine_chunks()


def write_table(fs: pafs.FileSystem, path: str, table: pa.Table) -> None:
    """Write a table as one Arrow file."""
    with fs.open_output_stream(path) as stream, pa.ipc.new_file(stream, table.schema) as file:
        file.write_table(table)


def read_table(fs: pafs.FileSystem, path: str, columns: list[str] | None = None) -> pa.Table:
    """Read what `write_table` wrote."""
    with fs.open_input_file(path) as stream:
        table = pa.ipc.open_file(stream).read_all()
    return table.select(columns) if columns else table
