"""Cross-field validation: settings of a run that conflict, or that nothing would use.

`config` has the settings as attributes, as a `TrainConfig` has; each has been found to be allowed by itself.
"""

import inspect
from typing import Any

import timm

import timm_deq  # noqa: F401 - registers its models
from recipes.errors import check
from recipes.imbalance.profiles import PROFILES
from recipes.settings.hub_name import check_destination, is_hub_name, parse_hub_name

# What makes up for the imbalance by itself, so that two of them would do so twice.
CORRECTING_SAMPLERS = ("class_balanced", "class_aware", "reverse")
CORRECTING_LOSSES = ("class_balanced", "balanced_softmax", "logit_adjustment", "vs")

# Parameters of every loss, which have flags of their own: their names in recipes/imbalance/losses.py, and the flags.
LOSS_FLAGS = {"label_smoothing": "label_smoothing", "reweight_epoch": "reweight_epoch", "beta": "reweight_beta"}

SCALE = 30.0  # of cosine and etf classifiers and of ldam, unless said otherwise


def profile_settings(profile: str) -> list[str]:
    """Names of the settings that an imbalance profile reads."""
    return list(inspect.signature(PROFILES[profile]).parameters)[1:]  # but for the sizes


def correction(config: Any) -> str | None:
    """Name the setting that makes up for the imbalance in training, if one does."""
    if config.sampler in CORRECTING_SAMPLERS:
        return f"sampler {config.sampler!r}"
    if config.loss in CORRECTING_LOSSES:
        return f"loss {config.loss!r}"
    return None if config.reweight_epoch is None else f"reweight_epoch {config.reweight_epoch}"


def check_contradictions(config: Any) -> None:
    """Reject settings that conflict, or that are given but would not be used.

    Raises:
        UserError: a setting that another one does not allow.
    """
    _check_images(config)
    _check_loss(config)
    _check_stage(config)
    _check_schedule(config)
    _check_hub(config)


def _check_images(config: Any) -> None:
    profiles = dict.fromkeys(name for profile in PROFILES for name in profile_settings(profile))
    if config.manifest is not None:
        for name in ("imbalance", *profiles, "grouping", "bounds"):
            _reject_unused(config, name, "with a manifest, which says it all")
    for name in profiles:
        if name not in profile_settings(config.profile):
            _reject_unused(config, name, f"with imbalance {config.profile!r}")
    for name in {"minority", "counts"} & set(profile_settings(config.profile)):
        value = getattr(config, name)
        check(value is not None, name, value, f"a value, with imbalance {config.profile!r}")
    if isinstance(config.majority, list):
        _reject_unused(config, "class_order", "with a list of majority classes")
    if config.grouping in (None, "majority"):
        _reject_unused(config, "bounds", "without --grouping thresholds or quantiles")
    check(config.bounds is None or len(config.bounds) == 2, "bounds", config.bounds, "two numbers")

    if config.sampler != "repeat_factor":
        _reject_unused(config, "repeat_threshold", f"with sampler {config.sampler!r}")
    if config.sampler == "instance":
        check(config.defer == 0, "defer", config.defer, "0 with sampler 'instance', which there is nothing to defer to")
    _before_the_end(config, "defer")
    if not (config.mixup_alpha or config.cutmix_alpha):
        _reject_unused(config, "mix_prob", "without mixup_alpha or cutmix_alpha")


def _check_loss(config: Any) -> None:
    for name, flag in LOSS_FLAGS.items():
        check(name not in config.loss_args, "loss_args", config.loss_args, f"no {name}, which --{flag} is for")
    if config.reweight_epoch is None and config.loss != "class_balanced":
        _reject_unused(config, "reweight_beta", "without reweight_epoch or loss 'class_balanced'")
    _before_the_end(config, "reweight_epoch")
    if config.sampler in CORRECTING_SAMPLERS:
        name, value = "loss", config.loss
        if value not in CORRECTING_LOSSES:
            name, value = "reweight_epoch", config.reweight_epoch
        twice = value is not None
        check(not twice, name, value, f"none that corrects what sampler {config.sampler!r} has corrected already")

    if config.classifier == "linear":
        _reject_unused(config, "classifier_scale", "with classifier 'linear'")
        check(config.loss != "ldam", "loss", config.loss, "ldam with classifier 'cosine' or 'etf' alone")
    else:
        check(config.loss != "mse", "loss", config.loss, f"mse with classifier 'linear', not {config.classifier!r}")
    if config.loss == "ldam":
        scale = config.classifier_scale or SCALE
        given = config.loss_args.get("scale", scale)
        check(given == scale, "loss_args.scale", given, f"{scale:g}, the scale of the classifier")


def _check_stage(config: Any) -> None:
    if config.stage is None:
        return
    check(
        not timm.is_model(config.model),
        "model",
        config.model,
        f"with stage {config.stage!r} a run folder or local-dir:FOLDER",
    )
    check(config.classifier == "linear", "classifier", config.classifier, f"'linear' with stage {config.stage!r}")
    for name in ("jacobian_weight", "correction_at"):
        value = getattr(config, name)
        check(not value, name, value, f"none with stage {config.stage!r}, in which no equilibrium is trained")


def _check_schedule(config: Any) -> None:
    if config.select == "best" and config.manifest is None and config.val_split is None:
        check(config.val_fraction > 0, "val_fraction", config.val_fraction, "above 0 with --select best")
    warmup, most = config.warmup_epochs, config.epochs
    check(not most or warmup <= most, "warmup_epochs", warmup, f"0 to {most}, the epochs")
    milestones = config.decay_milestones
    check(config.sched != "multistep" or milestones != [], "decay_milestones", milestones, "epochs, with multistep")


def _check_hub(config: Any) -> None:
    if is_hub_name(config.model):
        parse_hub_name(config.model)
    if config.manifest is not None and is_hub_name(config.manifest):
        parse_hub_name(config.manifest, setting="manifest")
    if config.push_to_hub is None:
        for name in ("private", "revision", "message", "overwrite", "push_states"):
            value = getattr(config, name)
            check(not value, name, value, "not given without push_to_hub")
        return
    check_destination(config.push_to_hub, config.revision)
    allowed = "'linear' with push_to_hub, as timm can build no other"
    check(config.classifier == "linear", "classifier", config.classifier, allowed)


def _before_the_end(config: Any, name: str) -> None:
    epoch, last = getattr(config, name), config.epochs - 1
    check(not config.epochs or epoch is None or epoch <= last, name, epoch, f"0 to {last}, below the epochs")


def _reject_unused(config: Any, name: str, where: str) -> None:
    value = getattr(config, name)
    check(value is None, name, value, f"not given {where}")
