"""Two ranks of gloo on the loopback: the report of all samples, however they are dealt out."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from nc_probe import ClassMoments, NCProbe

K, d, N = 5, 8, 83


def problem():
    """Features far from the origin; class 4 has one sample."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(N - 1) % (K - 1), torch.tensor([K - 1])])
    x = 1e4 + torch.randn(K, d, generator=gen).double()[labels] + torch.randn(N, d, generator=gen).double()
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(d, K)).double().eval(), x, labels


def probe_rank(rank, world, share, arguments):
    """The report of this rank's samples, padded by one duplicate."""
    model, x, labels = problem()
    mine = torch.arange(N)[share(rank, world)]
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    with torch.no_grad(), NCProbe(model, groups={"a": [0, 1], "b": [2, 3, 4]}, **arguments) as probe:
        for part in mine.split(9):
            index = torch.cat([part, torch.tensor([0])])
            model(x[index])
            probe.update(labels[index], mask=torch.arange(len(index)) < len(part))
    return probe


def stripes(rank, world):
    return slice(rank, None, world)


def everything_to_one(rank, world):
    return slice(None) if rank == world - 1 else slice(0, 0)


CASES = [
    (stripes, {}),
    (stripes, {"class_counts": [21, 21, 20, 20, 1]}),
    (stripes, {"center": "empirical"}),
    (everything_to_one, {}),
    (stripes, {"cache_bytes": 41 * d * 8}),  # the first rank has 42 samples, too many to keep
]


def leaves(value, path=""):
    """The numbers of a nested report by name."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {key: leaf for name, child in items for key, leaf in leaves(child, f"{path}/{name}").items()}


def worker(rank, world, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    reports = []
    for share, arguments in CASES:
        probe = probe_rank(rank, world, share, arguments)
        report, again = probe.compute(), probe.compute()
        assert report.as_dict() == again.as_dict(), "computing twice counts nothing twice"
        reports.append(report.as_dict(per_class=True))
    alone = probe_rank(rank, world, stripes, {}).compute(sync=False).samples

    _, x, labels = problem()
    moments = ClassMoments(K, d).update(x[rank::world], labels[rank::world])
    # What an accelerator would have found without saying so yet: every rank hears of it.
    moments._bad[1] = 3 if rank == 0 else -1
    try:
        moments.sync()
    except ValueError as error:
        told = str(error)
    torch.save({"reports": reports, "alone": alone, "told": told}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_report_what_one_does(tmp_path):
    mp.spawn(worker, (2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["reports"] == ranks[1]["reports"], "to the last bit"
    assert [rank["alone"] for rank in ranks] == [42, 41]
    assert {rank["told"] for rank in ranks} == {"features must be finite, got NaN or infinity in batch 3"}
    for (_, arguments), got in zip(CASES, ranks[0]["reports"], strict=True):
        expected = probe_rank(0, 1, stripes, {**arguments, "cache_bytes": 2**30}).compute().as_dict(per_class=True)
        assert got["samples"] == N and sum(got["class_count"]) == N
        if "cache_bytes" in arguments:
            assert got["nc4"] is None and got["center_accuracy"] is None and "absent" in got["nc4_source"]
        got, expected = leaves(got), leaves(expected)
        for name, value in got.items():
            if isinstance(value, float):
                assert value == pytest.approx(expected[name], rel=1e-10, abs=1e-14), name
            elif value is None:
                assert "cache_bytes" in arguments or expected[name] is None, name
        assert len(got) > 100
