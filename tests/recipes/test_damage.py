"""Run folders that were damaged, edited or are in use: a run goes on from what is whole, or says what is not."""

import hashlib
import json
import os
import shutil
import signal
import time

import pytest
from few_digits import save_few_digits
from torch.optim.optimizer import register_optimizer_step_post_hook

from recipes.errors import UserError
from recipes.settings.config import TrainConfig
from recipes.train import main
from recipes.training.lock import lock_folder
from recipes.training.resume import damage_of

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

FLAGS = "--model test_resnet --img_size 16 --crop_pct 1 --epochs 2 --batch_size 6 --probe_every 0 --select best"
FLAGS += (
    " --imbalance balanced --val_fraction 0.25 --model_args.drop_rate 0.3 --checkpoint_every 2 --keep_checkpoints 9"
)
TIMES = ("seconds", "images_per_second", "peak_memory_mib")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    data = save_few_digits(tmp_path_factory.mktemp("data") / "few", train=12, test=5)
    return ["--dataset", str(data), *FLAGS.split()]


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert main(["--output", str(folder), *words]) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(words, tmp_path_factory):
    """The folder of a run that was stopped at its tenth update of twelve."""
    folder, count = tmp_path_factory.mktemp("runs") / "stopped", []

    def end(*_):
        count.append(1)
        if len(count) == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(end)
    assert main(["--output", str(folder), *words]) == 143
    handle.remove()
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


def numbers(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    known = [{key: value for key, value in each.items() if key not in TIMES} for each in [*records, results]]
    return known, (folder / "checkpoint" / "model.safetensors").read_bytes()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def turn_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def change_a_number(path):
    content = json.loads(path.read_text())
    content["progress"]["updates"] += 1
    path.write_text(json.dumps(content))


DAMAGES = {
    "a turned byte of the weights": ("state.safetensors", turn_a_byte),
    "a turned byte of a rank's tensors": ("rank-0.safetensors", turn_a_byte),
    "a changed number": ("state.json", change_a_number),
    "a file cut short": ("state.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "a text cut short": ("state.json", lambda path: path.write_text(path.read_text()[:-9])),
    "a missing file": ("rank-0.json", lambda path: path.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_a_state_is_found(copy, damage):
    state, config = copy / "states" / "00000010", TrainConfig(output="x", select="best")
    assert damage_of(state, config) is None
    name, harm = DAMAGES[damage]
    harm(state / name)
    assert name in str(damage_of(state, config)) or "is no checkpoint" in str(damage_of(state, config))
    assert damage_of(copy / "states" / "00000008", config) is None


@pytest.mark.parametrize("damage", ["a turned byte of the weights", "a text cut short"])
def test_a_run_goes_on_from_the_newest_whole_state(words, straight, copy, capsys, damage):
    name, harm = DAMAGES[damage]
    harm(copy / "states" / "00000010" / name)
    assert main(["--output", str(copy), "--resume", "auto", *words]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "state 00000010 is damaged" in warning and warning.endswith("going on from state 00000008")
    assert numbers(copy) == numbers(straight)


def test_a_damaged_state_is_not_resumed_from_when_it_is_named(words, copy, tmp_path, capsys):
    state = copy / "states" / "00000010"
    turn_a_byte(state / "state.safetensors")
    assert main(["--output", str(tmp_path / "new"), "--resume", str(state), *words]) == 2
    err = capsys.readouterr().err
    reason = "state.safetensors was changed; allowed: a whole folder of RUN/states"
    assert err == f"error: {str(state)!r} cannot be resumed: {reason}\n"
    assert not (tmp_path / "new").exists()


def lose_states(folder):
    shutil.rmtree(folder / "states")


def damage_every_state(folder):
    for path in folder.glob("states/*/state.safetensors"):
        turn_a_byte(path)


def damage_the_best(folder):
    """A state of an epoch's end that later ones refer to."""
    progress = json.loads((folder / "states" / "00000010" / "state.json").read_text())["progress"]
    for path in folder.glob("states/*"):
        if path.name > f"{progress['best_updates']:08d}":
            assert json.loads((path / "state.json").read_text())["progress"]["best_updates"] == progress["best_updates"]
        elif path.name < f"{progress['best_updates']:08d}":
            shutil.rmtree(path)
    turn_a_byte(folder / "states" / f"{progress['best_updates']:08d}" / "state.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lose_states, "cannot be resumed: it has the metrics of 1 epochs and no state; allowed: another folder"),
        (damage_every_state, "state 00000002 is damaged, as state.safetensors was changed"),
        (damage_the_best, "the state of the best epoch"),
        (lambda folder: (folder / "config.yaml").write_text("lr: 1\n"), "config.yaml' was changed after the run had"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json' was changed after the run had"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json' was changed after the run had"),
    ],
    ids=["no state", "all damaged", "best damaged", "settings edited", "manifest garbage", "manifest gone"],
)
def test_a_folder_that_is_not_what_it_was_is_left_alone(words, copy, capsys, harm, message):
    harm(copy)
    before = contents(copy)
    assert main(["--output", str(copy), "--resume", "auto", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert contents(copy) == before


def make_older(folder, **change):
    """A run of a version without some settings, without names of classes in its manifest, and without checksums."""
    file = folder / "manifest.json"
    said = json.loads(file.read_text()) | change
    earlier = {key: value for key, value in said.items() if key not in ("class_names", "sha256")}
    text = json.dumps(earlier, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps(earlier | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))
    for path in folder.glob("states/*/state.json"):
        content = json.loads(path.read_text())
        for name in ("sha256", "files", "folder"):
            del content[name]
        for name in ("test_fraction", "val_split", "skip_corrupt"):
            del content["config"][name]
        content["manifest"] = json.loads(file.read_text())["sha256"]
        path.write_text(json.dumps(content))


def test_a_run_of_an_earlier_version_goes_on(words, straight, copy):
    make_older(copy)
    assert main(["--output", str(copy), "--resume", "auto", *words]) == 0
    assert numbers(copy) == numbers(straight)


def test_a_run_of_an_earlier_version_does_not_go_on_with_other_images(words, copy, capsys):
    make_older(copy, indices=[*range(1, 91)])
    assert main(["--output", str(copy), "--resume", "auto", *words]) == 2
    assert "allowed: the data set as it was" in capsys.readouterr().err


def test_a_setting_that_an_earlier_version_had_not_is_its_default(words, copy, capsys):
    make_older(copy)
    assert main(["--output", str(copy), "--resume", "auto", *words, "--skip_corrupt", "3"]) == 2
    assert "had other settings: skip_corrupt 0, now 3; allowed" in capsys.readouterr().err


def test_a_folder_in_use_is_refused_until_its_process_has_died(words, straight, copy, capsys):
    """Killed with signal 9 while a process that it has forked lives on, as one that decodes images may."""
    ready, told = os.pipe()
    if not (holder := os.fork()):
        with lock_folder(copy):
            child = os.fork()
            if child:
                os.write(told, str(child).encode())
            time.sleep(60)
        os._exit(0)
    orphan = int(os.read(ready, 20))
    before = contents(copy)
    try:
        assert main(["--output", str(copy), "--resume", "auto", *words]) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith(f"error: output {str(copy)!r} is in use by another process; allowed: ")
        assert contents(copy) == before
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert main(["--output", str(copy), "--resume", "auto", *words]) == 0
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert numbers(copy) == numbers(straight)


def test_a_lock_ends_with_its_block(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match="in use by another process"), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
