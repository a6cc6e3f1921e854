"""The configuration: flags, files, and mistakes."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from recipes.config import TrainConfig, parse

PRESETS = sorted((Path(__file__).parent.parent / "recipes" / "presets").glob("*.yaml"))


def test_the_command_of_the_design_parses():
    words = (
        "--model deq_resnet8_cifar --dataset digits --imbalance two_group --majority 3 --ratio 10 --sampler instance "
        "--epochs 30 --seed 0 --output runs/name"
    ).split()
    assert parse(words) == TrainConfig(output="runs/name", epochs=30)


def test_flags_reach_their_fields_with_their_types():
    words = "--output x --model_args.equilibrium false --model_args.tol 1e-4 --majority [0,4] --clip_grad 1 --hflip 0.5"
    config = parse(words.split())
    assert config.model_args == {"equilibrium": False, "tol": 1e-4}
    assert config.majority == [0, 4]
    assert (config.clip_grad, config.hflip) == (1.0, 0.5)


@pytest.mark.parametrize("words", ["--correction_at 2 5 --lr 1", "--correction_at [2,5]", "--correction_at=[2,5]"])
def test_lists_may_be_several_words(words):
    assert parse(["--output", "x", *words.split()]).correction_at == [2, 5]
    assert parse("--correction_at 7 --majority 0 4 --output x".split()).correction_at == [7]
    assert parse("--correction_at 7 --majority 0 4 --output x".split()).majority == [0, 4]


def test_a_written_configuration_reads_back_equal(tmp_path):
    config = TrainConfig(output="x", model_args={"tol": 1e-5}, majority=[1, 2], lr=3e-5, mean=[0.5, 0.25, 0.1])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert parse(["--config", str(path)]) == config
    assert yaml.safe_load(path.read_text()) == dataclasses.asdict(config)


@pytest.mark.parametrize("words", ["--config {} --lr 0.5", "--lr 0.5 --config {}", "--lr=0.5 --config={}"])
def test_flags_win_over_the_file_wherever_they_stand(tmp_path, words):
    path = tmp_path / "x.yaml"
    path.write_text("output: x\nlr: 0.25\nepochs: 7\n")
    config = parse(words.format(path).split())
    assert (config.lr, config.epochs, config.output) == (0.5, 7, "x")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_parse_and_tell_command_time_and_result(path):
    config = parse(["--config", str(path), "--output", "x"])
    given = yaml.safe_load(path.read_text())
    assert {key: getattr(config, key) for key in given} == given
    head = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert path.name in head and "time:" in head and "result:" in head


def test_presets_are_found():
    assert {path.stem for path in PRESETS} >= {"cifar10_two_group", "digits_balanced"}


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name} " in text
    assert "images of a majority class over images of a minority class" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: output"),
        ("--output x --epoch 3", "unrecognized arguments: --epoch 3 (did you mean 'epochs'?); allowed: "),
        ("--output x --epochs 2.5", "epochs: Expected a int. Got value: 2.5"),
        ("--output x --epochs -1", "epochs is -1; allowed: 0 or more"),
        ("--output x --epochs", "--epochs: expected one argument"),
        ("--output x --sampler fair", "sampler: Expected a Literal['instance', 'class_balanced']. Got value: fair"),
        ("--output x --imbalance step", "imbalance: Expected a Literal['balanced', 'two_group']. Got value: step"),
        ("--output x --opt sdg", "opt is 'sdg'; allowed: timm's optimizers (did you mean 'sgd"),
        ("--output x --majority few", "majority: "),
        ("--output x --batch_size 0", "batch_size is 0; allowed: 1 or more"),
        ("--output x --seed -1", "seed is -1; allowed: 0 to 4294967295"),
        ("--output x --lr 0", "lr is 0.0; allowed: above 0"),
        ("--output x --clip_grad .nan", "clip_grad is nan; allowed: above 0"),
        ("--output x x --lr 1", "unrecognized arguments: x"),
        ("--output x --ratio 1 2", "unrecognized arguments: 2"),
        ("--output x --correction_at 5 2", "correction_at is [5, 2]; allowed: increasing numbers of 1 or more"),
        ("--output x --correction_at 0", "correction_at is [0]; allowed: increasing numbers of 1 or more"),
        ("--output x --jacobian_weight -1", "jacobian_weight is -1.0; allowed: 0 or more"),
        ("--output x --keep_checkpoints 0", "keep_checkpoints is 0; allowed: 1 or more"),
        ("--output x --checkpoint_every 0", "checkpoint_every is 0; allowed: 1 or more"),
        ("--output x --resume=", "resume is ''; allowed: 'auto', or a folder of RUN/states"),
        ("--output x --hflip 1.5", "hflip is 1.5; allowed: 0 to 1"),
        ("--output x --val_fraction 1", "val_fraction is 1.0; allowed: 0 or more, below 1"),
        ("--output x --val_fraction 0 --select best", "val_fraction is 0.0; allowed: above 0 with --select best"),
        ("--output x --epochs 3 --warmup_epochs 5", "warmup_epochs is 5; allowed: 0 to 3"),
        ("--output x --sched multistep", "decay_milestones is []; allowed: epochs"),
        ("--output x --model_args.num_classes 7", "model_args is {'num_classes': 7}; allowed: no num_classes"),
        ("--output x --model_args 3", "model_args: Expected a dict. Got value: 3"),
        ("--output x --config nowhere.yaml", "nowhere.yaml"),
        ("--output x --config", "--config: expected one argument"),
        ("--output=", "output is ''; allowed: the path of a folder to create"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message):
    with pytest.raises(ValueError) as raised:
        parse(words.split())
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\nmodle: resnet18\n", "Option 'modle' is not accepted (did you mean 'model'?)"),
        ("output: x\nepochs: many\n", "epochs: Expected a int. Got value: many"),
        ("output: [\n", "config"),
        ("!!python/object/apply:os.getcwd []\n", "config"),
    ],
)
def test_mistakes_in_a_file_are_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        parse(["--config", str(path)])
    assert message in str(raised.value) and "\n" not in str(raised.value)
