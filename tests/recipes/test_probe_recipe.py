"""recipes/probe.py, run as users do, against features read by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from matplotlib.markers import MarkerStyle
from PIL import Image
from sklearn.metrics import roc_auc_score
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from recipes import train
from recipes.images.sources import digits
from recipes.probe import main
from recipes.results.class_figures import sample_evenly, tsne_figure
from recipes.training import probing
from recipes.training.probing import named_group
from timm_deq import Equilibrium

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of a few digits of the classes 0 to 4, as many of each as come."""
    folder, whole = tmp_path_factory.mktemp("data") / "few", digits()
    splits = {}
    for split, count in (("train", 80), ("test", 43)):
        rows = whole[split].select(np.flatnonzero(np.array(whole[split]["label"]) < 5)[:count])
        content = {"picture": list(rows["image"]), "digit": list(rows["label"])}
        features = datasets.Features(picture=datasets.Image(), digit=datasets.ClassLabel(names=list("abcde")))
        splits[split] = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The folder of a run that ended before its first update: untrained, with a manifest of some of the images."""
    folder = tmp_path_factory.mktemp("runs") / "few"
    words = "--epochs 0 --majority 2 --ratio 2 --model_args.max_steps 4 --img_size 16 --eval_batch_size 16".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert train.main(["--output", str(folder), "--dataset", str(images), "--val_fraction", "0.2", *words]) == 0
    return folder


def pixels(net, rows):
    """Images as timm evaluates them, and their classes."""
    transform = create_transform(**resolve_data_config({}, model=net), is_training=False)
    return torch.stack([transform(row["picture"].convert("RGB")) for row in rows]), np.array(rows["digit"])


def nc1(x, labels):
    """tr(S_W S_B^+)/K with every class once, by numpy's pseudo-inverse."""
    classes, x = np.unique(labels), x.double().numpy()
    means = np.stack([x[labels == k].mean(0) for k in classes])
    inside = [np.cov(x[labels == k].T, bias=True) for k in classes]
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / len(classes)
    return np.trace(np.mean(inside, axis=0) @ np.linalg.pinv(between, rcond=1e-9, hermitian=True)) / len(classes)


def collapse(folder):
    return json.loads((folder / "collapse.json").read_text())


