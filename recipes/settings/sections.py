"""The settings of a training run by section: a dataclass for each group of --help.

A docstring below a field is its help text. The first section has what people change most.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Essentials:
    """most used"""

    output: str
    """run folder to create; one that exists is never touched without --resume"""
    dataset: str = "digits"
    """'digits' (embedded), a folder (parquet, images by class, or saved by datasets), or a Hub dataset id"""
    model: str = "deq_resnet8_cifar"
    """any timm model name, those of timm_deq included; or a run folder, local-dir:PATH, hf-hub:ORG/NAME"""
    model_args: dict[str, Any] = field(default_factory=dict)
    """arguments of the model, e.g. --model_args.equilibrium false --model_args.tol 1e-4"""
    imbalance: Literal["balanced", "two_group", "step", "exponential", "pareto", "explicit", "as_is"] | None = None
    """profile of the training set: how many images of each class are kept; two_group if not given"""
    ratio: float | None = None
    """two_group, step, exponential, pareto: R, images of the largest class over the smallest; 10 if not given"""
    epochs: int = 30
    """passes over the training set; 0 measures the initial model"""
    batch_size: int = 32
    """images of one optimizer update, over all ranks and accumulation steps"""
    lr: float = 0.1
    """peak learning rate"""
    seed: int = 0
    """seed of the weights, the split, the imbalance, the order of images and their augmentation"""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """interrupted runs"""

    resume: str | None = None
    """'auto' continues the run of the output folder, or starts it; or a folder of RUN/states to go on from"""
    checkpoint_every: int | None = None
    """updates between checkpoints for --resume; only at the end of every epoch, as always, if not given"""
    keep_checkpoints: int = 2
    """checkpoints for --resume that are kept, the latest ones; that of the best epoch is kept too with --select best"""
    deterministic: bool = True
    """on a GPU: take sums in one order; an operation that cannot is told by a warning"""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """model"""

    pretrained: bool = False
    """start from pretrained weights"""
    classifier: Literal["linear", "cosine", "etf"] = "linear"
    """last layer: the model's own, one of cosines, or one that is fixed to a simplex equiangular tight frame"""
    classifier_scale: float | None = None
    """cosine, etf: the logit of two vectors of the same direction; 30 if not given"""
    stage: Literal["crt", "lws"] | None = None
    """train nothing but the classifier of a trained --model: drawn anew (crt), or one factor for each class (lws)"""
    ema_decay: float | None = None
    """decay of a moving average of the weights, which is then what is measured and saved; none if not given"""
    compile: bool = False
    """compile the model for training"""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """data set"""

    dataset_config: str | None = None
    """configuration name of a Hub dataset"""
    dataset_revision: str | None = None
    """commit, tag or branch of a Hub dataset"""
    train_split: str = "train"
    """split to train on"""
    test_split: str = "test"
    """split to test on, once, at the end"""
    test_fraction: float | None = None
    """part of every class of the train split kept for testing, of a data set without a test split"""
    val_split: str | None = None
    """split to validate on; if not given, val_fraction of the train split"""
    image_column: str | None = None
    """column of the images; found by its type if not given"""
    label_column: str | None = None
    """column of the classes, or FIELD.OF.RECORDS; the one called label, or the only one that can be it, if not given"""
    skip_corrupt: int = 0
    """images that may be left out, and are listed, because they cannot be decoded; one more ends the run"""
    val_fraction: float = 0.1
    """part of every class of the train split kept for validation, before the imbalance is made; 0 for none"""


@dataclass(frozen=True, kw_only=True)
class ImbalanceSettings:
    """imbalance"""

    majority: int | list[int] | None = None
    """two_group: K_A, the number of majority classes, or a list of them; 3 if not given"""
    minority: int | float | None = None
    """step: the number of minority classes, or their share of the classes, as in 0.5"""
    alpha: float | None = None
    """pareto: exponent of the distribution; 6 if not given"""
    largest: int | None = None
    """two_group, step, exponential, pareto: images of the largest class; as many as every class has if not given"""
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


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """images"""

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


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """loss"""

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


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """optimisation"""

    max_updates: int | None = None
    """updates after which the run ends, as at the end of its last epoch, but on the schedule of the whole"""
    opt: str = "sgd"
    """optimizer, by its name in timm ('sgd' has Nesterov momentum)"""
    momentum: float = 0.9
    """momentum, for the optimizers that have one"""
    weight_decay: float = 5e-4
    """weight decay; timm leaves biases and normalisation out"""
    clip_grad: float | None = None
    """largest norm of the gradient; not clipped if not given"""
    gradient_accumulation_steps: int = 1
    """forward passes over which the images of one update are spread"""
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


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """measurement"""

    eval_batch_size: int = 128
    """images of one forward pass in evaluation, on each rank"""
    probe_every: int = 5
    """epochs between measurements of neural collapse on the training images; 0 measures at the end only"""
    select: Literal["last", "best"] = "last"
    """what is tested and saved: the last epoch (neural collapse is about the end of training) or the best on
    validation"""
    log_every: int = 50
    """updates between looks at the loss"""
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = None
    """where metrics go besides metrics.jsonl; its package must be installed"""


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """pushing to the Hub"""

    push_to_hub: str | None = None
    """repository of the Hub, ORG/NAME, to push the finished run to; whether that can be is checked before training"""
    private: bool = False
    """create a repository for its owners alone"""
    revision: str | None = None
    """branch; created if it is not there; main if not given"""
    message: str | None = None
    """title of the commit"""
    overwrite: bool = False
    """replace a model of another architecture"""
    push_states: bool = False
    """push the checkpoints for --resume too"""


SECTIONS = (
    Essentials,
    RunSettings,
    ModelSettings,
    DataSettings,
    ImbalanceSettings,
    ImageSettings,
    LossSettings,
    OptimizerSettings,
    MeasureSettings,
    HubSettings,
)
"""In the order of --help."""
