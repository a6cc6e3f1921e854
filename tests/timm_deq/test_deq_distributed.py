"""Two ranks of gloo on the loopback: the gradients of one process, however model and batch are dealt out.

A rank differentiates the mean loss of its half of the batch; DistributedDataParallel and FSDP2 average the gradients
over the ranks, which makes them those of the mean loss of the whole. The first half is the harder one, so one rank
evaluates its cell more often than the other: nothing inside a solve may wait for the other rank.
"""

import warnings
from contextlib import nullcontext
from datetime import timedelta

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from timm_deq import Equilibrium, SolveLog
from timm_deq.models._factory import GRADIENTS

SOLVERS = {"shine": "broyden", "reversible": "reversible"}  # what these need; anderson for the others
SHARDED = {  # the modules sharded by themselves, beside the whole model
    "root": [],
    "stages": ["layer1", "layer2", "layer3", "layer4"],
    "equilibrium": ["layer4.equilibrium"],
}
CASES = [(spread, parts) for spread in ("ddp", *SHARDED) for parts in (1, 2)]
CELL = "layer4.equilibrium.cell"
REFUSED = {"cell": [CELL], "cell.branch": [f"{CELL}.branch"], "cell in a sharded layer": [CELL, "layer4.equilibrium"]}


def problem(gradient):
    """A model in eval mode, as batch statistics would differ between ranks, eight images and their labels."""
    torch.manual_seed(0)
    model = timm.create_model(
        "deq_resnet8_cifar",
        num_classes=4,
        zero_init_last=False,  # else the encoder's branches have no gradient to compare
        gradient=gradient,
        solver=SOLVERS.get(gradient, "anderson"),
        tol=1e-7,
        max_steps=90,
    )
    images = torch.randn(2, 4, 3, 16, 16).double() * torch.tensor([3, 12]).view(2, 1, 1, 1, 1)
    return model.double().eval(), images.flatten(0, 1), torch.arange(8) % 4


def shard(model, names):
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def differentiate(model, images, labels, parts):
    """Back-propagates the mean loss in micro-batches; the gradients are averaged over the ranks after the last."""
    ddp = isinstance(model, DistributedDataParallel)
    for part, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), start=1):
        if not ddp:
            model.set_requires_gradient_sync(part == parts)
        with model.no_sync() if ddp and part < parts else nullcontext():
            (F.cross_entropy(model(x), y) / parts).backward()
    return [p.grad if ddp else p.grad.full_tensor() for p in model.parameters()]


def worst(got, expected):
    """The largest relative error; NaN if there is one, or a gradient that is zero."""
    return torch.stack([(g - e).norm() / e.norm() for g, e in zip(got, expected, strict=True)]).max().item()


def refusals(names):
    """What a solve with these modules sharded says, and the constructor of a layer of the same cell."""
    model, images, _ = problem("phantom")
    shard(model, names)
    said = []
    for attempt in (lambda: model(images), lambda: Equilibrium(model.get_submodule(CELL))):
        with pytest.raises(ValueError) as error:
            attempt()
        said.append(str(error.value))
    return said


def worker(rank, path, out):
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # FSDP2 warns of what it may get wrong
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timeout)
    mine, errors = slice(4 * rank, 4 * rank + 4), {}
    for gradient in GRADIENTS:
        alone, images, labels = problem(gradient)
        F.cross_entropy(alone(images), labels).backward()
        expected = [p.grad for p in alone.parameters()]
        for spread, parts in CASES:
            model = problem(gradient)[0]
            model = DistributedDataParallel(model) if spread == "ddp" else shard(model, SHARDED[spread])
            errors[spread, parts, gradient] = worst(differentiate(model, images[mine], labels[mine], parts), expected)
    refused = {name: refusals(names) for name, names in REFUSED.items()}
    torch.save({"errors": errors, "refused": refused}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(out / "store"), str(out)), nprocs=2)
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.ddp
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("spread, parts", CASES)
def test_two_ranks_have_the_gradients_of_one_process(ranks, spread, parts, gradient):
    for rank in ranks:
        assert rank["errors"][spread, parts, gradient] < 1e-5


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_first_half_of_the_batch_takes_more_steps(gradient):
    model, images, _ = problem(gradient)
    with SolveLog(model) as log, torch.no_grad():
        model(images)
    first, second = log.steps.chunk(2)
    assert second.max() < first.max() < 90, "the comparison is of converged solves of different length"


@pytest.mark.ddp
@pytest.mark.parametrize("name", REFUSED)
def test_a_cell_sharded_by_itself_is_refused(ranks, name):
    part = name.split()[0]
    expected = f"cell must be sharded as part of its Equilibrium or of a module above, got {part} sharded alone"
    assert [rank["refused"][name] for rank in ranks] == [[expected] * 2] * 2
