"""A run that has been pushed, loaded by those who get it: timm, transformers, and the recipes, from a Hub on the
loopback."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from datasets import ClassLabel, DatasetDict, load_from_disk
from few_digits import save_few_digits
from hub_server import status
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file

import recipes.evaluate
import recipes.probe
import recipes.push
import recipes.train
import timm_deq
from recipes.training.checkpoint import save_checkpoint
from recipes.training.download import fetch

pytestmark = [
    pytest.mark.usefixtures("one_cpu_and_no_network"),
    # lfs.py of huggingface_hub 2.4 passes a file to httpx2 as `data`.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
SMALL = "--majority 2 --ratio 4 --epochs 1 --max_updates 3".split()
SOLVER = "--model_args.max_steps 6 --model_args.tol 0.03".split()

# What somebody does who has nothing but the name, in a process of its own. The card's examples run first.
FRESH = """
import json, re, sys
from huggingface_hub import ModelCard

name, image_file = sys.argv[1:]
for block in re.findall("```python\\n(.*?)```", ModelCard.load(name).text, flags=re.DOTALL):
    exec(block, {})

import timm, timm_deq, torch
from transformers import AutoModelForImageClassification

images = torch.load(image_file)
models = {
    "timm": timm.create_model(f"hf-hub:{name}", pretrained=True).eval(),
    "transformers": AutoModelForImageClassification.from_pretrained(name).eval(),
    "quick": timm.create_model(f"hf-hub:{name}@quick", pretrained=True).eval(),
}
found = {}
for key, model in models.items():
    (layer,) = [module for module in model.modules() if isinstance(module, timm_deq.Equilibrium)]
    with torch.no_grad():
        output = model(images)
    found[key] = [getattr(output, "logits", output).tolist(), repr((layer.solver, layer.gradient))]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_few_digits(tmp_path_factory.mktemp("few") / "data", train=24, test=12)


@pytest.fixture(scope="module")
def pushed(hub_server, data, tmp_path_factory, one_cpu_and_no_network):
    """The folder of a run that `--push_to_hub` has pushed, twice: with another solver at the revision `quick`."""
    from conftest import fresh_hub

    folder = tmp_path_factory.mktemp("pushed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fresh_hub(hub_server, patch, tmp_path_factory.mktemp("cache"))
        words = ["--output", str(folder), "--dataset", str(data), *SMALL, *SOLVER, "--push_to_hub", "lab/net"]
        assert recipes.train.main(words) == 0
        net = timm.create_model(f"local-dir:{folder / 'checkpoint'}", pretrained=True)
        timm_deq.set_solver(net, "picard", max_steps=5, tol=0.01)
        names = json.loads((folder / "checkpoint" / "config.json").read_text())["label_names"]
        save_checkpoint(net, folder / "checkpoint", data_config={}, class_names=names)
        assert recipes.push.main([str(folder), "lab/net", "--revision", "quick"]) == 0
        yield folder


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_train_pushes_when_it_has_finished(hub_server, pushed):
    repo = hub_server.repos["lab/net"]
    assert [commit.title for commit in repo.history()] == ["Add the run run"]
    files = repo.find("main").files
    assert {"figures/anytime.png", "model.safetensors", "README.md"} < set(files)
    results = json.loads(files["results.json"].content)
    assert [point["max_steps"] for point in results["anytime"]] == [1, 2, 4, 6]
    assert results["anytime"][-1]["accuracy"] == results["test"]
    settings = json.loads(files["config.json"].content)
    assert settings["plugin"] == {"package": "timm-deq", "import": "timm_deq"}
    assert settings["equilibrium"]["solver"]["name"] == "Anderson" and settings["label_names"] == list("0123")
    assert set(repo.history("quick")[0].changed) == {"README.md", "config.json"}  # the weights are the same


def test_a_fresh_process_gets_the_same_logits_and_solvers(pushed, tmp_path):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", FRESH, "lab/net", str(tmp_path / "images")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    solvers = {"timm": {"max_steps": 6, "tol": 0.03}, "quick": {"solver": "picard", "max_steps": 5, "tol": 0.01}}
    for name, settings in solvers.items():
        mine = timm.create_model("deq_resnet8_cifar", num_classes=4, **settings).eval()
        mine.load_state_dict(load_file(pushed / "checkpoint" / "model.safetensors"))
        (layer,) = [module for module in mine.modules() if isinstance(module, timm_deq.Equilibrium)]
        logits, solver = found[name]
        assert solver == repr((layer.solver, layer.gradient))
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(logits), mine(images), rtol=0, atol=1e-6)
    assert found["transformers"] == found["timm"]


