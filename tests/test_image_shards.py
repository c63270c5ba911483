"""What a task is handed of the pictures of a catalogue: its own part, and not the list of all."""

from __future__ import annotations

import pickle

import pyarrow.fs as pafs

from rayrec.config import ImageConfig
from rayrec.data.image_shards import BATCH, FOLDER, ImageDecoder, ImageRef, Packed
from rayrec.data.staging import Folder


def test_parts_come_back_as_they_were_packed() -> None:
    packed = pickle.loads(pickle.dumps(Packed([[1], [], ["two", 3]])))
    assert [packed[number] for number in range(len(packed))] == [[1], [], ["two", 3]]
    assert len(Packed([])) == 0


def test_a_task_does_not_unpickle_the_lists() -> None:
    refs = [ImageRef(f"i{n}", f"/shop/images/i{n}.jpg", FOLDER, FOLDER, 1, "/shop") for n in range(2 * BATCH + 1)]
    index = {ref.item_id: 1 + n for n, ref in enumerate(refs)}
    decoder = ImageDecoder("/shop", Folder(pafs.LocalFileSystem(), "/out"), ImageConfig(), refs, index)
    sent = pickle.loads(pickle.dumps(decoder))
    assert not vars(sent).keys() & {"refs", "spare", "strangers", "old"}
    assert sent.n_batches == decoder.n_batches == 3
    assert [row for number in range(3) for row in sent.batches[number]] == [(index[r.item_id], r, None) for r in refs]
