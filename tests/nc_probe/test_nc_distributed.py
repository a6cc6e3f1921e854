"""Ranks of gloo on the loopback: the report of all samples, however they are dealt out."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from nc_probe import ClassMoments, NCProbe, OODProbe
from timm_deq import Anderson, Equilibrium

K, d, N = 5, 8, 83


class Cell(nn.Module):
    """The nearer an eigenvalue is to 1, the longer the solve: samples need different numbers of steps."""

    def forward(self, z, x):
        return torch.linspace(0, 0.9, d, dtype=z.dtype) * torch.tanh(z + x)


class Model(nn.Module):
    """A stage, an equilibrium and a classifier of both."""

    def __init__(self):
        super().__init__()
        self.stage, self.fc = nn.Identity(), nn.Linear(d, K)
        self.layer = Equilibrium(Cell(), solver=Anderson(1e-9, 30))

    def forward(self, x):
        h = self.stage(x)
        return self.fc(h + self.layer(h - 1e4))


def problem():
    """Features far from the origin; class 4 has one sample."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(N - 1) % (K - 1), torch.tensor([K - 1])])
    x = 1e4 + torch.randn(K, d, generator=gen).double()[labels] + torch.randn(N, d, generator=gen).double()
    torch.manual_seed(0)
    return Model().double().eval(), x, labels


def probe_rank(rank, world, share, arguments, size=9):
    """The report of this rank's samples, padded by one duplicate."""
    model, x, labels = problem()
    mine = torch.arange(N)[share(rank, world)]
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    with torch.no_grad(), NCProbe(model, groups={"a": [0, 1], "b": [2, 3, 4]}, **arguments) as probe:
        for part in () if share is no_batch_but_for_one and not len(mine) else mine.split(size):
            index = torch.cat([part, torch.tensor([0])])
            model(x[index])
            probe.update(labels[index], mask=torch.arange(len(index)) < len(part))
    return probe


def stripes(rank, world):
    return slice(rank, None, world)


def everything_to_one(rank, world):
    return slice(None) if rank == world - 1 else slice(0, 0)


def no_batch_but_for_one(rank, world):
    return everything_to_one(rank, world)


