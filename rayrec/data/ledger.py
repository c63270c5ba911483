"""The ledger of cleaning: what became of every row, and the proof that none was lost.

In: counts by file. Out: the parts of `report.json`. It must not know why a row was rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass
class Account:
    """Rows of one file: read, collapsed into another, and rejected by reason. The rest is kept."""

    read: int = 0
    collapsed: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """What is left of the rows read."""
        return self.read - self.collapsed - self.rejected.total()

    def as_dict(self) -> dict[str, Any]:
        """As in `report.json`."""
        rejected = dict(sorted(self.rejected.items()))
        return {"read": self.read, "kept": self.kept, "collapsed": self.collapsed, "rejected": rejected}


@dataclass
class Ledger:
    """An account for each file, by the file's number, and the repairs that were made."""

    accounts: dict[int, Account] = field(default_factory=dict)
    repairs: Counter[str] = field(default_factory=Counter)

    def of(self, file: int) -> Account:
        """The account of one file."""
        return self.accounts.setdefault(file, Account())

    def collapse(self, files: npt.NDArray[np.int64]) -> None:
        """Count one collapsed row for each entry of `files` ([R] file numbers)."""
        for file, n in _counted(files):
            self.of(file).collapsed += n

    def reject(self, files: npt.NDArray[np.int64], reason: str) -> None:
        """Count one row rejected for `reason` for each entry of `files`."""
        for file, n in _counted(files):
            self.of(file).rejected[reason] += n

    def repair(self, repairs: Mapping[str, int]) -> None:
        """Count repairs; those of 0 are not mentioned."""
        self.repairs.update({what: int(n) for what, n in repairs.items() if n})

    def add(self, other: Ledger) -> None:
        """Add the counts of another ledger over the same files."""
        for file, account in other.accounts.items():
            mine = self.of(file)
            mine.read += account.read
            mine.collapsed += account.collapsed
            mine.rejected.update(account.rejected)
        self.repair(other.repairs)

    def total(self) -> Account:
        """All files together."""
        total = Account()
        for account in self.accounts.values():
            total.read += account.read
            total.collapsed += account.collapsed
            total.rejected.update(account.rejected)
        return total

    def report(self, names: list[str], kept: Mapping[int, int]) -> dict[str, Any]:
        """The section of `report.json` with every file, and the proof: `kept` (by file) is counted on its own.

        A row that was lost or counted twice is a bug of ours, and fails here.
        """
        for file, account in self.accounts.items():
            assert account.kept == kept.get(file, 0), (
                f"{names[file]}: read {account.read}, collapsed {account.collapsed}, "
                f"rejected {dict(account.rejected)}, yet {kept.get(file, 0)} rows were kept"
            )
        files = {name: self.accounts.get(file, Account()).as_dict() for file, name in enumerate(names)}
        return {**self.total().as_dict(), "files": files}


def merged(ledgers: Iterable[Ledger]) -> Ledger:
    """One ledger with the counts of all."""
    whole = Ledger()
    for ledger in ledgers:
        whole.add(ledger)
    return whole


def _counted(files: npt.NDArray[np.int64]) -> Iterable[tuple[int, int]]:
    numbers, counts = np.unique(files, return_counts=True)
    return zip(numbers.tolist(), counts.tolist(), strict=True)
