"""Deviations from class means by blocks, against one subtraction."""

import pytest
import torch

from nc_probe.moments.blocks import block_rows, deviations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 20, 64, None])
def test_blocks_are_the_whole(dtype, rows):
    gen = torch.Generator().manual_seed(0)
    x, means = torch.randn(60, 5, generator=gen).to(dtype), torch.randn(4, 5, generator=gen).double()
    labels, before = torch.randint(0, 4, (60,), generator=gen), x.clone()
    blocks = [(y.clone(), of) for y, of in deviations(x, labels.int(), means, rows=rows)]
    assert torch.equal(torch.cat([y for y, _ in blocks]), x.double() - means[labels])
    assert torch.equal(torch.cat([of for _, of in blocks]), labels) and torch.equal(x, before)
    assert max(len(of) for _, of in blocks) <= (rows or 60)
    assert list(deviations(x[:0], labels[:0], means, rows=rows)) == []


def test_blocks_share_their_memory():
    x, means = torch.ones(9, 5), torch.zeros(1, 5).double()
    assert len({y.data_ptr() for y, _ in deviations(x, torch.zeros(9).long(), means, rows=2)}) == 1
    assert block_rows(torch.device("cpu"), 512) * 512 * 8 == 2**20
    assert block_rows(torch.device("cpu"), 10**6) > 1
