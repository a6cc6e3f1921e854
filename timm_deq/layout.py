"""The memory layout of a state: a batch `(B, ...)` as rows `(B, D)` and back, without copies.

Rows never mix in a solve, so the order of the elements within a row is free: that in which they lie in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from timm_deq.solvers.base import is_tracing


class Layout(NamedTuple):
    """The order in which the elements of a sample follow each other in a row.

    Attributes:
        order: The dimensions but the first, slowest first; None for the order in which they are numbered.
    """

    order: tuple[int, ...] | None

    @classmethod
    def of(cls, z: Tensor) -> "Layout":
        """Return the layout of a state `(B, ...)`, as of channels_last; that of a contiguous one in recorded programs.

        A state with gaps or overlaps, as a slice or an expanded one has them, counts as contiguous: it is copied.
        """
        if is_tracing(z) or z.is_contiguous():
            return cls(None)
        order = tuple(sorted(range(1, z.ndim), key=lambda d: -z.stride(d)))
        return cls(order if z.permute(0, *order).is_contiguous() else None)

    def rows(self, z: Tensor) -> Tensor:
        """Return the rows `(B, D)` of a state `(B, ...)`: a view, if it has this layout."""
        return (z if self.order is None else z.permute(0, *self.order)).flatten(1)

    def state(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the state of a shape `(B, ...)` that has the given rows: a view."""
        if self.order is None:
            return rows.reshape(shape)
        permuted = rows.reshape(shape[0], *(shape[d] for d in self.order))
        return permuted.permute(0, *(self.order.index(d) + 1 for d in range(1, len(shape))))

    def arranged(self, z: Tensor) -> Tensor:
        """Return a state `(B, ...)` in this layout: a copy, if it has another."""
        return self.state(self.rows(z), z.shape)
