"""The model card of a run: what it is, how it is used, what it reached, and how it was made."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

# Up to this many classes the card has the accuracy of each; results.json has them all in any case.
MOST_CLASSES = 20

CAPTIONS = {
    "training.png": "Accuracy and neural collapse in training",
    "gram.png": "Cosines between class means, and between class vectors of the classifier",
    "anytime.png": "Accuracy against the budget of evaluations",
    "residual.png": "Residual of the solves on test images",
    "steps.png": "Evaluations and residuals of the solves on test images",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells.

    Attributes:
        repo: ORG/NAME.
        architecture: name of the model in timm.
        plugin: whether `import timm_deq` must come before the model is created.
        solver: settings of the equilibrium's solver and gradient; empty for an explicit model.
        config: settings of the run, by name.
        results: content of results.json.
        profile: imbalance profile of the training images, and its parameters.
        counts: training images of each class.
        groups: classes of each group.
        manifest_sha256: hash of the manifest, which lists the images.
        command: words of the command that trained the model.
        pictures: paths in the repository.
        dataset_id: of the data set on the Hub, if it comes from there.
        base_model: repository of the weights that training started from.
        license: identifier of the weights' license.
        twin: repository of the twin: the explicit one of an equilibrium model, or the other way round.
    """

    repo: str
    architecture: str
    plugin: bool
    solver: Mapping[str, Any]
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    profile: tuple[str, Mapping[str, Any]]
    counts: Sequence[int]
    groups: Mapping[str, Sequence[int]]
    manifest_sha256: str
    command: Sequence[str]
    pictures: Sequence[str]
    dataset_id: str | None = None
    base_model: str | None = None
    license: str = "apache-2.0"
    twin: str | None = None

    @property
    def is_equilibrium(self) -> bool:
        return bool(self.solver)


def model_card(facts: Facts) -> str:
    """Write README.md: metadata that `huggingface_hub.ModelCard` reads, and Markdown; the same of the same facts.

    Raises:
        ValueError: metadata that the Hub would not read.
    """
    name = facts.repo.split("/")[-1]
    sections = [f"# {name}", _summary(facts), *_usage(facts), *_results(facts), *_pictures(facts), *_training(facts)]
    text = f"---\n{_metadata(facts, name).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    ModelCard(text)
    return text


def _metadata(facts: Facts, name: str) -> ModelCardData:
    task: dict[str, Any] = {
        "task_type": "image-classification",
        "dataset_type": facts.dataset_id or re.sub(r"[^\w.-]+", "-", _dataset_name(facts)),
        "dataset_name": _dataset_name(facts),
        "dataset_config": facts.config.get("dataset_config"),
        "dataset_revision": facts.config.get("dataset_revision"),
        "dataset_split": facts.config["test_split"],
    }
    measured = {"accuracy": facts.results["test"], "expected_calibration_error": _calibration(facts)}
    evaluations = [
        EvalResult(**task, metric_type=metric, metric_name=_metric_name(metric, group), metric_value=value)
        for metric, by_group in measured.items()
        for group, value in by_group.items()
        if value is not None
    ]
    tags = ["image-classification", "timm", "transformers", "neural-collapse", "long-tail"]
    tags += ["deep-equilibrium"] if facts.is_equilibrium else []
    optional = {"datasets": [facts.dataset_id] if facts.dataset_id else None, "base_model": facts.base_model}
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=facts.license,
        tags=tags,
        model_name=name,
        eval_results=evaluations,
        **{key: value for key, value in optional.items() if value is not None},
    )


def _metric_name(metric: str, group: str) -> str:
    name = {"expected_calibration_error": "expected calibration error"}.get(metric, metric)
    return name if group == "overall" else f"{name}, {group} classes"


def _calibration(facts: Facts) -> Mapping[str, Any]:
    return facts.results.get("calibration_error") or {}


def _dataset_name(facts: Facts) -> str:
    """The data set as others know it: a folder has but its own name."""
    name = facts.config["dataset"]
    return "digits" if name == "digits" else facts.dataset_id or str(name).rstrip("/").split("/")[-1] or "folder"


def _summary(facts: Facts) -> str:
    profile, parameters = facts.profile
    given = "".join(f", {key} {json.dumps(value)}" for key, value in parameters.items())
    kind, source = "an explicit network", _cell(_dataset_name(facts))
    if facts.is_equilibrium:
        kind = "a deep equilibrium network, whose features are the fixed point `z* = f(z*, x)` that a solver finds"
    if facts.dataset_id:
        source = f"[{facts.dataset_id}](https://huggingface.co/datasets/{facts.dataset_id})"
    text = (
        f"`{facts.architecture}`, {kind}, trained on {sum(facts.counts)} images of {len(facts.counts)} classes of "
        f"{source} (imbalance profile {profile}{given}: {max(facts.counts)} images of the largest class, "
        f"{min(facts.counts)} of the smallest)."
    )
    if facts.base_model:
        text += f" Training started from [{facts.base_model}](https://huggingface.co/{facts.base_model})."
    return text


