"""Workers that die, in place of a hang or a page of tracebacks."""

import os
import signal

import pytest
import torch
from torch.utils.data import Dataset

from recipes.images.workers import ImageLoader, WorkerDiedError, explain_dead_worker


@pytest.fixture(autouse=True, scope="module")
def impatient():
    """Torch looks every 5 seconds whether a worker is alive, and waits as long for one that has met an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


class Ending(Dataset):
    """Item 5 ends the process that asks for it."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((2,), item), item


@pytest.mark.parametrize("persistent", [False, True])
def test_a_killed_worker_is_one_line(persistent):
    loader = ImageLoader(Ending(), [[0, 1], [5, 2]], workers=1, pin_memory=False, persistent=persistent)
    with pytest.raises(WorkerDiedError) as raised:
        for _, labels in loader:
            assert labels.tolist() == [0, 1]
    message = str(raised.value)
    assert message.startswith("DataLoader worker (pid") and "\n" not in message
    assert message.endswith("allowed: fewer workers, or 0 to decode in the main process")


def test_torchs_words_are_known_anywhere_and_other_errors_pass():
    with pytest.raises(WorkerDiedError, match="signal: Bus error. .* shared memory: a process that"):
        with explain_dead_worker():
            raise RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared\nmemory. "
            )
    with pytest.raises(RuntimeError, match="^mat1 and mat2"), explain_dead_worker():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize(
    ("images", "ranks", "wanted"), [(4999, 1, 0), (5000, 1, 6), (5000, 4, 1), (5000, 9, 1), (10**6, 1, 6)]
)
def test_workers_are_as_many_as_processors_of_this_rank(monkeypatch, images, ranks, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    loader = ImageLoader([0] * images, [[0]], workers=None, pin_memory=False, persistent=True)
    assert loader.num_workers == wanted and loader.persistent_workers == (wanted > 0)
