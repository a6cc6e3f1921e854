"""The settings of a training run, flat, from which flags, --help and the YAML of a run folder are made."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from timm.optim import list_optimizers

from recipes.errors import UserError, check, did_you_mean
from recipes.settings.command_line import arranged, refusal
from recipes.settings.contradictions import check_contradictions, profile_settings
from recipes.settings.sections import (
    SECTIONS,
    DataSettings,
    Essentials,
    HubSettings,
    ImageSettings,
    ImbalanceSettings,
    LossSettings,
    MeasureSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of both Pillow and timm
PATHS = ("output", "resume", "model", "dataset", "manifest")  # settings that may name a file or a folder, as in ~/x


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    HubSettings,
    MeasureSettings,
    OptimizerSettings,
    LossSettings,
    ImageSettings,
    ImbalanceSettings,
    DataSettings,
    ModelSettings,
    RunSettings,
    Essentials,
):
    """The settings of a training run, checked one by one and together.

    The fields of dataclasses come in the reverse order of the bases: that of --help.

    Raises:
        UserError: a setting out of its range, or settings that contradict each other.
    """

    def __post_init__(self):
        for least, most, names in (
            (0, 2**32 - 1, "seed"),
            (
                0,
                math.inf,
                "epochs probe_every warmup_epochs crop_pad color_jitter weight_decay momentum min_lr workers "
                "jacobian_weight defer skip_corrupt cutout mixup_alpha cutmix_alpha budget reweight_epoch",
            ),
            (
                1,
                math.inf,
                "batch_size gradient_accumulation_steps eval_batch_size log_every decay_epochs img_size "
                "checkpoint_every keep_checkpoints max_updates",
            ),
            (0, 1, "hflip re_prob label_smoothing mix_prob reweight_beta"),
        ):
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            for name in names.split():
                value = getattr(self, name)
                check(value is None or (least <= value <= most and math.isfinite(value)), name, value, allowed)
        for most, names in (
            (math.inf, "lr clip_grad decay_rate classifier_scale"),
            (1, "crop_pct crop_scale ema_decay repeat_threshold"),
        ):
            allowed = "above 0" if most == math.inf else f"above 0, at most {most}"
            for name in names.split():
                value = getattr(self, name)
                check(value is None or (0 < value <= most and math.isfinite(value)), name, value, allowed)
        check(self.output != "", "output", self.output, "the path of a folder to create")
        check(self.resume != "", "resume", self.resume, "'auto', or a folder of RUN/states")
        known = self.interpolation in (None, *INTERPOLATIONS)
        hint = did_you_mean(self.interpolation or "", INTERPOLATIONS)
        check(known, "interpolation", self.interpolation, f"{', '.join(INTERPOLATIONS)}{hint}")
        check(self.std is None or all(value > 0 for value in self.std), "std", self.std, "numbers above 0")
        rising = all(a < b for a, b in zip([0, *self.correction_at], self.correction_at, strict=False))
        check(rising, "correction_at", self.correction_at, "increasing numbers of 1 or more")
        check(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "0 or more, below 1")
        carved = self.test_fraction
        check(carved is None or 0 < carved < 1, "test_fraction", carved, "above 0, below 1")
        check(
            "num_classes" not in self.model_args, "model_args", self.model_args, "no num_classes, which the data gives"
        )
        optimizers = [name for name in list_optimizers() if isinstance(name, str)]
        check(self.opt in optimizers, "opt", self.opt, f"timm's optimizers{did_you_mean(self.opt, optimizers)}")
        check_contradictions(self)

    @property
    def profile(self) -> str:
        """Name of the imbalance profile."""
        return self.imbalance or "two_group"

    @property
    def profile_parameters(self) -> dict[str, Any]:
        """Arguments of the imbalance profile; 'given', the order of classes that goes without saying, is left out."""
        given = self.only(*profile_settings(self.profile))
        for name, value in {"majority": 3, "ratio": 10.0}.items():
            if name in given and given[name] is None:
                given[name] = value
        return {name: value for name, value in given.items() if value not in (None, "given")}

    def only(self, *names: str) -> dict[str, Any]:
        """Some settings by name, for functions that take them as keywords of the same name."""
        return {name: getattr(self, name) for name in names}

    def to_yaml(self) -> str:
        """Text that --config reads back to an equal configuration."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the command line; --help prints and exits.

    Flags win over the file of --config, in whatever order they are given.

    Args:
        argv: words of the command line; those of this process if not given.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type or outside what is allowed, in one line.
    """
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    try:
        namespace = _parser().parse_args(arranged(sys.argv[1:] if argv is None else argv, TrainConfig))
    except ArgumentError as error:
        raise UserError(refusal(str(error), names)) from None
    values = {name: namespace[name] for name in names}
    for name in PATHS:
        if isinstance(values[name], str):
            values[name] = os.path.expanduser(values[name])
    return TrainConfig(**values)


@functools.cache
def _parser() -> ArgumentParser:
    """The parser of the command line, which takes a tenth of a second to build."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="accelerate launch recipes/train.py",
        usage="%(prog)s --output FOLDER [--config FILE] [--SETTING VALUE ...]",
        description="Train an image classifier on long-tailed data and measure its neural collapse.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    text = "YAML file of these settings, or the name of a preset; flags win over it"
    parser.add_argument("--config", action="config", help=text)
    for section in SECTIONS:
        parser.add_class_arguments(section)
    return parser
