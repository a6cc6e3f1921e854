"""Every setting of a run and every keyword of a model, with values of another type, range or spelling: each ends in a
right run, or in one line with exit code 2, and leaves nothing."""

import dataclasses
import inspect
import itertools
import math

import pytest
import torch
from few_digits import save_few_digits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.errors import UserError
from recipes.settings.config import TrainConfig, parse
from recipes.train import main
from recipes.training.checkpoint import create_model
from timm_deq.models import deq_resnet
from timm_deq.models._factory import create_equilibrium_args

pytestmark = pytest.mark.usefixtures("one_cpu_and_no_network")

NUMBERS = itertools.count()
FIELDS = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in ("output", "resume")]
WORDS = "-1 0 1 2.5 .nan .inf 1e30 true null foo '' [1,2] [] {a:1} [oops ☃".split()

# Of the family's class, and of its solvers and gradients; not those that the recipes give themselves.
KEYWORDS = {
    name
    for function in (deq_resnet.DEQResNet, create_equilibrium_args)
    for name in inspect.signature(function).parameters
    if name not in ("block", "layers", "num_classes", "in_chans", "solver_args", "device", "dtype")
}
VALUES = [-1, 0, 1, 3, 2.5, math.nan, math.inf, 10**30, True, False, None, "foo", "", [], [4, 4, 8, 8], {"a": 1}]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FIELDS), st.sampled_from(WORDS))
def test_any_value_is_taken_or_refused_in_one_line(name, word):
    try:
        config = parse(["--output", "x", f"--{name}", word])
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert parse(["--output", "x", f"--{name}", word]) == config or ".nan" in word


@pytest.mark.parametrize("name", [name for name in FIELDS if len(name) > 4])
def test_a_misspelt_setting_is_recognised(name):
    with pytest.raises(UserError) as caught:
        parse(["--output", "x", f"--{name[:2]}{name[3:]}", "1"])
    assert f"did you mean {name!r}?" in str(caught.value) and "\n" not in str(caught.value)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(KEYWORDS)), st.sampled_from(VALUES))
def test_any_keyword_of_a_model_is_taken_or_refused_in_one_line(name, value):
    arguments = {"channels": [4, 4, 8, 8], "stem_width": 4, "num_groups": 2, name: value}
    try:
        net = create_model(TrainConfig(output="x", model_args=arguments), 3)
    except UserError as error:
        assert "deq_resnet8_cifar" in str(error) or name in str(error)  # `exit_code` puts it on one line
    else:
        assert isinstance(net, torch.nn.Module) and net.num_classes == 3


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = save_few_digits(tmp_path_factory.mktemp("data") / "few", train=8, test=2)
    model = "--model_args.channels [4,4,8,8] --model_args.stem_width 4 --model_args.num_groups 2"
    return [
        *f"--dataset {folder} --imbalance balanced --img_size 16 --max_updates 1 --epochs 1".split(),
        *model.split(),
    ]


@pytest.mark.slow
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FIELDS), st.sampled_from(WORDS))
def test_a_run_is_right_or_one_line_and_nothing_else(few, tmp_path, capsys, name, word):
    folder = tmp_path / str(next(NUMBERS))
    code = main([*few, f"--{name}={word}", "--output", str(folder)])
    err = capsys.readouterr().err.replace("\r", "\n")
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert (folder / "results.json").exists() == (code == 0)
    if code == 2:
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1 and not folder.exists()
