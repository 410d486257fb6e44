"""Bytes of tensors that come and go, entered by name: how many there are at most, and when."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Bytes of the tensors that are there, by name; and what was there when they were most.

    Attributes:
        granule: an allocation is rounded up to its multiple: 512 bytes on a GPU (PyTorch's caching allocator).
        workspace: of what is there, and of what was there at the peak, the part that is made for one product alone.
        moments: the most there was in each part of the step, by its name.
    """

    granule: int = 512
    alive: dict[str, int] = field(default_factory=dict)
    passing: set[str] = field(default_factory=set)
    total: int = 0
    workspace: int = 0
    peak: int = 0
    workspace_at_peak: int = 0
    moment: str = ""
    moments: dict[str, int] = field(default_factory=dict)

    def hold(self, name: str, size: int, *, passing: bool = False) -> None:
        """A tensor of `size` bytes is made; `passing` counts it as workspace."""
        assert name not in self.alive, f"{name} is there already"
        if not size:
            return
        self.alive[name] = -(-size // self.granule) * self.granule
        self.total += self.alive[name]
        if passing:
            self.passing.add(name)
            self.workspace += self.alive[name]
        self._note(self.total, self.workspace)

    def free(self, *names: str) -> None:
        """The last name for each of these is gone. What was not held, or had no size, is passed over."""
        for name in names:
            size = self.alive.pop(name, 0)
            self.total -= size
            if name in self.passing:
                self.passing.remove(name)
                self.workspace -= size

    def free_layer(self, number: int, *, but: Collection[str] = ()) -> None:
        """All that is kept of a layer is gone."""
        self.free(*[name for name in self.alive if name.endswith(f" {number}") and name not in but])

    def touch(self, **sizes: int) -> None:
        """Tensors that are there for a moment, all at once, and count as workspace."""
        size = sum(-(-size // self.granule) for size in sizes.values()) * self.granule
        self._note(self.total + size, self.workspace + size)

    def _note(self, total: int, workspace: int) -> None:
        if total > self.moments.get(self.moment, 0):
            self.moments[self.moment] = total
        if total > self.peak:
            self.peak, self.workspace_at_peak = total, workspace

    @contextmanager
    def during(self, **sizes: int) -> Iterator[None]:
        """Tensors that are there for a while."""
        for name, size in sizes.items():
            self.hold(name, size, passing=True)
        yield
        self.free(*sizes)
