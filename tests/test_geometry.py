"""The simplex ETF against its definition: equal norms, equal angles, vectors that sum to zero."""

import pytest
import torch

from nc_probe import simplex_etf_gram
from nc_probe.geometry import simplex_etf_cosine


@pytest.mark.parametrize("K", [2, 3, 10, 100])
def test_gram_is_that_of_centred_unit_vectors(K):
    corners = torch.eye(K, dtype=torch.float64) - 1 / K
    corners /= corners.norm(dim=1, keepdim=True)
    torch.testing.assert_close(simplex_etf_gram(K), corners @ corners.T, rtol=0, atol=1e-14)
    assert simplex_etf_cosine(K) == pytest.approx(float(corners[0] @ corners[1]), abs=1e-14)


def test_rows_and_parts():
    whole = simplex_etf_gram(7)
    assert torch.equal(simplex_etf_gram(7, start=2, stop=5), whole[2:5])
    assert torch.equal(simplex_etf_gram(7, size=4), whole[:4, :4])
    assert torch.equal(simplex_etf_gram(7, size=4, start=1, stop=3), whole[1:3, :4])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: simplex_etf_gram(1), "num_classes must be at least 2, got 1"),
        (lambda: simplex_etf_gram(3, size=4), "size must be in 0..3, got 4"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
