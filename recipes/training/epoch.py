"""One epoch of training."""

import math
import time
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

from recipes.errors import UserError
from recipes.results.accuracy import sum_over_ranks
from recipes.training.faults import SignalHandler, check_finite, stop
from recipes.training.run import Run
from recipes.training.sharding import whole
from timm_deq import NonFiniteInputError


def train_epoch(run: Run, signals: SignalHandler, bar: Any) -> None:
    """Make the updates that are left of the epoch under way.

    Args:
        run: whose `progress` goes on, with in its record the mean loss, the norm of the last gradient before clipping,
            the learning rate, and the images trained on in a second of this process, over all ranks.
        signals: read after every update; a signal ends the run, with a state saved.
        bar: progress bar, one step for each update.

    Raises:
        UserError: training has diverged.
        Stopped: a signal has come.
    """
    config, progress, updates = run.config, run.progress, run.batches.sampler.updates
    bar.set_description(f"epoch {progress.epoch}/{config.epochs}")
    run.model.train(config.stage is None)  # a second stage leaves the features as they are
    run.objective.criterion.set_epoch(progress.epoch - 1)
    began, first = time.perf_counter(), progress.step
    for images, labels, weight in run.batches.epoch(progress.epoch, progress.step):
        with run.accelerator.accumulate(run.model):
            loss = _learn(run, images, labels, weight)
        run.loss_sum += loss * len(labels)
        if not run.accelerator.sync_gradients:
            continue
        _count_update(run)
        bar.update()
        signal = signals.requested()
        last = progress.step == updates or progress.updates == run.updates
        save = not last and (signal or progress.updates % (config.checkpoint_every or math.inf) == 0)
        if last or save or progress.step % config.log_every == 0:
            _read_loss(run)
            images = run.batches.sampler.images(progress.step) - run.batches.sampler.images(first)
            progress.record["images_per_second"] = images / (time.perf_counter() - began)
            run.postfix["img/s"] = f"{progress.record['images_per_second']:.0f}"
            bar.set_postfix(run.postfix, refresh=False)
        if save:
            progress.record["seconds"] = run.seconds
            run.states.save(progress, run.loss_sum)
        if save and signal:
            stop(run.accelerator, signal, run.states.saved)
        if last:
            break


def _learn(run: Run, images: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Forward and backward pass, and with the last ones of an update the step of the optimizer.

    Returns:
        The mean loss, without penalties, ().
    """
    accelerator, config = run.accelerator, run.config
    try:
        penalised, loss = run.objective(run.model(images), labels)
    except NonFiniteInputError as error:
        raise UserError(
            f"training has diverged in epoch {run.progress.epoch}, update {run.progress.step + 1} of "
            f"{run.batches.sampler.updates}, at lr {config.lr:g}: {error}; last good checkpoint: {run.checkpoint}"
        ) from error
    accelerator.backward(penalised * weight)
    if accelerator.sync_gradients and config.clip_grad is not None:
        run.gradient_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    elif accelerator.sync_gradients:
        accelerator.unscale_gradients(run.prepared)
        run.gradient_norm = get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    run.prepared.step()
    run.prepared.zero_grad()
    return loss


def _count_update(run: Run) -> None:
    """Count an update, and let the learning rate and the moving average follow."""
    run.progress.step += 1
    run.progress.updates += 1
    run.progress.record["lr"] = run.optimizer.param_groups[0]["lr"]
    if run.scheduler is not None:
        run.scheduler.step_update(run.progress.updates)
    run.network.update_average(run.progress.updates)


def _read_loss(run: Run) -> None:
    """Bring the mean loss of the epoch so far to the host, and see that it is finite; the last gradient's norm too."""
    step, sampler, every = run.progress.step, run.batches.sampler, run.config.log_every
    mean_loss = sum_over_ranks(run.accelerator, run.loss_sum).item() / sampler.images(step)
    first = (step - 1) // every * every + 1
    where = f"epoch {run.progress.epoch}, updates {first} to {step} of {sampler.updates}, "
    where += f"at lr {run.config.lr:g}; last good checkpoint: {run.checkpoint}"
    check_finite(mean_loss, run.network.net, where)
    run.progress.record["train_loss"] = mean_loss
    run.postfix["loss"] = f"{mean_loss:.3f}"
    if run.gradient_norm is not None:
        run.progress.record["grad_norm"] = whole(run.gradient_norm).item()
        run.postfix["grad"] = f"{run.progress.record['grad_norm']:.3g}"
