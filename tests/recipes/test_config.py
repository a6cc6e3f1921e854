"""The configuration: flags, files, and mistakes."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from recipes.settings.config import TrainConfig, parse

PRESETS = sorted((Path(__file__).parents[2] / "recipes" / "presets").glob("*.yaml"))


def test_the_command_of_the_design_parses():
    words = (
        "--model deq_resnet8_cifar --dataset digits --imbalance two_group --majority 3 --ratio 10 --sampler instance "
        "--epochs 30 --seed 0 --output runs/name"
    ).split()
    assert parse(words) == TrainConfig(output="runs/name", imbalance="two_group", majority=3, ratio=10.0)


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


def test_a_preset_is_known_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in PRESETS:
        assert parse(["--config", path.stem, "--output", "x"]) == parse(["--config", str(path), "--output", "x"])
    Path("cifar10_lt").write_text("epochs: 1\nwarmup_epochs: 0\n")  # a file of the same name comes first
    assert parse(["--config=cifar10_lt", "--output", "x"]).epochs == 1


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    usage, _, rest = out.partition("\n\n")
    assert usage.count("\n") == 0 and rest.index("most used:") < rest.index("--output ") < 1000
    text = " ".join(out.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name} " in text
    assert "R, images of the largest class over the smallest" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: output"),
        ("--output x --epoch 3", "unrecognized arguments: --epoch 3 (did you mean 'epochs'?); allowed: "),
        ("--output x --epochs 2.5", "epochs is 2.5; allowed: a whole number"),
        ("--output x --epochs -1", "epochs is -1; allowed: 0 or more"),
        ("--output x --epochs", "--epochs: expected one argument"),
        ("--output x --sampler fair", "sampler is 'fair'; allowed: 'instance', 'square_root', 'class_balanced', "),
        ("--output x --loss focall", "'balanced_softmax', 'logit_adjustment', 'vs' (did you mean 'focal'?)"),
        ("--output x --imbalance exponental", "imbalance is 'exponental'; allowed: 'balanced', 'two_group', "),
        ("--output x --class_order randm", "'given', 'random', null, a list (did you mean 'random'?)"),
        ("--output x --counts 1 x", "counts is [1, 'x']; allowed: a whole number, null, a list"),
        ("--output x --learning_rate 1", "unrecognized arguments: --learning_rate 1 (did you mean 'lr'?); allowed: "),
        ("--output x --batch-size 1", "(did you mean 'batch_size'?)"),
        ("--output x --std 0 1 1", "std is [0.0, 1.0, 1.0]; allowed: numbers above 0"),
        ("--output x --imbalance long", "'exponential', 'pareto', 'explicit', 'as_is', null"),
        ("--output x --opt sdg", "opt is 'sdg'; allowed: timm's optimizers (did you mean 'sgd"),
        ("--output x --majority few", "majority is 'few'; allowed: a whole number, null, a list"),
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
        ("--output x --sched multistep", "decay_milestones is []; allowed: epochs, with multistep"),
        ("--output x --model_args.num_classes 7", "model_args is {'num_classes': 7}; allowed: no num_classes"),
        ("--output x --model_args 3", "model_args is 3; allowed: keys with values"),
        ("--output x --config nowhere.yaml", "config is 'nowhere.yaml'; allowed: a YAML file, or one of cifar100_lt, "),
        ("--output x --config cifar10lt", "imagenet_lt (did you mean 'cifar10_lt'?)"),
        ("--output x --config .", "config is '.'; allowed: a YAML file, or one of "),
        ("--output x --config", "--config: expected one argument"),
        ("--output=", "output is ''; allowed: the path of a folder to create"),
        (
            "--output x --imbalance step --minority 3 --imbalance=exponential",
            "--imbalance is given twice, as 'step' and 'exponential'; allowed: once",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(words, message):
    with pytest.raises(ValueError) as raised:
        parse(words.split())
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(["--output=~/x", "--model", "~/y", "--dataset=~/z", "--train_split=~/t"])
    assert (config.output, config.model, config.dataset) == tuple(f"{tmp_path}/{name}" for name in "xyz")
    assert config.train_split == "~/t"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\nmodle: resnet18\n", "Option 'modle' is not accepted (did you mean 'model'?)"),
        ("output: x\nepochs: many\n", "epochs is 'many'; allowed: a whole number"),
        ("output: [\n", "config"),
        ("- output\n- x\n", "x.yaml' holds a list; allowed: a line NAME: VALUE for each setting"),
        ("output x\n", "x.yaml' holds a text; allowed: a line NAME: VALUE for each setting"),
        ("output: x\nimbalance: step\nimbalance: exponential\n", "imbalance is given twice in "),
        ("!!python/object/apply:os.getcwd []\n", "config"),
    ],
)
def test_mistakes_in_a_file_are_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        parse(["--config", str(path)])
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "profile", "parameters"),
    [
        ("", "two_group", {"majority": 3, "ratio": 10.0}),
        ("--majority 1 4 --class_order null", "two_group", {"majority": [1, 4], "ratio": 10.0}),
        ("--imbalance balanced", "balanced", {}),
        ("--imbalance as_is", "as_is", {}),
        ("--imbalance step --minority 0.5", "step", {"minority": 0.5, "ratio": 10.0}),
        ("--imbalance step --minority 2 --ratio 5", "step", {"minority": 2, "ratio": 5.0}),
        ("--largest 9", "two_group", {"majority": 3, "ratio": 10.0, "largest": 9}),
        ("--imbalance exponential --class_order given", "exponential", {"ratio": 10.0}),
        (
            "--imbalance exponential --class_order 2 0 1 --largest 9",
            "exponential",
            {"ratio": 10.0, "largest": 9, "class_order": [2, 0, 1]},
        ),
        (
            "--imbalance pareto --class_order random --alpha 3",
            "pareto",
            {"ratio": 10.0, "alpha": 3.0, "class_order": "random"},
        ),
        ("--imbalance explicit --counts 5 4 3", "explicit", {"counts": [5, 4, 3]}),
    ],
)
def test_a_profile_gets_what_it_reads(words, profile, parameters):
    config = parse(["--output", "x", *words.split()])
    assert (config.profile, config.profile_parameters) == (profile, parameters)
    for name, value in parameters.items():
        assert type(config.profile_parameters[name]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--imbalance explicit", "counts is None; allowed: a value, with imbalance 'explicit'"),
        ("--imbalance step", "minority is None; allowed: a value, with imbalance 'step'"),
        ("--counts 3 4", "counts is [3, 4]; allowed: not given with imbalance 'two_group'"),
        ("--majority 0 1 --class_order random", "class_order is 'random'; allowed: not given with a list of majority"),
        (
            "--imbalance balanced --class_order random",
            "class_order is 'random'; allowed: not given with imbalance 'b",
        ),
        ("--imbalance as_is --class_order 1 0", "class_order is [1, 0]; allowed: not given with imbalance 'as_is'"),
        ("--imbalance explicit --counts 3 4 --class_order given", "class_order is 'given'; allowed: not given with"),
        ("--imbalance exponential --alpha 2", "alpha is 2.0; allowed: not given with imbalance 'exponential'"),
        ("--imbalance as_is --largest 9", "largest is 9; allowed: not given with imbalance 'as_is'"),
        ("--minority 2", "minority is 2; allowed: not given with imbalance 'two_group'"),
        ("--imbalance balanced --ratio 5", "ratio is 5.0; allowed: not given with imbalance 'balanced'"),
        ("--imbalance pareto --majority 5", "majority is 5; allowed: not given with imbalance 'pareto'"),
        ("--bounds 5 50", "bounds is [5.0, 50.0]; allowed: not given without --grouping thresholds or quantiles"),
        ("--bounds 5 50 --grouping majority", "bounds is [5.0, 50.0]; allowed: not given without --grouping thresh"),
        ("--bounds 5 9 50 --grouping thresholds", "bounds is [5.0, 9.0, 50.0]; allowed: two numbers"),
        ("--manifest m --imbalance balanced", "imbalance is 'balanced'; allowed: not given with a manifest"),
        ("--manifest m --ratio 10", "ratio is 10.0; allowed: not given with a manifest"),
        ("--manifest m --grouping quantiles", "grouping is 'quantiles'; allowed: not given with a manifest"),
        ("--repeat_threshold 0.1", "repeat_threshold is 0.1; allowed: not given with sampler 'instance'"),
        ("--repeat_threshold 2 --sampler repeat_factor", "repeat_threshold is 2.0; allowed: above 0, at most 1"),
        ("--defer 2", "defer is 2; allowed: 0 with sampler 'instance'"),
        ("--defer 30 --sampler reverse", "defer is 30; allowed: 0 to 29, below the epochs"),
        ("--mix_prob 0.5", "mix_prob is 0.5; allowed: not given without mixup_alpha or cutmix_alpha"),
        ("--mixup_alpha -1", "mixup_alpha is -1.0; allowed: 0 or more"),
        ("--budget -1", "budget is -1.0; allowed: 0 or more"),
        ("--max_updates 0", "max_updates is 0; allowed: 1 or more"),
        *(
            (f"--sampler {sampler} --loss {loss}", f"loss is '{loss}'; allowed: none that corrects what sampler")
            for sampler in ("class_balanced", "class_aware", "reverse")
            for loss in ("class_balanced", "balanced_softmax", "logit_adjustment", "vs")
        ),
        ("--sampler reverse --reweight_epoch 9", "reweight_epoch is 9; allowed: none that corrects what sampler 'rev"),
        ("--loss ldam", "loss is 'ldam'; allowed: ldam with classifier 'cosine' or 'etf' alone"),
        ("--loss ldam --classifier etf --loss_args.scale 9", "loss_args.scale is 9; allowed: 30, the scale of the"),
        (
            "--loss ldam --classifier etf --loss_args.scale 30 --classifier_scale 8",
            "loss_args.scale is 30; allowed: 8, the scale of the classifier",
        ),
        ("--classifier_scale 9", "classifier_scale is 9.0; allowed: not given with classifier 'linear'"),
        ("--loss mse --classifier cosine", "loss is 'mse'; allowed: mse with classifier 'linear', not 'cosine'"),
        ("--loss mse --classifier etf", "loss is 'mse'; allowed: mse with classifier 'linear', not 'etf'"),
        ("--reweight_epoch 30", "reweight_epoch is 30; allowed: 0 to 29, below the epochs"),
        ("--reweight_beta 0.9", "reweight_beta is 0.9; allowed: not given without reweight_epoch or loss 'class_bal"),
        ("--loss_args.beta 0.9", "loss_args is {'beta': 0.9}; allowed: no beta, which --reweight_beta is for"),
        ("--loss_args.label_smoothing 0.1", "no label_smoothing, which --label_smoothing is for"),
        ("--loss_args.reweight_epoch 3", "no reweight_epoch, which --reweight_epoch is for"),
        ("--stage crt", "model is 'deq_resnet8_cifar'; allowed: with stage 'crt' a run folder or local-dir:FOLDER"),
        ("--stage lws --model local-dir:x --classifier etf", "classifier is 'etf'; allowed: 'linear' with stage 'lws'"),
        ("--stage crt --model runs/x --jacobian_weight 1", "jacobian_weight is 1.0; allowed: none with stage 'crt'"),
        ("--stage lws --model runs/x --correction_at 2 5", "correction_at is [2, 5]; allowed: none with stage 'lws'"),
    ],
)
def test_contradictions_are_told_in_one_line(words, message):
    with pytest.raises(ValueError) as raised:
        parse(["--output", "x", *words.split()])
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words",
    [
        "--sampler square_root --loss balanced_softmax",
        "--sampler reverse --loss focal --defer 29",
        "--sampler repeat_factor --repeat_threshold 0.2 --loss vs",
        "--loss ldam --classifier cosine --loss_args.scale 8 --classifier_scale 8 --reweight_epoch 29",
        "--loss class_balanced --reweight_beta 0.99",
        "--manifest runs/x/manifest.json --select best --val_fraction 0",
        "--epochs 0",
        "--epochs 3 --warmup_epochs 3",
        "--stage crt --model runs/x --sampler class_balanced",
        "--grouping thresholds --bounds 5 50",
    ],
)
def test_what_goes_together_is_allowed(words):
    parse(["--output", "x", *words.split()])