def test_the_pictures_of_the_card_are_there(pushed):
    card = ModelCard.load("lab/net")
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.text)
    assert len(links) == 5 and all(HfApi().file_exists("lab/net", link) for link in links)
    assert "| 6 | " in card.text and "| 1 | " in card.text  # the anytime curve


@pytest.mark.parametrize("revision", ["", "@quick"])
def test_evaluate_gives_the_numbers_of_the_card(pushed, tmp_path, revision):
    assert recipes.evaluate.main([f"hf-hub:lab/net{revision}", "--output", str(tmp_path / "x")]) == 0
    (point,) = results_of(tmp_path / "x")["points"]
    assert point["max_steps"] == (5 if revision == "@quick" else 6)
    if revision == "@quick":
        return
    results = results_of(pushed)
    assert point["accuracy"] == results["test"] and point["calibration_error"] == results["calibration_error"]
    text = ModelCard.load("lab/net").text
    for group, value in point["accuracy"].items():
        assert f"| {100 * value:.2f} | {point['calibration_error'][group]:.4g} |" in text


def test_probe_gives_the_collapse_of_the_card(pushed, tmp_path, capsys):
    assert recipes.probe.main(["hf-hub:lab/net", "--no-tsne", "--output", str(tmp_path / "x")]) == 0
    collapse = json.loads((tmp_path / "x" / "collapse.json").read_text())["collapse"]
    text = ModelCard.load("lab/net").text
    for report in (collapse, *collapse["groups"].values()):
        cells = [f"{report[key]:.4g}" for key in ("nc1", "nc2_etf", "nc3", "nc4")]
        assert f"| {' | '.join(cells)} |" in text


def test_the_same_images_and_weights(pushed, data, tmp_path):
    words = ["--model", "hf-hub:lab/net@main", "--manifest", "hf-hub:lab/net", "--epochs", "0", "--warmup_epochs", "0"]
    assert recipes.train.main(["--output", str(tmp_path / "x"), "--dataset", str(data), *words]) == 0
    assert (tmp_path / "x" / "manifest.json").read_text() == (pushed / "manifest.json").read_text()
    assert results_of(tmp_path / "x")["test"] == results_of(pushed)["test"]  # the classifier is kept