def test_a_run_is_measured_on_the_images_that_it_chose(images, run, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(probing, "tsne_figure", lambda *of, **how: drawn.append((of, how)) or tsne_figure(*of, **how))
    out = tmp_path / "new" / "x"
    words = "--layers stages --iterates --conventions papyan2020 fang2021 --output".split()
    assert main([str(run), *words, str(out)]) == 0
    results, manifest = collapse(out), json.loads((run / "manifest.json").read_text())
    measured = results["collapse"]
    assert results["images"] == len(manifest["indices"]) < 64 and measured["class_count"] == manifest["counts"]
    assert results["settings"]["groups"] == manifest["groups"] == {"majority": [0, 1], "minority": [2, 3, 4]}
    assert (results["settings"]["split"], results["ranks"], results["classes"]) == ("train", 1, list("abcde"))

    net = timm.create_model(f"local-dir:{run / 'checkpoint'}", pretrained=True).eval()
    read = {}
    net.get_classifier().register_forward_pre_hook(lambda m, args: read.update(features=args[0]))
    net.layer2.register_forward_hook(lambda m, args, out: read.update(layer2=out.mean((2, 3))))
    layer = next(m for m in net.modules() if isinstance(m, Equilibrium))
    layer.register_forward_pre_hook(lambda m, args: read.update(H0=args[0].mean((2, 3))))
    x, labels = pixels(net, datasets.load_from_disk(str(images))["train"].select(manifest["indices"]))
    with torch.no_grad():
        logits = net(x)
    assert measured["nc1"] == pytest.approx(nc1(read["features"], labels), rel=1e-4)
    assert measured["layers"]["layer2"]["nc1"] == pytest.approx(nc1(read["layer2"], labels), rel=1e-4)
    assert measured["iterates"]["H0"]["nc1"] == pytest.approx(nc1(read["H0"], labels), rel=1e-4)
    assert measured["accuracy"] == pytest.approx(float((logits.argmax(1).numpy() == labels).mean()))
    assert list(measured["iterates"]) == ["H0", "z1", "z2", "z3", "z*"]
    assert set(measured["conventions"]) == {"papyan2020", "fang2021"}

    assert {path.name for path in out.iterdir()} == {"collapse.json"} | {
        f"{name}.png" for name in ("gram", "angles", "classes", "depth", "iterates", "tsne")
    }
    assert [path.name for path in out.parent.iterdir()] == ["x"]
    for path in out.glob("*.png"):
        picture = np.asarray(Image.open(path).convert("L"))
        assert min(picture.shape) > 400 and picture.std() > 10
    ((features, of), how) = drawn[0]
    np.testing.assert_allclose(features, read["features"], rtol=1e-4, atol=1e-5)
    assert of.tolist() == labels.tolist() and how["groups"] == manifest["groups"]
    text, err = capsys.readouterr()
    assert text.split()[:3] == ["all", "majority", "minority"] and "images:" in err and "papyan2020: nc1" in text
    assert float(text.split("NC1  tr(S_W S_B^+)/K")[1].split()[0]) == pytest.approx(measured["nc1"], rel=1e-3)


@pytest.mark.ddp
def test_two_ranks_find_what_one_does(images, run, tmp_path):
    words = [str(run), "--split", "test", "--layers", "stages", "--iterates", "--output"]
    assert main([*words, str(tmp_path / "one")]) == 0
    launcher = "accelerate.commands.launch --multi_gpu --quiet --num_processes 2 --num_machines 1".split()
    command = [
        *launcher,
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "recipes/probe.py",
        *words,
    ]
    names = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    whole = [sys.executable, "-m", *command, str(tmp_path / "two")]
    done = subprocess.run(whole, cwd=ROOT, env=os.environ | names, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.count("samples") == 1
    one, two = collapse(tmp_path / "one"), collapse(tmp_path / "two")
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["images"] == two["images"] == 43

    def same(a, b, path=""):
        assert type(a) is type(b), path
        if isinstance(a, dict | list):
            assert len(a) == len(b), path
            for key in a if isinstance(a, dict) else range(len(a)):
                same(a[key], b[key], f"{path}/{key}")
        else:
            assert a == (pytest.approx(b, rel=1e-10, abs=1e-14) if isinstance(a, float) else b), path

    same(one["collapse"], two["collapse"])
    first, second = (np.asarray(Image.open(tmp_path / name / "tsne.png"), dtype=int) for name in ("one", "two"))
    assert np.array_equal(first, second)


def test_any_model_any_split_and_groups_by_flags(images, tmp_path):
    whole = datasets.load_from_disk(str(images))
    words = f"test_resnet --dataset {images} --split test --img_size 32 --groups x=0,2-3 y=4".split()
    assert main([*words, "--layers", "layer1", "layer3", "--no-tsne", "--output", str(tmp_path / "x")]) == 0
    measured = collapse(tmp_path / "x")["collapse"]
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=5).eval()
    net.pretrained_cfg["input_size"] = (3, 32, 32)
    x, labels = pixels(net, whole["test"])
    with torch.no_grad():
        features = net.forward_head(net.forward_features(x), pre_logits=True)
    assert measured["nc1"] == pytest.approx(nc1(features, labels), rel=1e-3)
    assert measured["class_count"] == np.bincount(labels).tolist()
    assert measured["groups"]["x"]["classes"] == [0, 2, 3] and measured["groups"]["y"]["classes"] == [4]
    assert set(measured["layers"]) == {"layer1", "layer3"} and measured["iterates"] == {}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        "collapse.json",
        "gram.png",
        "angles.png",
        "classes.png",
        "depth.png",
    }


