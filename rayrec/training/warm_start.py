"""Start from another bundle's weights. In: a model, its catalogue and words, a bundle. Out: the model, changed.

Rows that belong to items, categories and brands are moved by name: the new data may number them anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rayrec.bundle import Bundle
from rayrec.catalogue import Catalogue
from rayrec.errors import UsageError

NAMED = {
    "item_encoder.id.weight": "items",
    "item_encoder.category.weight": "categories",
    "item_encoder.brand.weight": "brands",
}


def warm_start(model: nn.Module, catalogue: Catalogue, vocab: Mapping[str, Sequence[str]], bundle: Bundle) -> int:
    """Copy the bundle's weights into `model`. Returns how many items of the catalogue it knew.

    vocab: the words of "categories" and "brands" by code. Raises UsageError if the bundle's model has another shape.
    """
    names = {"items": catalogue.ids.tolist(), **vocab}
    before = {"items": bundle.catalogue.ids.tolist(), **{name: bundle.json(f"vocab/{name}.json") for name in vocab}}
    state = model.state_dict()
    for name, old in bundle.tensors().items():
        if name in state and name in NAMED:
            state[name] = moved(old, before[NAMED[name]], names[NAMED[name]], state[name])
        elif name in state and state[name].shape == old.shape:
            state[name] = old
        else:
            raise UsageError(
                f"--from {bundle.path}: its model has another shape ({name}); give the preset and settings it was "
                f"trained with (preset {bundle.config.preset}), or start without --from"
            )
    model.load_state_dict(state)
    known = set(before["items"])
    return sum(item_id in known for item_id in names["items"][1:])


def moved(old_RD: Tensor, old_names: Sequence[str], names: Sequence[str], fresh_RD: Tensor) -> Tensor:
    """`fresh_RD` with the row of each name that `old_names` has taken from `old_RD`; row 0 stays.

    Either tensor may end before its names do: a table has no rows for words that no item bears.
    """
    out_RD = fresh_RD.clone()
    place = {name: row for row, name in enumerate(old_names[: len(old_RD)]) if row}
    pairs = [(row, place[name]) for row, name in enumerate(names) if row and name in place and row < len(out_RD)]
    if pairs:
        row, source = torch.tensor(pairs).T
        out_RD[row] = old_RD[source].to(out_RD.device)
    return out_RD
