"""Neural collapse in training loops: the hook of one's own loop, the Trainers of transformers and of Lightning."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nc_probe import measure_model
from nc_probe.integrations.epochs import EpochHook

README = (Path(__file__).parents[2] / "nc_probe" / "README.md").read_text()
K = 3


def block(name):
    """The block of README's code that uses a module of nc_probe.integrations."""
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if f"integrations.{name}" in code
    ]
    return found


def problem():
    torch.manual_seed(0)
    labels = torch.arange(24) % K
    x = torch.randn(24, 5) + labels[:, None]
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, K)), list(
        zip(x.split(8), labels.split(8), strict=True)
    )


def test_the_hook_keeps_the_reports_of_epochs(tmp_path):
    model, loader = problem()
    logged, expected = [], {}
    path, log = tmp_path / "nc.jsonl", lambda numbers, epoch: logged.append((epoch, numbers))
    hook = EpochHook(model, loader, every=2, path=path, log=log, groups={"rare": [2]}, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for epoch in range(6):
        for x, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        report = hook(epoch)
        assert (report is None) == (epoch % 2 == 0) and model.training
        if report is not None:
            expected[epoch] = measure_model(model, loader, groups={"rare": [2]}).scalars("nc/")
    assert list(hook.reports) == [1, 3, 5] and logged == list(expected.items())
    assert {epoch: report.scalars("nc/") for epoch, report in hook.reports.items()} == expected
    assert hook.reports[5].nc1 < hook.reports[1].nc1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["epoch"], line["collapse"]["groups"]["rare"]["nc1"]) for line in lines] == [
        (epoch, report.groups["rare"].nc1) for epoch, report in hook.reports.items()
    ]


def test_every_is_a_number_of_epochs():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        EpochHook(*problem(), every=0)


@pytest.mark.slow
def test_the_trainer_of_transformers_logs_every_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    exec(block("transformers"), namespace)
    trainer, model, dataset = (namespace[name] for name in ("trainer", "model", "dataset"))
    logs = [entry for entry in trainer.state.log_history if "nc/nc1" in entry]
    assert [entry["epoch"] for entry in logs] == [1, 2] and logs[0]["nc/nc1"] != logs[1]["nc/nc1"]
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in dataset]) for name in ("pixel_values", "labels")}
    last = measure_model(model, [batch], groups={"rare": [2]}).scalars("nc/")
    assert {name: value for name, value in logs[1].items() if name in last} == pytest.approx(last, rel=1e-5)
    assert last["nc/samples"] == 30 and "nc/rare/nc1" in last and model.training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_the_trainer_of_lightning_logs_every_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    exec(block("lightning"), namespace)
    trainer, loader, module = namespace["trainer"], namespace["loader"], namespace["trainer"].lightning_module
    (callback,) = [c for c in trainer.callbacks if type(c).__name__ == "CollapseCallback"]
    assert list(callback.reports) == [0, 1]
    last = measure_model(module, loader, groups={"rare": [2]}).scalars("nc/")
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name in last}
    assert logged == pytest.approx(last, rel=1e-5, abs=1e-6) and last["nc/samples"] == 30 and "nc/rare/nc1" in last

    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from nc_probe.integrations.lightning import CollapseCallback

    # A sampler of training, several loaders, and a part of the module.
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 30, 30)
    resampled = DataLoader(loader.dataset, batch_size=8, sampler=sampler, num_workers=0)
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    once = CollapseCallback(model="net", every=2)
    Trainer(callbacks=[once], **settings).fit(namespace["Classifier"](), resampled)
    assert list(once.reports) == [1] and once.reports[1].samples == 30
    given = CollapseCallback(list(loader), model="net")

    class Named(namespace["Classifier"]):
        def training_step(self, batch, _):
            return super().training_step(batch["a"], _)

    module = Named()
    Trainer(callbacks=[given], **settings).fit(module, {"a": loader})
    assert list(given.reports) == [0, 1]
    with pytest.raises(ValueError, match="loader must be given where training is not by one DataLoader"):
        Trainer(callbacks=[CollapseCallback()], **settings).fit(module, {"a": loader})
