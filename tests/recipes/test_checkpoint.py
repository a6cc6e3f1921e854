"""What is written to disk: complete or absent, and read back equal."""

import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_deq  # noqa: F401 - registers its models
from recipes.training import checkpoint
from recipes.training.checkpoint import save_checkpoint, to_json, write_text

DATA_CONFIG = dict(
    input_size=(3, 48, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation="bilinear", crop_pct=0.9
)


def model(seed=0, name="test_resnet", **arguments):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=4, **arguments).eval()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_resnet", {}), ("test_vit", {}), ("deq_resnet8_cifar", {"tol": 1e-5, "max_steps": 7, "solver": "picard"})],
)
def test_local_dir_gives_the_model_and_its_preprocessing_back(tmp_path, name, arguments):
    folder = tmp_path / "checkpoint"
    net = model(name=name, **arguments)
    size = 160 if name == "test_vit" else 48  # a ViT's is fixed
    data_config = DATA_CONFIG | {"input_size": (3, size, size)}
    save_checkpoint(net, folder, data_config=data_config, class_names=["a", "b", "c", "d"])
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(3, 3, size, size)
    assert torch.equal(net(images), again(images))
    resolved = timm.data.resolve_model_data_config(again)
    assert json.dumps({key: resolved[key] for key in data_config}) == json.dumps(
        data_config
    )  # a list for a tuple is fine
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 4 and config["label_names"] == ["a", "b", "c", "d"]
    # transformers' TimmWrapper passes the root's num_classes along with model_args, so it may not be there twice.
    kept = config.get("model_args", {})
    assert "num_classes" not in kept and {key: kept[key] for key in arguments} == arguments


def test_only_safe_files_are_written(tmp_path):
    save_checkpoint(model(), tmp_path / "checkpoint", data_config=DATA_CONFIG)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint", "config.json", "model.safetensors"]


def test_a_second_save_replaces_the_weights(tmp_path):
    for seed in (0, 1):
        save_checkpoint(model(seed), tmp_path / "checkpoint", data_config=DATA_CONFIG)
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")
    torch.testing.assert_close(dict(model(1).state_dict()), saved, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, first):
    folder = tmp_path / "checkpoint"
    if not first:
        save_checkpoint(model(0), folder, data_config=DATA_CONFIG)

    def full_disk(net, path, **_):
        (tmp_path / ".checkpoint.draft").mkdir()
        (tmp_path / ".checkpoint.draft" / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_for_hf", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model(1), folder, data_config=DATA_CONFIG)
    assert folder.exists() is not first
    if not first:
        saved = load_file(folder / "model.safetensors")
        torch.testing.assert_close(dict(model(0).state_dict()), saved, rtol=0, atol=0)
    monkeypatch.undo()
    save_checkpoint(model(1), folder, data_config=DATA_CONFIG)  # what was left behind is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    for text in ("one", "two, longer"):
        write_text(path, text)
        assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_numbers_that_json_lacks_become_null():
    value = {"a": math.nan, "b": [1.5, -math.inf, (2, math.nan)], "c": {"d": True, "e": None, "f": "nan"}}
    expected = {"a": None, "b": [1.5, None, [2, None]], "c": {"d": True, "e": None, "f": "nan"}}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected
