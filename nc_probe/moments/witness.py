"""A witness of rounding: whether float32 is enough for the sums of squares of a second look.

Some rows of every class are computed both ways. Where features vary far more outside of the span of class means than
inside, products of float32 lose what is inside; a bound that holds always would send all data to float64, for rounding
errors most often cancel. Of the differences D_i between the two squares P_i of each row,

    (|sum_i D_i| + 2 sqrt(sum_i D_i^2)) / sum_i P_i

estimates the relative error of the sum over as many rows, of the part that all rows share and of the part that averages
out; times the mean square of all deviations over that of the rows, which may have missed a few large ones. A class or a
group with fewer samples than rows is computed both ways as a whole.
"""

import bisect

import torch
from torch import Tensor

__all__ = ["ROWS", "TOLERANCE", "WitnessRows", "relative_error"]

# Computed both ways: rows of all classes together, and no fewer than one of each class up to twice as many classes.
ROWS = 512

# Relative error of NC1, and of variances, up to which float32 is used: half of what is promised.
TOLERANCE = 5e-7


class WitnessRows:
    """Rows spread over each class, gathered while all features pass by.

    Args:
        labels: (N,) of all features, in their order.
    """

    def __init__(self, labels: Tensor) -> None:
        order, n = labels.int().argsort(stable=True), torch.bincount(labels)  # half the numbers, half the time
        wanted = n.clamp(max=max(ROWS // max(int((n > 0).sum()), 1), 1))
        of = torch.arange(len(n)).repeat_interleave(wanted)
        turn = torch.arange(len(of)) - (wanted.cumsum(0) - wanted)[of]
        place = (turn * n[of] + wanted[of] - 1) // wanted[of]  # of each row wanted among those of its class
        chosen = order[(n.cumsum(0) - n)[of] + place].sort().values
        chosen = chosen[:: -(-len(chosen) // (2 * ROWS)) or 1]
        self.labels = labels[chosen]
        self._rows, self._chosen, self._found, self._start = chosen.tolist(), chosen, [], 0

    def show(self, features: Tensor) -> None:
        """Take the rows wanted out of the next batch (B, d)."""
        stop = self._start + len(features)
        first, last = (bisect.bisect_left(self._rows, row) for row in (self._start, stop))
        if first < last:
            self._found.append(features[self._chosen[first:last] - self._start])
        self._start = stop

    def features(self) -> Tensor | None:
        """Return the rows (n, d), once every batch has been shown; None if there are none."""
        return torch.cat(self._found) if self._found else None


def relative_error(sums: Tensor) -> Tensor:
    """Estimate the relative error of sums of squares.

    Args:
        sums: (n, 3) float64, of D_i, D_i^2 and P_i.

    Returns:
        (n,) as said above; 0 where all is 0.
    """
    difference, square, total = sums.unbind(1)
    error = difference.abs() + 2 * square.sqrt()
    return torch.where(error == 0, error, error / total)