def test_features_of_a_model_of_other_classes(images, tmp_path, capsys):
    net = timm.create_model("test_resnet", num_classes=7)
    save_for_hf(net, str(tmp_path / "seven"), safe_serialization=True)
    words = f"local-dir:{tmp_path / 'seven'} --dataset {images} --img_size 32 --no-tsne".split()
    assert main(words) == 2
    assert "knows 7 classes; allowed: a model of 5, as data set" in capsys.readouterr().err
    assert main([*words, "--no-classifier", "--majority", "0", "3", "--output", str(tmp_path / "x")]) == 0
    results = collapse(tmp_path / "x")
    measured = results["collapse"]
    assert measured["nc1"] > 0 and measured["nc3"] is None and measured["accuracy"] is None
    assert results["settings"]["groups"] == {"majority": [0, 3], "minority": [1, 2, 4]}
    assert sum(measured["class_count"]) == results["images"] == 80


def test_a_vision_transformer_at_another_image_size(images, tmp_path, capsys):
    words = f"test_vit --dataset {images} --split test --no-tsne".split()
    size = ["--model_args.img_size", "32", "--model_args.global_pool=avg", "--model_args.init_values", "1e-1"]
    assert main([*words, *size, "--output", str(tmp_path / "x")]) == 0
    results = collapse(tmp_path / "x")
    assert results["settings"]["model_args"] == {"img_size": 32, "global_pool": "avg", "init_values": 0.1}
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=5, img_size=32, global_pool="avg", init_values=0.1).eval()
    net.pretrained_cfg["input_size"] = (3, 32, 32)
    x, labels = pixels(net, datasets.load_from_disk(str(images))["test"])
    assert x.shape[-1] == 32
    with torch.no_grad():
        features = net.forward_head(net.forward_features(x), pre_logits=True)
    assert results["collapse"]["nc1"] == pytest.approx(nc1(features, labels), rel=1e-3)
    capsys.readouterr()
    for wrong, message in (
        (["--model_args.img_siz", "32"], "model 'test_vit' has no argument 'img_siz' (did you mean 'img_size'?)"),
        (
            [*size, "--model_args.dynamic_img_size", "0", "--img_size", "64"],
            "(64, 64), but the model requires (32, 32)",
        ),
        (["--img_size", "30"], "model 'test_vit' fails on an image of 3 x 30 x 30: "),
        (["--model_args.img_size", "[3"], "--model_args.img_size is '[3'; allowed: a value in YAML"),
        (["--model_args.img_size"], "--model_args.img_size must be --model_args.NAME VALUE"),
        (["--model_args", "32"], "--model_args must be --model_args.NAME VALUE"),
    ):
        assert main([*words, *wrong]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_two_models_beside_each_other(images, run, tmp_path, capsys):
    """The second knows the same classes in another order, by their names; else it is the first."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=5)
    save_for_hf(net, str(tmp_path / "a"), model_config={"label_names": list("abcde")}, safe_serialization=True)
    order = [3, 1, 4, 0, 2]
    net.fc.weight.data, net.fc.bias.data = net.fc.weight.data[order], net.fc.bias.data[order]
    names = ["abcde"[k] for k in order]
    save_for_hf(net, str(tmp_path / "b"), model_config={"label_names": names}, safe_serialization=True)
    words = f"local-dir:{tmp_path / 'a'} --compare local-dir:{tmp_path / 'b'} --dataset {images} --img_size 32".split()
    words += "--groups x=0,2-3 y=4 --layers layer1 --no-tsne --format svg --output".split()
    assert main([*words, str(tmp_path / "x")]) == 0
    results = collapse(tmp_path / "x")
    one, two = results["collapse"], results["compared"]["collapse"]
    assert two["layers"] == {} and one["layers"].keys() == {"layer1"} and results["compared"]["model"] == words[2]
    for key in ("nc1", "nc3", "accuracy"):
        assert two[key] == pytest.approx(one[key]) and two["groups"]["x"][key] == pytest.approx(one["groups"]["x"][key])
    assert two["groups"]["x"]["classes"] == [0, 3, 4] and two["groups"]["y"]["classes"] == [2]
    pictures = [*(tmp_path / "x").glob("*.*g")]
    assert {path.stem for path in pictures} == {"gram", "angles", "classes", "compare", "depth"}
    assert all(path.suffix == ".svg" and path.read_bytes().startswith(b"<?xml") for path in pictures)
    assert f"compared with {words[2]}:\n" in capsys.readouterr().out
    assert main([str(run), "--compare", "test_resnet", "--output", str(tmp_path / "y")]) == 2  # of all ten digits
    err = capsys.readouterr().err
    assert err == f"error: compare is 'test_resnet', of other classes than {str(run)!r}; allowed: a model of the same\n"
    assert not (tmp_path / "y").exists()


def test_images_of_no_class(images, run, tmp_path, capsys):
    """The digits 5 to 9 beside a model of 0 to 4: rates of the distance to the nearest class mean, by hand."""
    whole = digits()["test"]
    rows = whole.select(np.flatnonzero(np.array(whole["label"]) >= 5)[:20])
    features = datasets.Features(picture=datasets.Image(), digit=datasets.ClassLabel(names=list("vwxyz")))
    content = {"picture": list(rows["image"]), "digit": [k - 5 for k in rows["label"]]}
    datasets.DatasetDict(odd=datasets.Dataset.from_dict(content, features=features)).save_to_disk(tmp_path / "odd")
    words = ["--ood", str(tmp_path / "odd"), "--ood_known", "test", "--no-tsne", "--output", str(tmp_path / "x")]
    assert main([str(run), *words]) == 0
    results = collapse(tmp_path / "x")
    ood = results["ood"]
    assert (ood["known"], ood["unknown"], ood["known_source"]) == (43, 20, "shown")
    assert "out of distribution: " in capsys.readouterr().out

    net = timm.create_model(f"local-dir:{run / 'checkpoint'}", pretrained=True).eval()
    read = []
    net.get_classifier().register_forward_pre_hook(lambda m, args: read.append(args[0].double()))
    indices, stored = json.loads((run / "manifest.json").read_text())["indices"], datasets.load_from_disk(str(images))
    shown = [stored["train"].select(indices), stored["test"], datasets.load_from_disk(str(tmp_path / "odd"))["odd"]]
    with torch.no_grad():
        labels = [net(x) is not None and y for x, y in (pixels(net, part) for part in shown)]
    means = torch.stack([read[0][labels[0] == k].mean(0) for k in range(5)])
    known, unknown = (-torch.cdist(x, means).amin(1) for x in read[1:])
    area = roc_auc_score([1] * 43 + [0] * 20, torch.cat([known, unknown]).numpy())
    assert ood["auroc"]["nearest_mean"] == pytest.approx(area, abs=2e-3)
    cosines = torch.cosine_similarity(means, read[2].mean(0, keepdim=True)).abs()
    assert ood["nc5"] == pytest.approx(float(cosines.mean()), rel=1e-4)

    for words, message in (
        (["--ood", str(images)], "which has classes measured: 'a', 'b', 'c', 'd', 'e'; allowed: images of none"),
        (
            ["--ood", str(tmp_path / "odd"), "--ood_split", "even"],
            "split 'even' is not in the data set; allowed: 'odd'",
        ),
        (["--ood_split", "odd"], "ood_split is 'odd'; allowed: not given without ood"),
        (["--ood", str(tmp_path / "odd"), "--second-pass"], "known samples must be shown by update_known"),
    ):
        assert main([str(run), *words]) == 2
        assert message in capsys.readouterr().err


def test_images_shown_twice_or_features_dropped(run, images, tmp_path):
    found = {}
    for name, words in {"kept": "", "twice": "--second-pass", "dropped": "--cache-mib 0"}.items():
        out = tmp_path / name
        assert main([str(run), "--dataset", str(images), *words.split(), "--output", str(out)]) == 0
        found[name] = collapse(out)["collapse"]
        assert (out / "tsne.png").exists() == (name == "kept")
    assert found["kept"]["nc4"] == found["twice"]["nc4"] and found["dropped"]["nc4"] is None
    assert [found[name]["nc1"] for name in ("twice", "dropped")] == pytest.approx([found["kept"]["nc1"]] * 2, rel=1e-9)


def test_a_run_on_other_images_is_measured_on_all_of_them(run, images, tmp_path, capsys):
    other = datasets.load_from_disk(str(images))["test"]
    datasets.DatasetDict(train=other).save_to_disk(tmp_path / "other")
    assert main([str(run), "--dataset", str(tmp_path / "other"), "--no-tsne", "--output", str(tmp_path / "x")]) == 0
    assert collapse(tmp_path / "x")["images"] == 43
    moved = tmp_path / "moved"
    moved.mkdir()
    config = (run / "config.yaml").read_text().replace(str(images), str(tmp_path / "other"))
    (moved / "config.yaml").write_text(config)
    (moved / "manifest.json").write_bytes((run / "manifest.json").read_bytes())
    (moved / "checkpoint").symlink_to(run / "checkpoint")
    capsys.readouterr()
    assert main([str(moved)]) == 2
    assert "has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: MODEL"),
        ("test_resnet --layer stages", "unrecognized arguments: --layer stages; allowed: what --help lists"),
        ("test_resnet --center median", "center must be one of ('balanced', 'empirical'), got 'median'"),
        ("test_resnet --layers layer9", "layers must be names of modules of ResNet, got 'layer9'"),
        ("test_resnet --iterates", "iterates=True needs a model with an equilibrium layer, got ResNet"),
        ("test_resnet --head fcc", "head must be the name of a module of ResNet, got 'fcc'"),
        ("test_resnet --conventions papyan", "conventions"),
        ("test_resnet --majority 11", "majority (K_A) is 11; allowed: 0 to 10, the number of classes"),
        ("test_resnet --majority 3 3", "majority is [3, 3]; allowed: different classes out of 0 to 9"),
        ("test_resnet --groups a=7-10", "groups['a'] must be different classes in 0..9, got [7, 8, 9, 10]"),
        ("test_resnet --groups a=x", "groups has 'a=x'; allowed: NAME=CLASSES, with classes such as 0-2,5"),
        ("test_resnet --groups a=1 --majority 2", "groups is ['a=1'] and majority is [2]; allowed: one of them"),
        ("test_resnet --cache-mib -1", "cache_bytes must be at least 0, got -1048576"),
        ("test_resnet --cache-mib 9 --second-pass", "cache-mib is 9; allowed: not given with second-pass"),
        ("test_resnet --format jpg", "format is 'jpg'; allowed: one of png, svg, pdf"),
        ("test_resnet --compare nothing", "model 'nothing' is unknown"),
        ("test_resnet --split validation", "split 'validation' is not in the data set; allowed: 'train', 'test'"),
        ("recipes", "model 'recipes' has no config.yaml; allowed: a folder in which recipes/train.py has run"),
        ("test_resnet --output {run}", "exists; allowed: a folder that does not"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    output = [] if "--output" in words else ["--output", str(tmp_path / "x" / "y")]
    assert main([*words.format(run=run).split(), *output]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert out == "" and not list(tmp_path.iterdir())


def test_groups_by_name():
    assert named_group("few=0-2,5") == ("few", [0, 1, 2, 5])
    assert named_group("one=12") == ("one", [12])
    for word in ("few", "few=", "=1", "few=2-1", "few=1,,2", "few=-1"):
        with pytest.raises(ValueError, match="allowed: NAME=CLASSES"):
            named_group(word)


def test_samples_are_taken_evenly_over_classes():
    labels = np.repeat([0, 1, 2, 7], [50, 3, 20, 30])
    chosen = sample_evenly(labels, 40, seed=0)
    assert np.bincount(labels[chosen], minlength=8)[[0, 1, 2, 7]].tolist() == [12, 3, 12, 12]
    assert np.array_equal(chosen, np.unique(chosen)) and np.array_equal(chosen, sample_evenly(labels, 40, seed=0))
    assert not np.array_equal(chosen, sample_evenly(labels, 40, seed=1))
    assert np.bincount(labels[sample_evenly(labels, 500, seed=0)])[[0, 1, 2, 7]].tolist() == [25, 3, 20, 25]
    assert sample_evenly(labels[50:73], 500, seed=0).tolist() == list(range(23))
    assert len(set(sample_evenly(np.arange(30), 9, seed=0))) == 9  # more classes than samples are asked for


def test_of_many_classes_some_are_sampled():
    rank = np.random.default_rng(0).permutation(1000)  # of each class by frequency, 0 the most frequent
    labels = np.repeat(np.arange(1000), 1050 - rank)
    kept, each = np.unique(labels[sample_evenly(labels, 1000, seed=0)], return_counts=True)
    assert len(kept) == 100 and set(each) == {10}
    ranks = np.sort(rank[kept])
    assert np.diff(ranks).max() <= 11 and (ranks[0], ranks[-1]) == (0, 999)


@pytest.mark.parametrize("K", [2, 10])
def test_one_look_at_tsne_tells_collapse_from_none(K):
    """How wide are the classes, of the picture's width?"""
    rng, widths = np.random.default_rng(0), []
    labels = np.repeat(np.arange(K), 100)
    chosen = labels[sample_evenly(labels, 2000, seed=0)]
    for spread in (1.6, 0.02):
        features = rng.normal(size=(K, 64))[chosen] + spread * rng.normal(size=(len(chosen), 64))
        settings = {"groups": {}, "class_names": [str(k) for k in range(K)], "seed": 0, "title": "t"}
        shown = marks(tsne_figure(features.astype(np.float32), chosen, **settings).axes[0])
        points = np.concatenate([points for points, *_ in shown])
        widths.append(np.mean([points.std(0).max() for points, *_ in shown]) / points.std(0).max())
    assert widths[1] < 0.1 and widths[0] > 2.5 * widths[1], widths


def marks(axes):
    """(points, marker's path, colour) of what is drawn."""
    shown = [c for c in axes.collections if len(c.get_offsets())]
    return [(np.asarray(c.get_offsets()), c.get_paths()[0].vertices, tuple(c.get_facecolor()[0])) for c in shown]


@pytest.mark.parametrize("K", [4, 30])
def test_tsne_has_a_colour_for_each_class_and_a_marker_for_each_group(K):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(K), 6)
    features = (50 * rng.normal(size=(K, 8))[labels] + rng.normal(size=(6 * K, 8))).astype(np.float32)
    groups = {"majority": [0, 2], "minority": [k for k in range(K) if k not in (0, 2)]}
    names = [f"class {k}" for k in range(K)]
    figure = tsne_figure(features, labels, groups=groups, class_names=names, seed=0, title="t")
    axes = figure.axes[0]
    shown = marks(axes)
    assert len(shown) == K and all(len(points) == 6 for points, *_ in shown)
    assert len({color for *_, color in shown}) == K
    for k, (points, path, _) in enumerate(shown):
        assert np.array_equal(path, shown[0][1]) == (k in groups["majority"])
        centres = np.stack([np.median(others, axis=0) for others, *_ in shown])  # classes far apart stay so
        nearest = np.square(points[:, None] - centres).sum(2).argmin(1)
        assert (nearest == k).mean() > 0.5
    assert [t.get_text() for t in axes.texts] == (names if K == 4 else [])
    for text, (points, *_) in zip(axes.texts, shown, strict=False):
        away = np.square(points - np.median(points, axis=0)).sum(1)
        assert tuple(points[away.argsort()[0]]) == pytest.approx(text.xy)
    circle = MarkerStyle("o")
    round_path = circle.get_path().transformed(circle.get_transform()).vertices
    assert np.array_equal(shown[0][1], round_path) and not np.array_equal(shown[1][1], round_path)
    assert len(figure.axes) == (1 if K == 4 else 2)  # beside it a colour bar
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["majority", "minority"]
    assert axes.get_title(loc="left") == "t"
    some = tsne_figure(features, labels, groups=groups, class_names=[*names, "absent"], seed=0, title="t").axes[0]
    assert some.get_title(loc="left") == f"t, {K} of {K + 1} classes"


@pytest.mark.parametrize("features", [np.zeros((9, 3)), np.ones((9, 1)), np.arange(9.0)[:, None]])
def test_tsne_of_features_that_hardly_vary(features):
    figure = tsne_figure(features.astype(np.float32), np.arange(9) % 3, groups={}, class_names="abc", seed=0, title="t")
    assert len(marks(figure.axes[0])) == 3 and not figure.legends
