"""Runs that are interrupted, by whatever it may be, and go on to the numbers of one that is not."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from few_digits import save_few_digits
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from recipes.train import main
from recipes.training import state
from recipes.training.checkpoint import write_tensors, write_text
from recipes.training.integrity import seal
from recipes.training.state import Progress, States, pack, unpack

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

ROOT = Path(__file__).parents[2]
SETTINGS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Flags of a run that draws random numbers all the time, of 6 updates an epoch, on a few digits of four classes."""
    folder = save_few_digits(tmp_path_factory.mktemp("data") / "few", train=12, test=5)
    data = f"--dataset {folder} --imbalance balanced --val_fraction 0.25 --img_size 16 --crop_pct 1"
    data += " --cutout 4 --hflip 0.5 --mixup_alpha 0.4 --cutmix_alpha 1 --mix_prob 0.8"
    model = "--classifier cosine --loss focal --reweight_epoch 1"
    model += " --model test_resnet --model_args.drop_rate 0.3 --ema_decay 0.5 --clip_grad 1 --lr 0.05"
    loop = "--epochs 2 --batch_size 6 --gradient_accumulation_steps 2 --probe_every 0 --select best --log_every 4"
    return [*data.split(), *model.split(), *loop.split()]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert main(["--output", str(folder), *words]) == 0
    return folder


def without(content, *names):
    return {key: value for key, value in content.items() if key not in names}


TIMES = ("seconds", "images_per_second", "peak_memory_mib")


def numbers(folder):
    """All that a finished run has measured and learnt, but for times."""
    records = [without(json.loads(line), *TIMES) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = without(json.loads((folder / "results.json").read_text()), "seconds")
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes()]
    last = max((folder / "states").iterdir(), key=lambda path: path.name)
    weights += [(last / name).read_bytes() for name in ("state.safetensors", "rank-0.safetensors")]
    return records, results, weights


@pytest.fixture
def after_update():
    """Registers what is done right after the n-th update of the optimizer in this process, once."""
    handles = []

    def register(n, deed):
        count = [0]

        def hook(*_):
            count[0] += 1
            if count[0] == n:
                deed()

        handles.append(register_optimizer_step_post_hook(hook))

    yield register
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("update", "number"), [(8, signal.SIGTERM), (6, signal.SIGINT)])
def test_a_signal_ends_the_run_after_the_update_and_it_goes_on(
    words, straight, tmp_path, capsys, after_update, update, number
):
    folder, before = tmp_path / "x", signal.getsignal(number)
    after_update(update, lambda: os.kill(os.getpid(), number))
    assert main(["--output", str(folder), *words]) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert signal.getsignal(number) is before
    where = {8: "epoch 2, update 2", 6: "epoch 1"}[update]
    message = f"stopped by {number.name}; last good checkpoint: {folder / 'states' / f'{update:08d}'} ({where})"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert not (folder / "results.json").exists()

    assert main(["--output", str(folder), "--resume", "auto", *words]) == 0
    assert numbers(folder) == numbers(straight)


