"""measure_model and the hook on ranks of gloo: every sample once, one report, written by one of them."""

import os

import accelerate
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from nc_probe import measure_model
from nc_probe.integrations.epochs import EpochHook

K, N = 3, 29


def problem():
    torch.manual_seed(0)
    labels = torch.arange(N) % K
    dataset = TensorDataset(torch.randn(N, 5) + labels[:, None], labels)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, K)), dataset


def worker(rank, world, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model, dataset = problem()
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == world
    net, prepared = accelerator.prepare(model, DataLoader(dataset, batch_size=4, shuffle=True))
    dealt = DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, shuffle=True))
    numbers = [measure_model(*given).scalars() for given in ((net, prepared), (net, dealt), (model, prepared))]
    logged = []
    hook = EpochHook(net, dealt, path=f"{folder}/nc.jsonl", log=lambda found, epoch: logged.append(epoch))
    hook(0), hook(1)
    torch.save((numbers, len(logged), list(hook.reports)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.slow
def test_padded_loaders_on_several_ranks(tmp_path):
    world = 3
    mp.spawn(worker, (world, str(tmp_path)), nprocs=world)
    model, dataset = problem()
    expected = measure_model(model, DataLoader(dataset, batch_size=4)).scalars()
    assert expected["samples"] == N
    for rank in range(world):
        numbers, logged, epochs = torch.load(tmp_path / f"{rank}.pt")
        for found in numbers:
            assert found == pytest.approx(expected, rel=1e-6)
        assert logged == (2 if rank == 0 else 0) and epochs == [0, 1]
    assert len((tmp_path / "nc.jsonl").read_text().splitlines()) == 2