def test_tuned_on_other_classes(hub_server, pushed, data, tmp_path):
    names = list("012")
    splits = {
        split: rows.filter(lambda label: label < 3, input_columns="label").cast_column("label", ClassLabel(names=names))
        for split, rows in load_from_disk(data).items()
    }
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    words = ["--model", "hf-hub:lab/net", "--epochs", "1", "--max_updates", "1", "--push_to_hub", "lab/tuned"]
    words += ["--imbalance", "balanced", "--lr", "1e-30"]
    assert recipes.train.main(["--output", str(tmp_path / "x"), "--dataset", str(tmp_path / "data"), *words]) == 0
    before, after = (load_file(each / "checkpoint" / "model.safetensors") for each in (pushed, tmp_path / "x"))
    assert after.pop("fc.weight").shape == (3, before.pop("fc.weight").shape[1])
    torch.testing.assert_close(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    card = ModelCard.load("lab/tuned")
    assert card.data.base_model == "lab/net" and "Training started from [lab/net]" in card.text


def test_a_push_that_fails_at_the_end_leaves_the_run(hub_server, pushed, data, tmp_path, capsys):
    folder = tmp_path / "my run"
    words = ["--output", str(folder), "--dataset", str(data), *SMALL, "--model_args.equilibrium", "false"]
    words += ["--push_to_hub", "lab/twin", "--private", "--tracker", "tensorboard"]
    hub_server.fail("POST .*/commit/", status(403, message="no more"))
    assert recipes.train.main(words) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    command = f"python recipes/push.py '{folder}' lab/twin --private"
    assert "answered 403: no more" in error
    assert error.endswith(f"; the run is complete, and can be pushed by {command}")
    assert results_of(folder) and not hub_server.repos["lab/twin"].history()
    assert recipes.train.main([*words, "--resume", "auto"]) == 0
    assert len(hub_server.repos["lab/twin"].history()) == 1 and hub_server.repos["lab/twin"].private
    assert recipes.push.main(shlex.split(command)[2:]) == 0
    assert len(hub_server.repos["lab/twin"].history()) == 1
    assert "deep equilibrium twin" in ModelCard.load("lab/twin").text
    found = [path for path in folder.rglob("*") if path.is_file() and b"hf_kept_secret" in path.read_bytes()]
    assert not found and "hf_kept_secret" not in Path("/proc/self/cmdline").read_text()
    assert list(folder.rglob("events.*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--push_to_hub net", "push_to_hub is 'net'; allowed: ORG/NAME"),
        ("--push_to_hub readers/net", "answered 403: You don't have the rights"),
        ("--push_to_hub lab/other", "holds the architecture 'resnet18'; allowed: 'deq_resnet8_cifar', or --overwrite"),
        ("--push_to_hub lab/new --classifier cosine", "classifier is 'cosine'; allowed: 'linear' with push_to_hub"),
        ("--push_to_hub lab/new --ratio 1000", "ratio (R) is 1000"),
        ("--private", "private is True; allowed: not given without push_to_hub"),
        ("--model hf-hub:../net", "model is 'hf-hub:../net'; allowed: hf-hub:ORG/NAME"),
        ("--model hf-hub:lab/net@../x", "model is 'hf-hub:lab/net@../x'"),
        ("--model hf-hub:lab/absent", "hf-hub:lab/absent cannot be downloaded: "),
        ("--model hf-hub:lab/net@absent", "answered 404: Invalid rev id: absent"),
        ("--model hf-hub:lab/other", "model is 'hf-hub:lab/other'; allowed: a repository that has config.json and"),
        ("--manifest hf-hub:lab/other", "manifest is 'hf-hub:lab/other'; allowed: a repository that has manifest.json"),
    ],
)
def test_mistakes_are_found_before_training(hub_server, pushed, data, tmp_path, capsys, words, message):
    api = HfApi()
    api.create_repo("lab/other", exist_ok=True)
    held = b'{"architecture": "resnet18"}'
    api.upload_file(path_or_fileobj=held, path_in_repo="config.json", repo_id="lab/other")
    before = sum(len(repo.commits) for repo in hub_server.repos.values())
    output = ["--output", str(tmp_path / "x"), "--dataset", str(data)]
    assert recipes.train.main([*output, *words.split()]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "x").exists() and "lab/new" not in hub_server.repos
    assert sum(len(repo.commits) for repo in hub_server.repos.values()) == before


def test_an_evaluation_goes_into_the_card(hub_server, pushed, tmp_path, capsys):
    folder = tmp_path / "curve"
    assert recipes.evaluate.main([str(pushed), "--max-steps", "1", "3", "--output", str(folder)]) == 0
    assert recipes.push.main([str(pushed), "lab/curve", "--evaluation", str(folder)]) == 0
    accuracy = results_of(folder)["points"][1]["accuracy"]["overall"]
    assert f"| 3 | {100 * accuracy:.2f} |" in ModelCard.load("lab/curve").text
    assert HfApi().file_exists("lab/curve", "figures/confusion.png")
    right = results_of(folder)
    for wrong in (
        {"adjust_tau": 1.0},
        {"split": "train"},
        {"model": "resnet18"},
        {"dataset": "digits"},
        {"points": None},
    ):
        (folder / "results.json").write_text(json.dumps(right | wrong))
        capsys.readouterr()
        assert recipes.push.main([str(pushed), "lab/curve", "--evaluation", str(folder)]) == 2
        assert f"evaluation is {str(folder)!r}; allowed: the output of recipes/evaluate.py" in capsys.readouterr().err


def test_without_a_network_what_is_in_the_cache_serves(pushed, monkeypatch):
    folder = fetch("hf-hub:lab/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf-hub:lab/net") == folder