def _usage(facts: Facts) -> list[str]:
    before = ""
    plugin = "import timm\n"
    if facts.plugin:
        before = (
            "The architecture comes from the package `timm-deq`: install it, and `import timm_deq` before the model is "
            "created."
        )
        plugin = "import timm\nimport timm_deq  # registers the architecture\n"
    anytime = ""
    if facts.is_equilibrium:
        anytime = "\n\ntimm_deq.set_solver(model, max_steps=4)  # fewer evaluations of f from here on"
    timm_block = f"""```python
{plugin}import torch
from PIL import Image

model = timm.create_model("hf-hub:{facts.repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.new("RGB", (256, 256))  # any image
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(1)
print(model.pretrained_cfg["label_names"][probabilities.argmax()]){anytime}
```"""
    imported = "import timm_deq  # registers the architecture\n" if facts.plugin else ""
    pipeline_block = f"""```python
{imported}from PIL import Image
from transformers import pipeline

classify = pipeline("image-classification", model="{facts.repo}")
print(classify(Image.new("RGB", (256, 256)))[0])
```"""
    recipes_block = f"""```bash
accelerate launch recipes/evaluate.py hf-hub:{facts.repo}  # the accuracies below
accelerate launch recipes/probe.py hf-hub:{facts.repo}     # the neural collapse below
accelerate launch recipes/train.py --model hf-hub:{facts.repo} --dataset ORG/DATASET --output runs/tuned
```"""
    parts = ["## Use", before, timm_block, "With transformers:", pipeline_block]
    parts += [
        "With the recipes of `timm-deq`, to measure it again or to fine-tune it, on other classes too:",
        recipes_block,
    ]
    return [part for part in parts if part]


def _results(facts: Facts) -> list[str]:
    collapse = facts.results["collapse"]
    rows = [
        [group, *(_number(report.get(key)) for key in ("nc1", "nc2_etf", "nc3", "nc4"))]
        for group, report in {"overall": collapse, **collapse.get("groups", {})}.items()
    ]
    return [
        "## Results",
        *_accuracy(facts),
        "Neural collapse on the training images. NC1: scatter within classes against that between them. NC2: distance "
        "of the class means from a simplex equiangular tight frame. NC3: distance of the classifier from the class "
        "means. All three are 0 at collapse. NC4, 1 at collapse: how often the nearest class mean is that of the class "
        "that the classifier chooses.",
        _table(["classes", "NC1", "NC2", "NC3", "NC4"], rows),
        *_solves(facts),
    ]


def _accuracy(facts: Facts) -> list[str]:
    test, per_class, calibration = facts.results["test"], facts.results["test_per_class"], _calibration(facts)
    members = {"overall": range(len(facts.counts)), **facts.groups}
    split = _cell(facts.config["test_split"])
    rows = [
        [group, len(members[group]), _percent(value), _number(calibration.get(group))] for group, value in test.items()
    ]
    parts = [
        f"Accuracy and expected calibration error (15 bins) on the split `{split}`, which was used once, at the end:",
        _table(["classes", "number", "accuracy %", "calibration error"], rows),
    ]
    if len(per_class) == len(facts.counts) <= MOST_CLASSES:
        rows = [[name, count, _percent(per_class[name])] for name, count in zip(per_class, facts.counts, strict=True)]
        parts.append(_table(["class", "training images", "accuracy %"], rows))
    return parts


def _solves(facts: Facts) -> list[str]:
    parts = []
    if points := facts.results.get("anytime"):
        groups = list(points[0]["accuracy"])
        rows = [[point["max_steps"], *(_percent(point["accuracy"][group]) for group in groups)] for point in points]
        parts.append("Accuracy when the solver may evaluate `f` that many times:")
        parts.append(_table(["evaluations", *(f"{group} %" for group in groups)], rows))
    if solver := facts.results.get("solver"):
        parts.append(
            f"The solver took {solver['mean_steps']:.2f} evaluations per image, and {solver['converged']:.1%} of the "
            "images converged; the others kept their best iterate."
        )
    return parts


def _pictures(facts: Facts) -> list[str]:
    return [f"![{CAPTIONS.get(path.split('/')[-1], path.split('/')[-1])}]({path})" for path in facts.pictures]


def _training(facts: Facts) -> list[str]:
    results, device = facts.results, f"{facts.results['ranks']} x {facts.results['device']}"
    listed = {
        "seed": facts.config["seed"],
        "images": ", ".join(f"{count} {name}" for name, count in results["images"].items()),
        "sha256 of the manifest, which lists the images": f"`{facts.manifest_sha256}`",
        "parameters": f"{results['parameters']:,}",
        "solver and gradient": f"`{json.dumps(facts.solver)}`" if facts.solver else "-",
        "time": f"{results['seconds']:.0f} s on {device}, precision {results['mixed_precision']}",
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    parts = [
        "## Training",
        f"```bash\n{shlex.join(facts.command)}\n```",
        "\n".join(f"- {name}: {value}" for name, value in listed.items()),
        "Beside the weights: `config.yaml`, `manifest.json` (for `--manifest`), `metrics.jsonl` (a line for each "
        "epoch), `results.json` and `figures`.",
    ]
    twin, flag = ("explicit twin", "false") if facts.is_equilibrium else ("deep equilibrium twin", "true")
    if facts.twin:
        parts.append(f"Its {twin}: [{facts.twin}](https://huggingface.co/{facts.twin}).")
    elif facts.plugin:
        parts.append(f"`--model_args.equilibrium {flag}` with the same command trains its {twin}.")
    return parts


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Text that stays in its cell, and is no markup: names of classes come from data sets."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