def test_auto_starts_a_run_and_leaves_one_that_has_finished_alone(words, straight, tmp_path, capsys):
    folder = tmp_path / "x"
    assert main(["--output", str(folder), "--resume", "auto", *words, "--epochs", "0"]) == 0
    assert json.loads((folder / "results.json").read_text())["selected"]["epoch"] == 0
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    assert main(["--output", str(straight), "--resume", "auto", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run folder       {straight} (had finished)"
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_given_checkpoint_starts_a_new_folder_or_takes_its_run_back(words, straight, tmp_path):
    copy = shutil.copytree(straight, tmp_path / "copy")
    first = copy / "states" / "00000006"
    # Later epochs are forgotten, and what a kill may have left is swept away.
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "train_')
    for name in (".00000009.draft", "../.checkpoint.draft"):
        (copy / "states" / name).mkdir()
        (copy / "states" / name / "model.safetensors").write_bytes(b"half")
    expected = sorted(path.relative_to(straight) for path in straight.rglob("*"))
    for output in (tmp_path / "fork", copy):
        assert main(["--output", str(output), "--resume", str(first), *words]) == 0
        assert numbers(output) == numbers(straight)
        assert sorted(path.relative_to(output) for path in output.rglob("*")) == expected
    assert main(["--output", str(copy), "--resume", str(straight / "states" / "00000006"), *words]) == 2


def test_the_latest_checkpoints_and_that_of_the_best_epoch_are_kept(words, tmp_path):
    flags = "--epochs 3 --keep_checkpoints 2 --checkpoint_every 4".split()
    assert main(["--output", str(tmp_path / "x"), *words, *flags]) == 0
    best = json.loads((tmp_path / "x" / "results.json").read_text())["selected"]["epoch"]
    kept = {path.name for path in (tmp_path / "x" / "states").iterdir()}
    assert kept == {"00000016", "00000018", f"{6 * best:08d}"} and best < 3


def test_only_safe_files_are_written(straight):
    names = {path.name for path in straight.glob("states/*/*")}
    assert names == {"state.json", "state.safetensors", "rank-0.json", "rank-0.safetensors"}
    newest = straight / "states" / "00000012"
    with safe_open(newest / "state.safetensors", "pt") as file:
        assert any("momentum_buffer" in name for name in file.keys())  # noqa: SIM118 - not a dict
    assert json.loads((newest / "state.json").read_text())["progress"]["records"][2]["epoch"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 0.25 --momentum 0.5", "had other settings: lr 0.05, now 0.25; momentum 0.9, now 0.5; allowed: the same"),
        ("--model_args.drop_rate 0.2", "model_args {'drop_rate': 0.3}, now {'drop_rate': 0.2}"),
        ("--resume {run}/states/00000007", "00000007' is no checkpoint: "),
        ("--resume {run}", "' is no checkpoint: "),
        ("--output {run}/states", "exists and has no config.yaml; allowed: the folder of a run"),
        ("--output {run}/results.json", "exists and has no config.yaml; allowed: the folder of a run"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_what_was_there(words, straight, capsys, flags, message):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    given = flags.format(run=straight).split()
    assert main(["--output", str(straight), "--resume", "auto", *words, *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_other_images_or_ranks_are_refused(words, straight, tmp_path, capsys):
    copy = shutil.copytree(straight, tmp_path / "copy")
    (copy / "results.json").unlink()
    path = copy / "states" / "00000012" / "state.json"
    whole = json.loads(path.read_text())
    for change, message in (
        ({"manifest": "0" * 64}, "which was 000"),
        ({"conditions": whole["conditions"] | {"ranks": 2}}, "ranks 2, now 1"),
    ):
        path.unlink()
        changed = {key: value for key, value in (whole | change).items() if key not in ("files", "sha256")}
        path.write_text(json.dumps(seal(changed, path.parent)))
        assert main(["--output", str(copy), "--resume", "auto", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


CALLS = ("fsync", "replace", "rename", "rmdir", "unlink", "mkdir")  # by which a run changes what is on the disk


@pytest.fixture(scope="module")
def stopped(words, tmp_path_factory):
    """The folder of a run that a signal has ended after update 9, the third of the second epoch."""
    folder, count = tmp_path_factory.mktemp("runs") / "stopped", [0]

    def end(*_):
        count[0] += 1
        if count[0] == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(end)
    assert main(["--output", str(folder), *words]) == 143
    handle.remove()
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("n", [1, 4, 9, 11])
def test_a_full_disk_is_told_in_one_line_and_leaves_the_last_checkpoint(
    words, stopped, tmp_path, capsys, monkeypatch, after_update, n
):
    """The disk is full at the n-th file or folder that is flushed to it after the last update."""
    folder, left = shutil.copytree(stopped, tmp_path / "x"), [0]
    fsync = os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    after_update(3, lambda: left.__setitem__(0, n))
    monkeypatch.setattr(os, "fsync", full)
    assert main(["--output", str(folder), "--resume", "auto", *words]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    newest = max((folder / "states").iterdir())
    saved = newest.name + {"00000009": " (epoch 2, update 3)", "00000012": " (epoch 2)"}[newest.name]
    assert err == f"error: [Errno 28] No space left on device; last good checkpoint: {folder / 'states' / saved}"
    assert contents(folder / "states" / "00000009") == contents(stopped / "states" / "00000009")
    assert not list((folder / "states").glob(".*"))


class Killed(BaseException):
    """Stands for a signal 9: from then on nothing is put on the disk."""


@pytest.mark.parametrize("n", [8, 19, 27])
def test_a_run_that_dies_as_it_writes_goes_on(words, straight, stopped, tmp_path, monkeypatch, n):
    folder, left = shutil.copytree(stopped, tmp_path / "x"), [n]

    def dying(call):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return call(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for name in CALLS:
            patch.setattr(os, name, dying(getattr(os, name)))
        main(["--output", str(folder), "--resume", "auto", *words])
    assert main(["--output", str(folder), "--resume", "auto", *words]) == 0
    assert numbers(folder) == numbers(straight)


def test_a_file_that_may_not_grow_is_an_error_of_the_disk(tmp_path):
    """A limit on the size of files stands for a full disk, to the writer of safetensors too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write, what in ((write_tensors, {"a": torch.zeros(1000)}), (write_text, "x" * 2000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write(tmp_path / write.__name__, what)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "write_text").exists()


def test_a_folder_that_cannot_be_made_is_told_in_one_line(words, capsys):
    assert main(["--output", "/proc/self/run", *words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: [Errno ") and "/proc/self" in err and err.count("\n") == 1 and out == ""


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=20,
)


@given(TREES)
def test_trees_come_back_as_they_were(tree):
    def same(a, b):
        if type(a) is not type(b):
            return False
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b

    assert same(unpack(json.loads(json.dumps(pack(tree, {}))), {}), tree)


def test_ranks_that_do_not_write_copy_no_tensor():
    class Uncopied(torch.Tensor):
        """Fails if it is moved or copied."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func in (torch.Tensor.detach,), func
            return super().__torch_function__(func, types, args, kwargs or {})

    tree = {"a": [torch.ones(3).as_subclass(Uncopied), 2], "b": (torch.zeros(1).as_subclass(Uncopied),)}
    plain = {"a": [torch.ones(3), 2], "b": (torch.zeros(1),)}
    assert pack(tree, None) == pack(plain, {})
    with pytest.raises(AssertionError):
        pack(tree, {})


def test_tensors_of_a_tree_are_put_aside(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tree = {"a": [shared, (shared.T, 3)], 7: {"b": torch.tensor(True)}}  # safetensors takes no two of one memory
    state.write_tree(tmp_path / "x", tree)
    again = state.read_tree(tmp_path / "x")
    assert torch.equal(again["a"][0], shared) and torch.equal(again["a"][1][0], shared.T) and again["a"][1][1] == 3
    assert again[7]["b"].dtype == torch.bool and again[7]["b"].item()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "nadamw", "lookahead_sgd", "adafactor", "muon"])
def test_every_kind_of_optimizer_goes_on_as_it_was(tmp_path, name):
    from timm.optim import create_optimizer_v2

    def build(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        return net, create_optimizer_v2(net, opt=name, lr=0.1, weight_decay=0.01)

    def work(net, optimizer):
        for _ in range(7):
            net(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def states(net, optimizer):
        parts = {"model": net, "optimizer": optimizer}
        return States(tmp_path, parts, Accelerator(cpu=True), identity={}, keep=1, keep_best=False)

    net, optimizer = build(0)
    work(net, optimizer)
    progress = Progress(epoch=3, step=2, updates=7, record={"lr": 0.1}, records=[{"epoch": 0, "x": float("inf")}])
    states(net, optimizer).save(progress, torch.tensor(1.5))
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    work(net, optimizer)

    net_again, optimizer_again = build(1)
    assert states(net_again, optimizer_again).restore(tmp_path / "00000007") == (progress, torch.tensor(1.5))
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    work(net_again, optimizer_again)
    for left, right in zip(net.state_dict().values(), net_again.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def killed_at(numbers_, words, folder):
    """Exit codes of runs killed at the n-th call to the disk, each of which has then been resumed."""
    command = [sys.executable, "tests/recipes/killed_run.py", str(folder), ",".join(map(str, numbers_)), *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(map(int, line.split()) for line in done.stdout.splitlines() if line.split()[0].isdigit())


@pytest.mark.slow
def test_a_run_killed_at_any_write_goes_on(words, straight, tmp_path):
    flags = [*words, "--checkpoint_every", "2"]
    codes, n = {}, 1
    while 0 not in codes.values():
        codes |= killed_at(range(n, n + 20), flags, tmp_path)
        n += 20
    assert list(codes.values()).count(-9) > 100
    for n in codes:
        assert numbers(tmp_path / str(n)) == numbers(straight), n
        shutil.rmtree(tmp_path / str(n))


@pytest.mark.slow
def test_a_launched_run_killed_at_any_moment_goes_on(words, straight, tmp_path):
    """Twenty moments over the length of the run, the launcher and its child killed together."""
    launcher = "accelerate.commands.launch --cpu --quiet --num_processes 1 --num_machines 1"
    defaults = "--mixed_precision no --dynamo_backend no recipes/train.py --resume auto --checkpoint_every 2"
    command = [sys.executable, "-m", *launcher.split(), *defaults.split(), *words, "--output"]
    quiet = {"cwd": ROOT, "env": os.environ | SETTINGS, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began = time.monotonic()
    assert subprocess.run([*command, str(tmp_path / "whole")], **quiet).returncode == 0
    length = time.monotonic() - began
    reached = set()
    for i in range(20):
        folder = tmp_path / str(i)
        child = subprocess.Popen([*command, str(folder)], start_new_session=True, **quiet)
        # Half of the length is imports, which the first moments are for.
        time.sleep(length * (0.4 + 0.6 * i / 20))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reached.add(len(list((folder / "states").glob("*"))) if folder.exists() else None)
        assert subprocess.run([*command, str(folder)], **quiet).returncode == 0
        assert numbers(folder) == numbers(straight), i
    assert len(reached) > 1