PLACES = {"layers": ["stage"], "iterates": True, "conventions": ["papyan2020", "zhu2021", "fang2021", "rhubarbwu"]}
CASES = [
    (stripes, PLACES),
    (stripes, {"class_counts": [21, 21, 20, 20, 1], "cache_bytes": 0}),
    (stripes, {"center": "empirical"}),
    (everything_to_one, PLACES),
    (stripes, {"cache_bytes": d * 8, "spill_bytes": 10**6}),
    (stripes, {"cache_bytes": d * 8 * (N // 4), "spill_bytes": 0}),  # too few for some ranks or for all
    (no_batch_but_for_one, {"cache_bytes": d * 8, "spill_bytes": 0}),
    (no_batch_but_for_one, PLACES),
]


# What the first keeps is scored as known samples; the second keeps nothing, on the first rank or on none.
OOD_CASES = [{}, {"cache_bytes": d * 8 * (N // 4), "spill_bytes": 0}]


def leaves(value, path=""):
    """The numbers of a nested report by name."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {key: leaf for name, child in items for key, leaf in leaves(child, f"{path}/{name}").items()}


def ood_report(rank, world, arguments):
    """Samples of the classes again, and others, which the last rank alone shows."""
    probe = probe_rank(rank, world, stripes, arguments)
    _, x, labels = problem()
    gen = torch.Generator().manual_seed(1)
    unknown = 1e4 + torch.randn(21, d, generator=gen).double()
    with torch.no_grad(), OODProbe(probe) as ood:
        if arguments:
            for part in x[rank::world].split(10):
                probe.model(part)
                ood.update_known()
        for part in unknown.split(8) if rank == world - 1 else ():
            probe.model(part)
            ood.update()
    return ood.compute().as_dict()


def worker(rank, world, path, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    reports = []
    for share, arguments in CASES:
        probe = probe_rank(rank, world, share, arguments)
        before = len(list(probe.kept()))
        report, again = probe.compute(), probe.compute()
        assert report is again and len(list(probe.kept())) == before, "computing changes nothing"
        reports.append(report.as_dict(per_class=True))
    probe = probe_rank(rank, world, stripes, {"cache_bytes": 0})
    show_again(probe, rank, world)
    reports.append(probe.compute().as_dict(per_class=True))
    ood = [ood_report(rank, world, arguments) for arguments in OOD_CASES]
    alone = probe_rank(rank, world, stripes, {}).compute(sync=False).samples

    _, x, labels = problem()
    moments = ClassMoments(K, d).update(x[rank::world], labels[rank::world])
    # Of the first two ranks alone.
    pair = dist.new_group([0, 1])
    two = moments.sync(pair) if rank < 2 else moments
    # What an accelerator would have found without saying so yet: every rank hears of it.
    moments._bad[1] = 3 if rank == 0 else -1
    try:
        moments.sync()
    except ValueError as error:
        told = str(error)
    torch.save({"reports": reports, "ood": ood, "alone": alone, "told": told, "two": two.count}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def show_again(probe, rank, world):
    model = probe.model
    _, x, labels = problem()
    with torch.no_grad(), probe.second_pass():
        for i in torch.arange(N)[rank::world].split(7):
            model(x[i])
            probe.update(labels[i])


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_report_what_one_does(tmp_path, world):
    mp.spawn(worker, (world, str(tmp_path / "store"), str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for i, expected in enumerate(ranks[0]["reports"]):
        assert all(rank["reports"][i] == expected for rank in ranks), f"case {i}, to the last bit"
    assert sum(rank["alone"] for rank in ranks) == N and max(rank["alone"] for rank in ranks) == -(-N // world)
    assert {rank["told"] for rank in ranks} == {"features must be finite, got NaN or infinity in batch 3"}
    for i, arguments in enumerate(OOD_CASES):
        expected = ood_report(0, 1, arguments | ({"cache_bytes": 0} if arguments else {}))
        assert (expected["known"], expected["unknown"]) == (N, 21) and 0.5 < expected["auroc"]["mahalanobis"] < 1
        for got in (rank["ood"][i] for rank in ranks):
            assert got == ranks[0]["ood"][i], "to the last bit"
            got, known = leaves(got), leaves(expected)
            assert {k: v for k, v in got.items() if not isinstance(v, float)}.items() <= known.items()
            assert all(v == pytest.approx(known[k], rel=1e-10) for k, v in got.items() if isinstance(v, float))
    first = torch.bincount(torch.cat([problem()[2][rank::world] for rank in (0, 1)]), minlength=K)
    assert all(torch.equal(rank["two"], first) for rank in ranks[:2])
    for (_, arguments), got in zip([*CASES, (stripes, {})], ranks[0]["reports"], strict=True):
        whole = {k: v for k, v in arguments.items() if k not in ("cache_bytes", "spill_bytes")}
        expected = probe_rank(0, 1, stripes, whole, size=50).compute().as_dict(per_class=True)
        assert got["samples"] == N and sum(got["class_count"]) == N
        kept = "cache_bytes" not in arguments or arguments.get("spill_bytes")
        assert (got["nc4"] is not None) == (got["center_accuracy"] is not None) == bool(kept)
        if "iterates" in arguments:
            assert list(got["iterates"])[:3] == ["H0", "z1", "z2"] and len(got["iterates"]) > 6
        got, expected = leaves(got), leaves(expected)
        for name, value in got.items():
            if isinstance(value, float):
                # A mean of about 1e4 is rounded by 2e-12.
                assert value == pytest.approx(expected[name], rel=1e-10, abs=1e-11), name
            elif value is None:
                assert not kept or expected[name] is None, name
        assert len(got) > 100
