"""Train an image classifier on long-tailed data and measure its neural collapse.

    accelerate launch recipes/train.py --output runs/digits

trains a small deep equilibrium network on handwritten digits, three classes of which have ten times as many images as
the others: two to three minutes on 2 CPU cores. `--model_args.equilibrium false` trains its explicit twin, `--imbalance
balanced` on equally many images of each class, `--config recipes/presets/cifar10_two_group.yaml` on CIFAR-10; `--help`
lists everything. Devices, ranks and precision are chosen by `accelerate launch` or `torchrun`.

The run folder holds `config.yaml` (for `--config`), `manifest.json` (which images), `metrics.jsonl` (a line per
epoch), `checkpoint` (for `timm.create_model("local-dir:runs/digits/checkpoint", pretrained=True)`), `results.json`
and `figures`. The test split is used once, at the end. A mistake ends the run with one line; `python -X dev` shows
where it was found.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from timm.data.model_config import resolve_input_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

from nc_probe import NCProbe
from recipes.checkpoint import create_model, new_folder, save_checkpoint, to_json, write_text
from recipes.config import TrainConfig, parse
from recipes.data import (
    ImageView,
    eval_loader,
    eval_transform,
    load_splits,
    open_dataset,
    train_loader,
    train_transform,
)
from recipes.evaluate import (
    accuracies,
    environment,
    evaluate,
    exit_code,
    recalls,
    sum_over_ranks,
)
from recipes.figures import save_figures
from recipes.longtail import build_manifest
from recipes.sampling import EpochSampler
from timm_deq import Equilibrium, NonFiniteInputError


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: train(parse(argv)))


def train(config: TrainConfig) -> None:
    """One run, from the data set to the run folder."""
    started = time.perf_counter()
    folder = new_folder(config.output)
    accelerator = Accelerator(gradient_accumulation_steps=config.gradient_accumulation_steps)
    config = replace(config, gradient_accumulation_steps=accelerator.gradient_accumulation_steps)  # `launch` may set it
    rank, world = accelerator.process_index, accelerator.num_processes
    if world == 1 and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        print(
            "warning: this is one process: `accelerate launch --cpu` needs MPI for more. Without MPI: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 recipes/train.py ...",
            file=sys.stderr,
        )

    # Images. Validation is carved out before the imbalance is made, so it is as balanced as the data set is.
    with accelerator.main_process_first():
        source = open_dataset(config.dataset, config.dataset_config, config.dataset_revision)
    columns = config.only("train_split", "test_split", "image_column", "label_column")
    train_images, test_images = load_splits(source, **columns)
    class_names = train_images.class_names
    manifest = build_manifest(
        train_images.labels,
        class_names,
        profile=config.imbalance,
        parameters=config.profile_parameters,
        val_fraction=config.val_fraction,
        seed=config.seed,
        fingerprint=train_images.fingerprint,
    )

    # Model. `measured` is what is evaluated and saved: the moving average of the weights if there is one.
    set_seed(config.seed)
    net = create_model(config, len(class_names)).to(accelerator.device)
    ema = ModelEmaV3(net, decay=config.ema_decay, use_warmup=True) if config.ema_decay is not None else None
    measured = net if ema is None else ema.module
    data_config = resolve_input_data_config(net, config.only("img_size", "mean", "std", "interpolation", "crop_pct"))
    probe = NCProbe(
        measured,
        groups={name: classes for name, classes in manifest.groups.items() if classes},
        class_counts=manifest.counts,
    )

    # Loaders. They are not given to `prepare`, which would repeat images to fill up ranks.
    augmentation = config.only("crop_pad", "crop_scale", "hflip", "color_jitter", "auto_augment", "re_prob")
    augment = train_transform(data_config, **augmentation)
    channels = data_config["input_size"][0]
    view = ImageView(train_images, manifest.indices, augment, channels=channels, seed=config.seed)
    sampler = EpochSampler(
        view.labels,
        batch_size=config.batch_size,
        order=config.sampler,
        seed=config.seed,
        rank=rank,
        world=world,
        accumulation=config.gradient_accumulation_steps,
    )
    loading: dict[str, Any] = {"workers": config.workers, "pin_memory": accelerator.device.type == "cuda"}
    loader = train_loader(view, sampler, **loading)
    train_eval, val_eval, test_eval = (
        eval_loader(
            ImageView(images, indices, eval_transform(data_config), channels=channels),
            batch_size=config.eval_batch_size,
            rank=rank,
            world=world,
            **loading,
        )
        for images, indices in (
            (train_images, manifest.indices),
            (train_images, manifest.validation),
            (test_images, np.arange(len(test_images.labels))),
        )
    )

    # Optimisation. The optimizer is built from the unprepared model, whose parameter names timm's groups go by.
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = create_optimizer_v2(net, **config.only("opt", "lr", "weight_decay", "momentum"))
    scheduler = None
    if config.epochs:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            num_epochs=config.epochs,
            warmup_lr=config.lr * 1e-3,
            **config.only("sched", "warmup_epochs", "min_lr", "decay_epochs", "decay_milestones", "decay_rate"),
            step_on_epochs=False,
            updates_per_epoch=sampler.updates,
        )
    model, optimizer = accelerator.prepare(net, optimizer)
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks

    # Everything is known to fit together: only now is something written.
    if accelerator.is_main_process:
        folder.mkdir(parents=True)
        write_text(folder / "config.yaml", config.to_yaml())
        write_text(folder / "manifest.json", manifest.to_json())
    accelerator.wait_for_everyone()

    records: list[dict[str, Any]] = []
    shown: dict[str, str] = {}  # beside the progress bar
    updates, saved, report = 0, "none", None
    best: tuple[float, int, dict[str, Tensor]] = (-1.0, 0, {})
    with tqdm(total=config.epochs * sampler.updates, unit="update", mininterval=0.5) as bar:
        for epoch in range(config.epochs + 1):  # epoch 0 measures the initial model
            epoch_started = time.perf_counter()
            record: dict[str, Any] = {"epoch": epoch, "train_loss": None, "lr": None}
            if epoch:
                bar.set_description(f"epoch {epoch}/{config.epochs}")
                model.train()
                sampler.set_epoch(epoch - 1)
                step, total = 0, torch.zeros((), device=accelerator.device)  # sum of losses, read only now and then
                for (images, labels), weight in zip(loader, sampler.weights(), strict=True):
                    images = images.to(accelerator.device, non_blocking=True)
                    labels = labels.to(accelerator.device, non_blocking=True)
                    with accelerator.accumulate(model):
                        try:
                            loss = criterion(model(images), labels)
                        except NonFiniteInputError as error:
                            raise NonFiniteInputError(
                                f"training has diverged in epoch {epoch}, update {step + 1} of {sampler.updates}, "
                                f"at lr {config.lr:g}: {error}; last good checkpoint: {saved}"
                            ) from error
                        accelerator.backward(loss * weight)
                        if accelerator.sync_gradients and config.clip_grad is not None:
                            accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
                        optimizer.step()
                        optimizer.zero_grad()
                    total += loss.detach() * len(labels)
                    if not accelerator.sync_gradients:
                        continue
                    step, updates = step + 1, updates + 1
                    record["lr"] = optimizer.param_groups[0]["lr"]
                    if scheduler is not None:
                        scheduler.step_update(updates)
                    if ema is not None:
                        ema.update(net, step=updates)
                    bar.update()
                    if step % config.log_every and step < sampler.updates:
                        continue
                    loss = sum_over_ranks(accelerator, total).item() / sampler.images(step)
                    # The last update may break the weights with no loss left to show it.
                    if not (math.isfinite(loss) and torch.nn.utils.get_total_norm(net.parameters()).isfinite()):
                        first = (step - 1) // config.log_every * config.log_every + 1
                        raise FloatingPointError(
                            f"loss is {loss:g} or weights are not finite in epoch {epoch}, updates {first} to {step} "
                            f"of {sampler.updates}, at lr {config.lr:g}; last good checkpoint: {saved}"
                        )
                    record["train_loss"] = loss
                    shown["loss"] = f"{loss:.3f}"
                    bar.set_postfix(shown, refresh=False)
            if world > 1:
                distribute_bn(measured, world, reduce=True)  # every rank has gathered running statistics of its own

            probing = epoch == config.epochs or (config.probe_every > 0 and epoch % config.probe_every == 0)
            if probing:
                confusion, record["solver"], _ = evaluate(measured, train_eval, accelerator, len(class_names), probe)
                record["train"] = accuracies(confusion, manifest.groups)
                report = probe.compute()
                record["collapse"] = report.as_dict()
                shown["NC1"] = f"{report.nc1:.3g}"
            if manifest.validation:
                confusion, record["solver"], _ = evaluate(measured, val_eval, accelerator, len(class_names))
                record["val"] = accuracies(confusion, manifest.groups)
                shown["val"] = f"{record['val']['overall']:.1%}"
            keep = probing
            if config.select == "best":
                keep = record["val"]["overall"] > best[0]
                if keep:
                    state = {key: value.detach().cpu().clone() for key, value in measured.state_dict().items()}
                    best = (record["val"]["overall"], epoch, state)
            if keep:
                saved = f"{folder / 'checkpoint'} (epoch {epoch})"
                if accelerator.is_main_process:
                    save_checkpoint(measured, folder / "checkpoint", data_config=data_config, class_names=class_names)
            record["seconds"] = time.perf_counter() - epoch_started
            records.append(record)
            if accelerator.is_main_process:
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(to_json(record) + "\n")

    # The selected weights meet the test split, once.
    selected = config.epochs
    if config.select == "best":
        _, selected, state = best
        measured.load_state_dict(state)
        evaluate(measured, train_eval, accelerator, len(class_names), probe)
        report = probe.compute()
    assert report is not None  # the last epoch is always probed
    confusion, solver, log = evaluate(measured, test_eval, accelerator, len(class_names))
    if accelerator.is_main_process:
        test = accuracies(confusion, manifest.groups)
        results = {
            "test": test,
            "test_per_class": dict(zip(class_names, recalls(confusion).tolist(), strict=True)),
            "collapse": report.as_dict(per_class=True),
            "solver": solver,
            "selected": {"by": config.select, "epoch": selected},
            "images": {"train": len(view), "val": len(manifest.validation), "test": int(confusion.sum())},
            "parameters": sum(p.numel() for p in net.parameters()),
            "seconds": time.perf_counter() - started,
            **environment(accelerator),
        }
        write_text(folder / "results.json", to_json(results, indent=2))
        tol = next((m.solver.tol for m in measured.modules() if isinstance(m, Equilibrium)), None)
        setting = f"K_A = {len(manifest.groups['majority'])}, R = {config.ratio:g}" if manifest.groups else "balanced"
        title = f"{config.model} on {config.dataset} ({setting})"
        save_figures(folder / "figures", records, report, log, tol=tol, class_names=class_names, title=title)
        steps = f"{solver['mean_steps']:.2f} per image, {solver['converged']:.1%} converged" if solver else "-"
        collapse = {"NC1": report.nc1, "NC2": report.nc2, "NC3": report.nc3, "NC4": report.nc4}
        print(f"test accuracy    {'   '.join(f'{name} {value:.2%}' for name, value in test.items())}")
        print(f"neural collapse  {'   '.join(f'{name} {value:.4g}' for name, value in collapse.items())}")
        print(f"evaluations      {steps}")
        print(f"run folder       {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
