"""Runs recipes/train.py again and again in every rank of one launch, as starting ranks takes longer than a short run.

    accelerate launch --multi_gpu --num_processes 2 launched_runs.py FILE

FILE holds a JSON list of runs, {"words": flags, "stop": [rank, update] or null}: SIGTERM comes to that rank, and to no
other, as it makes that update. Rank r writes beside FILE what it has seen of run i, i-r.json: the exit code, and of each
forward pass in training the classes of its images and, if no augmentation moves it, the number in their first pixel.
"""

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
from recipes.losses import Loss

rank = int(os.environ["RANK"])
seen, updates, stop = [], [0], [None]


def note(module, inputs):
    cfg = getattr(module, "pretrained_cfg", None)  # of the model itself
    if cfg is not None and module.training:
        first = inputs[0][:, 0, 0, 0] * cfg["std"][0] + cfg["mean"][0]
        seen.append({"images": (255 * first).round().int().tolist()})
    if isinstance(module, Loss) and seen:
        seen[-1]["labels"] = inputs[1].tolist()


def count(*_):
    updates[0] += 1
    if stop[0] == [rank, updates[0]]:
        os.kill(os.getpid(), signal.SIGTERM)


register_module_forward_pre_hook(note)
register_optimizer_step_post_hook(count)
path = Path(sys.argv[1])
for i, run in enumerate(json.loads(path.read_text())):
    AcceleratorState._reset_state(True)  # which a process keeps for good: device, ranks, compiler
    # A run ends by destroying its process group, and accelerate takes the one that there is. By themselves the ranks
    # would meet at the launcher's store, which keeps the addresses of the run before.
    meeting = f"file://{path.parent / f'{i}.meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    updates[0], stop[0] = 0, run["stop"]
    seen.clear()
    code = recipes.train.main(run["words"])
    (path.parent / f"{i}-{rank}.json").write_text(json.dumps({"code": code, "seen": seen}))
