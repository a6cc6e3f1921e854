"""Runs recipes/train.py again and again in every rank of one launch, as starting ranks takes longer than a short run.

    accelerate launch --multi_gpu --num_processes 2 launched_runs.py FILE

FILE holds a JSON list of runs, {"words": flags, "watched": whether, "stop": [rank, update] or null}. SIGTERM comes to
that rank, and to no other, as it makes that update. Rank r writes i-r.json beside FILE, what it has seen of run i: the
exit code, and if the run is watched, of each forward pass in training the classes of its images and the number that
their first pixel gives, which no augmentation may move.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import recipes.train
from recipes.imbalance.losses import Loss

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def run(words, *, watched, stop):
    """Exit code of a run, and what has been seen of it."""
    seen, updates = [], itertools.count(1)

    def note(module, inputs):
        cfg = getattr(module, "pretrained_cfg", None)  # of the model itself
        if cfg is not None and module.training:
            first = inputs[0][:, 0, 0, 0] * cfg["std"][0] + cfg["mean"][0]
            seen.append({"images": (255 * first).round().int().tolist()})
        if isinstance(module, Loss):
            seen[-1]["labels"] = inputs[1].tolist()

    def count(*_):
        if stop == [rank, next(updates)]:
            os.kill(os.getpid(), signal.SIGTERM)

    handles = [register_optimizer_step_post_hook(count)]
    if watched:  # else not, as a compiler would see it too
        handles.append(register_module_forward_pre_hook(note))
    code = recipes.train.main(words)
    for handle in handles:
        handle.remove()
    return {"code": code, "seen": seen}


path = Path(sys.argv[1])
for i, arguments in enumerate(json.loads(path.read_text())):
    AcceleratorState._reset_state(True)  # which a process keeps for good: device, ranks, compiler
    # A run ends by destroying its process group, and accelerate takes the one that there is. By themselves the ranks
    # would meet at the launcher's store, which keeps the addresses of the run before.
    meeting = f"file://{path.parent / f'{i}.meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    (path.parent / f"{i}-{rank}.json").write_text(json.dumps(run(**arguments)))
