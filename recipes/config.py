"""The settings of a training run: one flat dataclass, from which flags, --help and the YAML of a run folder are
made."""

import dataclasses
import difflib
import math
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from timm.optim import list_optimizers


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run"""

    output: str
    """run folder to create; one that exists is never touched without --resume"""
    resume: str | None = None
    """'auto' continues the run of the output folder, or starts it; or a folder of RUN/states to go on from"""
    seed: int = 0
    """seed of the weights, the split, the imbalance, the order of images and their augmentation"""

    model: str = "deq_resnet8_cifar"
    """any timm model name, those of timm_deq included; or local-dir:PATH, hf-hub:ORG/NAME"""
    model_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the model, e.g. --model_args.equilibrium false --model_args.tol 1e-4"""
    pretrained: bool = False
    """start from pretrained weights"""

    dataset: str = "digits"
    """'digits' (embedded), a folder (parquet, images by class, or saved by datasets), or a Hub dataset id"""
    dataset_config: str | None = None
    """configuration name of a Hub dataset"""
    dataset_revision: str | None = None
    """commit, tag or branch of a Hub dataset"""
    train_split: str = "train"
    """split to train on"""
    test_split: str = "test"
    """split to test on, once, at the end"""
    image_column: str | None = None
    """column of the images; found by its type if not given"""
    label_column: str | None = None
    """column of the classes; found by its type if not given"""
    val_fraction: float = 0.1
    """part of every class of the train split kept for validation, before the imbalance is made; 0 for none"""

    imbalance: Literal["balanced", "two_group"] = "two_group"
    """profile of the training set: as many images of every class, or a majority and a minority of classes"""
    majority: int | list[int] = 3
    """two_group: K_A, the number of majority classes (the first ones), or a list of them"""
    ratio: float = 10.0
    """two_group: R, images of a majority class over images of a minority class"""
    sampler: Literal["instance", "class_balanced"] = "instance"
    """order of training: every image once an epoch, or every class equally often"""

    img_size: int | None = None
    """height and width of the model's input in pixels; the model's own if not given"""
    mean: list[float] | None = None
    """mean that normalises the channels, for pixels in 0..1; the model's own if not given"""
    std: list[float] | None = None
    """standard deviation that normalises the channels; the model's own if not given"""
    interpolation: str | None = None
    """resampling of images (bilinear, bicubic, ...); the model's own if not given"""
    crop_pct: float | None = None
    """part of the resized image that the central crop keeps; the model's own if not given"""
    crop_pad: int = 2
    """augmentation: pixels of padding around the image before a random crop; 0 for none"""
    crop_scale: float | None = None
    """augmentation: smallest part of the area that a random resized crop takes; if given, in place of crop_pad"""
    hflip: float = 0.0
    """augmentation: probability of a horizontal flip (0 for digits, 0.5 for objects)"""
    color_jitter: float = 0.0
    """augmentation: strength of random brightness, contrast and saturation"""
    auto_augment: str | None = None
    """augmentation: a policy in timm's notation, e.g. rand-m9-mstd0.5"""
    re_prob: float = 0.0
    """augmentation: probability of random erasing"""
    workers: int | None = None
    """processes per rank that decode images; chosen by the size of the set if not given"""

    epochs: int = 30
    """passes over the training set; 0 measures the initial model"""
    batch_size: int = 32
    """images of one optimizer update, over all ranks and accumulation steps"""
    gradient_accumulation_steps: int = 1
    """forward passes over which the images of one update are spread"""
    eval_batch_size: int = 128
    """images of one forward pass in evaluation, on each rank"""
    opt: str = "sgd"
    """optimizer, by its name in timm ('sgd' has Nesterov momentum)"""
    lr: float = 0.1
    """peak learning rate"""
    momentum: float = 0.9
    """momentum, for the optimizers that have one"""
    weight_decay: float = 5e-4
    """weight decay; timm leaves biases and normalisation out"""
    clip_grad: float | None = None
    """largest norm of the gradient; not clipped if not given"""
    label_smoothing: float = 0.0
    """label smoothing of the cross-entropy"""
    jacobian_weight: float = 0.0
    """weight of the penalty of the Jacobian at the equilibria"""
    correction_at: list[int] = field(default_factory=list)
    """steps of the solver whose iterates the loss is put on too (fixed-point correction), e.g. --correction_at 2 5"""
    ema_decay: float | None = None
    """decay of a moving average of the weights, which is then what is measured and saved; none if not given"""
    sched: Literal["cosine", "multistep", "step", "poly", "constant", "none"] = "cosine"
    """schedule of the learning rate, stepped at every update"""
    warmup_epochs: int = 1
    """epochs of linear warmup"""
    min_lr: float = 0.0
    """learning rate at the end of the schedule"""
    decay_milestones: list[int] = field(default_factory=list)
    """multistep: epochs at which the learning rate decays"""
    decay_epochs: int = 30
    """step: epochs between decays"""
    decay_rate: float = 0.1
    """step, multistep: factor of a decay; poly: power"""

    compile: bool = False
    """compile the model for training"""

    probe_every: int = 5
    """epochs between measurements of neural collapse on the training images; 0 measures at the end only"""
    select: Literal["last", "best"] = "last"
    """what is tested and saved: the last epoch (neural collapse is about the end of training) or the best on
    validation"""
    log_every: int = 50
    """updates between looks at the loss"""
    checkpoint_every: int | None = None
    """updates between checkpoints for --resume; only at the end of every epoch, as always, if not given"""
    keep_checkpoints: int = 2
    """checkpoints for --resume that are kept, the latest ones; that of the best epoch is kept too with --select best"""
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = None
    """where metrics go besides metrics.jsonl; its package must be installed"""

    def __post_init__(self):
        for least, most, names in (
            (0, 2**32 - 1, "seed"),
            (
                0,
                math.inf,
                "epochs probe_every warmup_epochs crop_pad color_jitter weight_decay momentum min_lr workers "
                "jacobian_weight",
            ),
            (
                1,
                math.inf,
                "batch_size gradient_accumulation_steps eval_batch_size log_every decay_epochs img_size "
                "checkpoint_every keep_checkpoints",
            ),
            (0, 1, "hflip re_prob label_smoothing"),
        ):
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            for name in names.split():
                value = getattr(self, name)
                _check(value is None or (least <= value <= most and math.isfinite(value)), name, value, allowed)
        for most, names in ((math.inf, "lr clip_grad decay_rate"), (1, "crop_pct crop_scale ema_decay")):
            allowed = "above 0" if most == math.inf else f"above 0, at most {most}"
            for name in names.split():
                value = getattr(self, name)
                _check(value is None or (0 < value <= most and math.isfinite(value)), name, value, allowed)
        _check(self.output != "", "output", self.output, "the path of a folder to create")
        _check(self.resume != "", "resume", self.resume, "'auto', or a folder of RUN/states")
        rising = all(a < b for a, b in zip([0, *self.correction_at], self.correction_at, strict=False))
        _check(rising, "correction_at", self.correction_at, "increasing numbers of 1 or more")
        _check(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "0 or more, below 1")
        _check(
            "num_classes" not in self.model_args, "model_args", self.model_args, "no num_classes, which the data gives"
        )
        optimizers = [name for name in list_optimizers() if isinstance(name, str)]
        _check(self.opt in optimizers, "opt", self.opt, f"timm's optimizers{nearest(self.opt, optimizers)}")
        # Settings that contradict each other.
        if self.select == "best":
            _check(self.val_fraction > 0, "val_fraction", self.val_fraction, "above 0 with --select best")
        if self.epochs:
            _check(
                self.warmup_epochs <= self.epochs,
                "warmup_epochs",
                self.warmup_epochs,
                f"0 to {self.epochs}, the epochs",
            )
        if self.sched == "multistep":
            _check(
                self.decay_milestones != [], "decay_milestones", self.decay_milestones, "epochs, with --sched multistep"
            )

    @property
    def profile_parameters(self) -> dict[str, Any]:
        """Arguments of the imbalance profile."""
        return {"majority": self.majority, "ratio": self.ratio} if self.imbalance == "two_group" else {}

    def only(self, *names: str) -> dict[str, Any]:
        """Some settings by name, for functions that take them as keywords of the same name."""
        return {name: getattr(self, name) for name in names}

    def to_yaml(self) -> str:
        """Text that --config reads back to an equal configuration."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _check(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def nearest(word: str, words: Sequence[str]) -> str:
    """A hint for a mistyped word, or nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the command line; --help prints and exits.

    Flags win over the file of --config, wherever they stand.

    Args:
        argv: words of the command line; those of this process if not given.

    Raises:
        ValueError: an unknown flag or key, a value of the wrong type or outside what is allowed, in one line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="accelerate launch recipes/train.py",
        description="Train an image classifier on long-tailed data and measure its neural collapse.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags win over it")
    parser.add_class_arguments(TrainConfig)
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    try:
        namespace = parser.parse_args(_arranged(argv))
    except ArgumentError as error:
        message = re.sub(r'(?:Parser key|Key) "([\w.]+)"', r"\1", " ".join(str(error).split()))
        message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "")
        if unknown := re.match(r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)'", message):
            message += nearest(unknown[1] or unknown[2], names) + "; allowed: the flags that --help lists"
        raise ValueError(message) from None
    return TrainConfig(**{name: namespace[name] for name in names})


def _arranged(argv: Sequence[str] | None) -> list[str]:
    """The words of the command line as jsonargparse wants them: --config before the rest, because it lets the later
    word win, and the words of a list, as in `--correction_at 2 5`, in one."""
    kinds = {f"--{f.name}": (f.type, *typing.get_args(f.type)) for f in dataclasses.fields(TrainConfig)}
    flags: list[list[str]] = []
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--") or not flags:
            flags.append([word])
        else:
            flags[-1].append(word)
    for i, (flag, *values) in enumerate(flags):
        is_list = [typing.get_origin(kind) is list for kind in kinds.get(flag, ())]
        if any(is_list) and len(values) > (0 if is_list[0] else 1) and not values[0].startswith("["):
            flags[i] = [flag, f"[{','.join(values)}]"]
    flags.sort(key=lambda words: words[0].split("=")[0] != "--config")
    return [word for words in flags for word in words]
