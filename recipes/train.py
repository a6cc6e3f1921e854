"""Train an image classifier on long-tailed data and measure its neural collapse.

    accelerate launch recipes/train.py --output runs/digits

trains a small deep equilibrium network on handwritten digits, three classes of which have ten times as many images as
the others: a minute or two on 2 CPU cores. `--model_args.equilibrium false` trains its explicit twin, `--imbalance
exponential --ratio 20` on another profile of class sizes, `--sampler class_balanced` or `--loss balanced_softmax` to
make up for it, `--config recipes/presets/cifar10_lt.yaml` on CIFAR-10; `--help` lists everything. Devices, ranks,
sharding and precision are chosen by `accelerate launch` or `torchrun`.

The run folder holds `config.yaml` (for `--config`), `manifest.json` (which images), `metrics.jsonl` (a line per
epoch), `checkpoint` (for `timm.create_model("local-dir:runs/digits/checkpoint", pretrained=True)`), `results.json`,
`figures` and `states`, from the last of which a run that was interrupted goes on with `--resume auto`: to the same
numbers, bit by bit, on one CPU process. SIGTERM and Ctrl-C finish the update under way and save it. The test split is
used once, at the end. A mistake ends the run with one line; `python -X dev` shows where it was found.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from accelerate.utils import set_seed, tqdm
from timm.data.model_config import resolve_input_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn

from nc_probe import NCProbe
from recipes.images.augment import BatchMix
from recipes.images.pipeline import choose_pipeline
from recipes.images.sources import load_splits, open_dataset
from recipes.images.workers import naming_dead_workers
from recipes.imbalance.classifiers import second_stage
from recipes.imbalance.sampling import EpochSampler
from recipes.results.accuracy import accuracies, evaluate, recalls, sum_over_ranks
from recipes.results.figures import save_figures
from recipes.settings.config import TrainConfig, parse
from recipes.training.checkpoint import append_line, create_model, save_checkpoint, to_json, write_text
from recipes.training.faults import Termination, check_finite, exit_code, naming_checkpoint, stop
from recipes.training.manifest import choose_images
from recipes.training.objective import Objective, create_criterion
from recipes.training.outcome import environment, run_title, summary
from recipes.training.resume import find_start
from recipes.training.sharding import gather, plain_twin, start_accelerator
from recipes.training.state import Progress, States
from recipes.training.tracking import check_tracker, scalars, start_tracker
from timm_deq import Equilibrium, NonFiniteInputError


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: train(parse(argv)))


def train(config: TrainConfig) -> None:
    """One run, from the data set to the run folder."""
    started = time.perf_counter()
    check_tracker(config.tracker)
    accelerator = start_accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.tracker,
        project_dir=config.output,
        dynamo_backend="inductor" if config.compile else None,
    )
    config = replace(config, gradient_accumulation_steps=accelerator.gradient_accumulation_steps)  # `launch` may set it
    rank, world = accelerator.process_index, accelerator.num_processes
    conditions = {"ranks": world, "mixed_precision": accelerator.mixed_precision}
    start = find_start(config, conditions)
    folder = start.folder
    if start.finished:
        accelerator.print(f"run folder       {folder} (had finished)")
        return

    # Images. Validation is carved out before the imbalance is made, so it is as balanced as the data set is.
    with accelerator.main_process_first():
        source = open_dataset(config.dataset, config.dataset_config, config.dataset_revision)
    columns = config.only("train_split", "test_split", "image_column", "label_column")
    train_images, test_images = load_splits(source, **columns)
    class_names = train_images.class_names
    manifest = choose_images(config, train_images)
    start.check_images(manifest.sha256)

    # Model. `measured` is what is evaluated and saved: the moving average of the weights if there is one.
    set_seed(config.seed)
    net = create_model(config, len(class_names)).to(accelerator.device)
    if config.stage is not None:
        second_stage(net, config.stage)
    ema = ModelEmaV3(net, decay=config.ema_decay, use_warmup=True) if config.ema_decay is not None else None
    plain = plain_twin(net, accelerator)
    measured = plain if ema is None else ema.module
    data_config = resolve_input_data_config(net, config.only("img_size", "mean", "std", "interpolation", "crop_pct"))
    probe = NCProbe(
        measured,
        groups={name: classes for name, classes in manifest.groups.items() if classes},
        class_counts=manifest.counts,
    )

    # Loaders. They are not given to `prepare`, which would repeat images to fill up ranks.
    names = ("crop_pad", "crop_scale", "hflip", "color_jitter", "auto_augment", "re_prob", "cutout")
    splits = {
        "train": (train_images, manifest.indices),
        "val": (train_images, manifest.validation),
        "test": (test_images, np.arange(len(test_images.labels))),
    }
    pipeline = choose_pipeline(
        config.pipeline,
        images=sum(len(indices) for _, indices in splits.values()),
        data_config=data_config,
        augmentation=config.only(*names),
        device=accelerator.device,
        budget_bytes=int(config.budget * 2**20),
        **config.only("seed", "workers"),
    )
    sampler = EpochSampler(
        train_images.labels[manifest.indices],
        order=config.sampler,
        rank=rank,
        world=world,
        accumulation=config.gradient_accumulation_steps,
        threshold=config.repeat_threshold,
        **config.only("batch_size", "seed", "epochs", "defer"),
    )
    mix = None
    if config.mixup_alpha or config.cutmix_alpha:
        prob = 1.0 if config.mix_prob is None else config.mix_prob
        mix = BatchMix(len(class_names), prob=prob, **config.only("mixup_alpha", "cutmix_alpha", "seed"))

    # Optimisation. The optimizer is built from the unprepared model, whose parameter names timm's groups go by.
    criterion = create_criterion(config, manifest.counts).to(accelerator.device)
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
    model, prepared = accelerator.prepare(net, optimizer)
    objective = Objective(net, criterion, **config.only("jacobian_weight", "correction_at"))

    # Everything is known to fit together: only now is something written, and are images decoded.
    if accelerator.is_main_process:
        start.prepare(config, manifest.to_json())
    accelerator.wait_for_everyone()
    accelerator.print(f"pipeline         {pipeline.describe()}")
    images_of = {name: pipeline.load(*rows) for name, rows in splits.items()}
    loader = images_of["train"].train_loader(sampler)
    dealing = {"batch_size": config.eval_batch_size, "rank": rank, "world": world}
    train_eval, val_eval, test_eval = (images.eval_loader(**dealing) for images in images_of.values())
    set_seed(config.seed, device_specific=True)  # dropout differs between ranks

    parts = {"model": net, "average": ema and ema.module, "optimizer": optimizer, "criterion": criterion}
    parts |= {"scheduler": scheduler, "scaler": accelerator.scaler}
    states = States(
        folder / "states",
        {name: part for name, part in parts.items() if part is not None},
        accelerator,
        identity={"config": asdict(config), "conditions": conditions, "manifest": manifest.sha256},
        keep=config.keep_checkpoints,
        keep_best=config.select == "best",
    )
    progress, total = Progress(), torch.zeros((), device=accelerator.device)  # sum of losses, read only now and then
    if start.restored:
        progress, total = states.restore(start.restored)
        started -= sum(record["seconds"] for record in progress.records)
    start_tracker(accelerator, config.tracker, folder, asdict(config), progress.updates)

    shown: dict[str, str] = {}  # beside the progress bar
    saved, report = "none", None
    updates = config.epochs * sampler.updates
    updates = min(updates, config.max_updates or updates)
    bar = tqdm(total=updates, initial=progress.updates, unit="update", mininterval=0.5)
    with (
        bar,
        objective,
        Termination(accelerator) as termination,
        naming_checkpoint(lambda: states.saved),
        naming_dead_workers(),
    ):
        for epoch in range(progress.epoch, config.epochs + 1):  # epoch 0 measures the initial model
            if epoch and progress.updates == updates:
                break
            record = progress.record or {"epoch": epoch, "train_loss": None, "lr": None, "seconds": 0.0}
            epoch_started = time.perf_counter() - record["seconds"]
            progress.epoch, progress.record, step = epoch, record, progress.step
            if epoch:
                bar.set_description(f"epoch {epoch}/{config.epochs}")
                model.train(config.stage is None)  # a second stage leaves the features as they are
                criterion.set_epoch(epoch - 1)
                sampler.set_epoch(epoch - 1, start=step)
                with torch.random.fork_rng(devices=()):  # an iterator draws a seed, one more in a run that is resumed
                    batches = iter(loader)
                weights, offset = sampler.weights(), step * config.gradient_accumulation_steps
                for forward, ((images, labels), weight) in enumerate(zip(batches, weights, strict=True), offset):
                    images = images.to(accelerator.device, non_blocking=True)
                    labels = labels.to(accelerator.device, non_blocking=True)
                    if mix is not None:  # this part of the epoch, counted over all ranks
                        images, labels = mix(images, labels, epoch, forward * world + rank)
                    with accelerator.accumulate(model):
                        try:
                            penalised, loss = objective(model(images), labels)
                        except NonFiniteInputError as error:
                            raise NonFiniteInputError(
                                f"training has diverged in epoch {epoch}, update {step + 1} of {sampler.updates}, "
                                f"at lr {config.lr:g}: {error}; last good checkpoint: {saved}"
                            ) from error
                        accelerator.backward(penalised * weight)
                        if accelerator.sync_gradients and config.clip_grad is not None:
                            accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
                        prepared.step()
                        prepared.zero_grad()
                    total += loss * len(labels)
                    if not accelerator.sync_gradients:
                        continue
                    step, progress.updates = step + 1, progress.updates + 1
                    record["lr"] = optimizer.param_groups[0]["lr"]
                    if scheduler is not None:
                        scheduler.step_update(progress.updates)
                    if ema is not None:
                        gather(net, plain)
                        ema.update(plain, step=progress.updates)
                    bar.update()
                    signal = termination.requested()
                    last = step == sampler.updates or progress.updates == updates
                    save = not last and (signal or progress.updates % (config.checkpoint_every or math.inf) == 0)
                    if step % config.log_every and not last and not save:
                        continue
                    mean_loss = sum_over_ranks(accelerator, total).item() / sampler.images(step)
                    first = (step - 1) // config.log_every * config.log_every + 1
                    where = f"epoch {epoch}, updates {first} to {step} of {sampler.updates}, at lr {config.lr:g}"
                    check_finite(mean_loss, net, f"{where}; last good checkpoint: {saved}")
                    record["train_loss"] = mean_loss
                    shown["loss"] = f"{mean_loss:.3f}"
                    bar.set_postfix(shown, refresh=False)
                    if save:
                        progress.step, record["seconds"] = step, time.perf_counter() - epoch_started
                        states.save(progress, total)
                    if save and signal:
                        stop(accelerator, signal, states.saved)
                    if last:
                        break
            if ema is None:
                gather(net, plain)
            if world > 1:
                distribute_bn(measured, world, reduce=True)  # every rank has gathered running statistics of its own

            final = epoch == config.epochs or progress.updates == updates
            probing = final or (config.probe_every > 0 and epoch % config.probe_every == 0)
            if probing:
                confusion, record["solver"], *_ = evaluate(measured, train_eval, accelerator, len(class_names), probe)
                record["train"] = accuracies(confusion, manifest.groups)
                report = probe.compute()
                record["collapse"] = report.as_dict()
                shown["NC1"] = f"{report.nc1:.3g}"
            if manifest.validation:
                confusion, record["solver"], *_ = evaluate(measured, val_eval, accelerator, len(class_names))
                record["val"] = accuracies(confusion, manifest.groups)
                shown["val"] = f"{record['val']['overall']:.1%}"
            record["draws"] = sampler.exposure(step).tolist()  # images of each class that the epoch has trained on
            keep = probing
            if config.select == "best":
                keep = record["val"]["overall"] > progress.best
                if keep:
                    progress.best, progress.best_epoch = record["val"]["overall"], epoch
                    progress.best_updates = progress.updates
            if keep:
                if accelerator.is_main_process:
                    save_checkpoint(measured, folder / "checkpoint", data_config=data_config, class_names=class_names)
                saved = f"{folder / 'checkpoint'} (epoch {epoch})"
            record["seconds"] = time.perf_counter() - epoch_started
            if accelerator.is_main_process:
                append_line(folder / "metrics.jsonl", to_json(record))
            accelerator.log(scalars(record), step=progress.updates)
            progress.records.append(record)
            progress.epoch, progress.step, progress.record = epoch + 1, 0, {}
            states.save(progress, total.zero_())
            if signal := termination.requested():
                stop(accelerator, signal, states.saved)

    # The selected weights meet the test split, once.
    with naming_checkpoint(lambda: states.saved):
        selected = progress.records[-1]["epoch"]
        if config.select == "best":
            selected = progress.best_epoch
            measured.load_state_dict(states.weights(progress.best_updates))
        if config.select == "best" or report is None:  # a run may be resumed after its last epoch
            if ema is None and config.select == "last":
                gather(net, plain)
            evaluate(measured, train_eval, accelerator, len(class_names), probe)
            report = probe.compute()
            if accelerator.is_main_process:
                save_checkpoint(measured, folder / "checkpoint", data_config=data_config, class_names=class_names)
        confusion, solver, log, *_ = evaluate(measured, test_eval, accelerator, len(class_names))
        test = accuracies(confusion, manifest.groups)
        accelerator.log(scalars({"test": test}), step=progress.updates)
        draws = np.sum([record["draws"] for record in progress.records], axis=0)
        if accelerator.is_main_process:
            results = {
                "test": test,
                "test_per_class": dict(zip(class_names, recalls(confusion).tolist(), strict=True)),
                "collapse": report.as_dict(per_class=True),
                "solver": solver,
                "selected": {"by": config.select, "epoch": selected},
                "images": {name: len(images) for name, images in images_of.items()},
                "draws_per_class": dict(zip(class_names, draws.tolist(), strict=True)),
                "parameters": sum(p.numel() for p in net.parameters()),
                "seconds": time.perf_counter() - started,
                **environment(accelerator),
            }
            tol = next((m.solver.tol for m in measured.modules() if isinstance(m, Equilibrium)), None)
            title = run_title(config, manifest)
            figures = {"tol": tol, "class_names": class_names, "title": title}
            save_figures(folder / "figures", progress.records, report, log, **figures)
            write_text(folder / "results.json", to_json(results, indent=2))
            print(summary(results, folder))
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
