"""The model card of runs of all kinds, read as the Hub reads it."""

import re
import shlex

import pytest
from hub_store import card_errors
from huggingface_hub import ModelCard

from recipes.errors import UserError
from recipes.results.card import Facts, model_card
from recipes.settings.command_line import words_of
from recipes.settings.config import TrainConfig, parse
from recipes.settings.hub_name import check_destination, check_license, parse_hub_name

NAMES = ["a|b", "two\nlines", "<b>bold</b>"]


def facts(**changes):
    collapse = {"nc1": 0.5, "nc2_etf": None, "nc3": 1.25, "nc4": 1.0}
    results = {
        "test": {"overall": 0.5, "majority": 1.0, "minority": None},
        "test_per_class": dict(zip(NAMES, [1.0, None, 0.25], strict=True)),
        "collapse": {**collapse, "groups": {"majority": collapse}},
        "solver": None,
        "images": {"train": 12, "val": 3, "test": 4},
        "parameters": 1234567,
        "seconds": 12.3,
        "device": "cpu",
        "ranks": 2,
        "mixed_precision": "no",
        "versions": {"torch": "2.14.1"},
    }
    given = {
        "repo": "lab/net",
        "architecture": "resnet18",
        "plugin": False,
        "solver": {},
        "config": {"dataset": "/home/ada/my data/", "test_split": "test", "seed": 7},
        "results": results | changes.pop("results", {}),
        "profile": ("explicit", {"counts": [8, 3, 1]}),
        "counts": [8, 3, 1],
        "groups": {"majority": [0], "minority": [1, 2]},
        "manifest_sha256": "0" * 64,
        "command": ["accelerate", "launch", "recipes/train.py", "--message", "it's"],
        "pictures": ["figures/gram.png"],
    }
    return Facts(**given | changes)


def tables(text):
    """Rows of cells of each table, whose bars are not those that are escaped."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]


def test_an_explicit_model_of_a_folder():
    card = ModelCard(model_card(facts()))
    assert card_errors(card.data.to_dict()) == [] and card.data.to_dict().get("datasets") is None
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results] == [
        ("accuracy", 0.5),
        ("accuracy, majority classes", 1.0),
    ]
    assert "timm_deq" not in card.text and "equilibrium" not in card.text
    assert "/home/ada" not in str(card) and "my data" in card.text
    assert shlex.join(["--message", "it's"]) in card.text and "1,234,567" in card.text
    groups, classes, collapse = tables(card.text)
    assert [[cell.strip() for cell in row] for row in groups[2:]] == [
        ["overall", "3", "50.00", "-"],
        ["majority", "1", "100.00", "-"],
        ["minority", "2", "-", "-"],
    ]
    assert all(len(row) == 3 for row in classes) and len(classes) == 5
    assert "two lines" in card.text and "<b>" not in card.text.replace(r"\<b\>", "")
    assert [cell.strip() for cell in collapse[2]] == ["overall", "0.5", "-", "1.25", "1"]


def test_an_equilibrium_model_of_the_hub():
    point = {"accuracy": {"overall": 0.25, "majority": None}}
    results = {
        "calibration_error": {"overall": 0.125, "majority": None},
        "solver": {"mean_steps": 7.5, "converged": 0.5},
        "anytime": [{"max_steps": 1, **point}, {"max_steps": 2, **point}],
    }
    config = {"dataset": "lab/digits", "dataset_config": "small", "test_split": "test", "seed": 7}
    kind = {"plugin": True, "solver": {"solver": {"name": "Picard"}}, "architecture": "deq_resnet8_cifar"}
    card = ModelCard(
        model_card(facts(results=results, config=config, dataset_id="lab/digits", base_model="a/b", **kind))
    )
    assert card_errors(card.data.to_dict()) == []
    assert card.data.datasets == ["lab/digits"] and card.data.base_model == "a/b"
    assert "deep-equilibrium" in card.data.tags
    assert card.data.eval_results[-1].metric_value == 0.125 and card.data.eval_results[0].dataset_config == "small"
    assert card.text.count("import timm_deq") == 3  # timm, transformers, and in words
    assert "`--model_args.equilibrium false` with the same command trains its explicit twin." in card.text
    assert [cell.strip() for cell in tables(card.text)[-1][-1]] == ["2", "25.00", "-"]
    twin = model_card(facts(twin="lab/deq", plugin=True))
    assert "Its deep equilibrium twin: [lab/deq](https://huggingface.co/lab/deq)." in twin


def test_many_classes_are_left_to_results_json():
    names = [str(k) for k in range(21)]
    text = model_card(facts(counts=[1] * 21, results={"test_per_class": dict.fromkeys(names, 0.5)}))
    assert len(tables(text)) == 2


@pytest.mark.parametrize(
    "words",
    [
        "--output runs/x",
        "--output 5 --majority 1 2 --ratio 20 --model_args.equilibrium false --model_args.tol 1e-05",
        "--output x --model_args.gradient phantom --model_args.null_like 'null' --class_order 2 0 1",
        "--output x --defer 3 --sampler reverse --select best --val_fraction 0.2",
        "--output x --push_to_hub lab/net --private --message 'a title, of: words' --sampler class_aware",
        "--output x --loss vs --loss_args.gamma 0.25 --imbalance step --minority 0.5 --tracker tensorboard",
    ],
)
def test_the_command_of_a_card_gives_the_same_settings(words):
    config = parse(shlex.split(words))
    assert parse(words_of(config)) == config
    assert parse(shlex.split(shlex.join(words_of(config)))) == config


def test_the_command_is_the_shortest():
    assert words_of(TrainConfig(output="x", lr=0.1, majority=[1, 2])) == ["--output", "x", "--majority", "[1, 2]"]


@pytest.mark.parametrize("name", ["hf-hub:net", "hf-hub:lab/net", "hf-hub:lab/n.e-t_2@main", "hf-hub:a/b@try/it.1"])
def test_names_of_the_hub(name):
    repo, revision = parse_hub_name(name)
    assert name == f"hf-hub:{repo}" + (f"@{revision}" if revision else "")


@pytest.mark.parametrize(
    "name",
    "hf-hub: hf-hub:a/b/c hf-hub:a//b hf-hub:/a hf-hub:a/ hf-hub:.a/b hf-hub:a/b@ hf-hub:a/b@../c hf-hub:a/b@c/../d "
    "hf-hub:a/b@/c hf-hub:a/b@c@d hf-hub:a/b.git hf-hub:a/b--c hf-hub:a/b@c.lock hf-hub:a/b@.c hf-hub:a/%2e%2e "
    "hf-hub:a/é hf-hub:a/b@c\\d hf-hub:a/b@c..d hf-hub:a/b..c hf-hub:a/b\n local-dir:a".split(" "),
)
def test_names_that_the_hub_cannot_have(name):
    with pytest.raises(UserError, match="^model is .*; allowed: hf-hub:ORG/NAME, or hf-hub:ORG/NAME@REVISION$"):
        parse_hub_name(name)


def test_destinations_and_licenses():
    check_destination("lab/" + "n" * 92, "a/branch")
    check_license("cc-by-4.0")
    for repo, revision in (("net", None), ("lab/" + "n" * 93, None), ("lab/net", "refs/heads/x"), ("lab/net", "")):
        with pytest.raises(UserError):
            check_destination(repo, revision)
    for wrong in ("", "MIT", "my license", "-"):
        with pytest.raises(UserError, match="^license is "):
            check_license(wrong)
