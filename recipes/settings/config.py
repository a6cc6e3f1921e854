"""The settings of a training run: one flat dataclass, from which flags, --help and the YAML of a run folder are
made."""

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from timm.optim import list_optimizers

from recipes.errors import UserError, check, did_you_mean
from recipes.settings.command_line import arranged
from recipes.settings.contradictions import check_contradictions, profile_settings


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
    """any timm model name, those of timm_deq included; or a run folder, local-dir:PATH, hf-hub:ORG/NAME"""
    model_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the model, e.g. --model_args.equilibrium false --model_args.tol 1e-4"""
    pretrained: bool = False
    """start from pretrained weights"""
    classifier: Literal["linear", "cosine", "etf"] = "linear"
    """last layer: the model's own, one of cosines, or one that is fixed to a simplex equiangular tight frame"""
    classifier_scale: float | None = None
    """cosine, etf: the logit of two vectors of the same direction; 30 if not given"""
    stage: Literal["crt", "lws"] | None = None
    """train nothing but the classifier of a trained --model: drawn anew (crt), or one factor for each class (lws)"""

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

    imbalance: Literal["balanced", "two_group", "step", "exponential", "pareto", "explicit", "as_is"] | None = None
    """profile of the training set: how many images of each class are kept; two_group if not given"""
    majority: int | list[int] | None = None
    """two_group: K_A, the number of majority classes, or a list of them; 3 if not given"""
    minority: int | float | None = None
    """step: the number of minority classes, or their share of the classes, as in 0.5"""
    ratio: float | None = None
    """two_group, step, exponential, pareto: R, images of the largest class over the smallest; 10 if not given"""
    alpha: float | None = None
    """pareto: exponent of the distribution; 6 if not given"""
    largest: int | None = None
    """exponential, pareto: images of the largest class; as many as every class has if not given"""
    counts: list[int] | None = None
    """explicit: images of class 0, 1, ..."""
    class_order: Literal["given", "random"] | list[int] | None = None
    """the classes from the largest to the smallest: as they are numbered (if not given), at random, or a list"""
    grouping: Literal["thresholds", "quantiles", "majority"] | None = None
    """groups whose accuracy is told: many, medium and few by images or by rank, or majority and minority; those of the
    profile if not given"""
    bounds: list[float] | None = None
    """thresholds: few below the first number of images, many above the second; quantiles: the same in shares of the
    classes"""
    manifest: str | None = None
    """manifest.json of a run, for the images of that run, those of validation included, in place of a profile"""
    sampler: Literal[
        "instance",
        "square_root",
        "class_balanced",
        "class_aware",
        "reverse",
        "progressively_balanced",
        "repeat_factor",
    ] = "instance"
    """order of training: every image once an epoch, every class equally often, or something in between"""
    repeat_threshold: float | None = None
    """repeat_factor: share of the images below which a class is repeated; 1 / K if not given"""
    defer: int = 0
    """epochs of 'instance' before the sampler begins"""

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
    cutout: int = 0
    """augmentation: side in pixels of a square that is erased; 0 for none"""
    mixup_alpha: float = 0.0
    """augmentation: parameter of the beta distribution of mixup; 0 for none"""
    cutmix_alpha: float = 0.0
    """augmentation: the same of cutmix; with both, every batch gets one of them"""
    mix_prob: float | None = None
    """augmentation: probability that a batch is mixed; 1 if not given"""
    pipeline: Literal["auto", "resident", "workers"] = "auto"
    """keep decoded images on the device, decode them in workers whenever drawn, or whichever fits"""
    budget: float = 2048.0
    """auto: MiB that resident images may take, in 8 bits per channel"""
    workers: int | None = None
    """processes per rank that decode images; chosen by the size of the set if not given"""

    epochs: int = 30
    """passes over the training set; 0 measures the initial model"""
    max_updates: int | None = None
    """updates after which the run ends, as at the end of its last epoch, but on the schedule of the whole"""
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
    loss: Literal[
        "cross_entropy",
        "mse",
        "focal",
        "class_balanced",
        "ldam",
        "balanced_softmax",
        "logit_adjustment",
        "vs",
    ] = "cross_entropy"
    """what is minimised, given the images of each class"""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the loss, e.g. --loss_args.gamma 2"""
    label_smoothing: float = 0.0
    """part of each label that is spread over all classes"""
    reweight_epoch: int | None = None
    """epoch, from 0, from which on classes weigh by their effective number of images; never if not given"""
    reweight_beta: float | None = None
    """of the effective number of images: 0 (all weigh the same) to 1 (inverse to their images); 0.9999 if not given"""
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
                "jacobian_weight defer cutout mixup_alpha cutmix_alpha budget reweight_epoch",
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
        rising = all(a < b for a, b in zip([0, *self.correction_at], self.correction_at, strict=False))
        check(rising, "correction_at", self.correction_at, "increasing numbers of 1 or more")
        check(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "0 or more, below 1")
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

    Flags win over the file of --config, wherever they stand.

    Args:
        argv: words of the command line; those of this process if not given.

    Raises:
        UserError: an unknown flag or key, a value of the wrong type or outside what is allowed, in one line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="accelerate launch recipes/train.py",
        description="Train an image classifier on long-tailed data and measure its neural collapse.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    text = "YAML file of these settings, or the name of a preset; flags win over it"
    parser.add_argument("--config", action="config", help=text)
    parser.add_class_arguments(TrainConfig)
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    try:
        namespace = parser.parse_args(arranged(sys.argv[1:] if argv is None else argv, TrainConfig))
    except ArgumentError as error:
        message = re.sub(r'(?:Parser key|Key) "([\w.]+)"', r"\1", " ".join(str(error).split()))
        message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "")
        if unknown := re.match(r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)'", message):
            message += did_you_mean(unknown[1] or unknown[2], names) + "; allowed: the flags that --help lists"
        raise UserError(message) from None
    return TrainConfig(**{name: namespace[name] for name in names})
