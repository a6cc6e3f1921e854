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
used once, at the end. `--push_to_hub ORG/NAME` pushes the run to the Hub when it has finished, and makes sure that this
can be done before it begins. A mistake ends the run with one line; `python -X dev` shows where it was found.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.errors import exit_code

if TYPE_CHECKING:
    from recipes.settings.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> None:
        from recipes.settings.config import parse

        train(parse(argv))

    return exit_code(work)


def train(config: "TrainConfig") -> None:
    """Train, measure and test a model, from the data set to the run folder."""
    # Imported after the command line has been read, so that --help and mistakes are answered at once.
    from accelerate.utils import tqdm

    from recipes.images.workers import explain_dead_worker
    from recipes.training.epoch import train_epoch
    from recipes.training.faults import SignalHandler, add_checkpoint_to_error, explain_out_of_memory, stop
    from recipes.training.hub import push_finished
    from recipes.training.measurement import measure_epoch, run_test, save_epoch
    from recipes.training.resume import find_start
    from recipes.training.run import as_launched, conditions, prepare
    from recipes.training.sharding import start_accelerator
    from recipes.training.tracking import check_tracker

    check_tracker(config.tracker)
    accelerator = start_accelerator(
        deterministic=config.deterministic,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.tracker,
        project_dir=config.output,
        dynamo_backend="inductor" if config.compile else None,
    )
    config = as_launched(config, accelerator)
    start = find_start(config, conditions(accelerator))
    if start.finished:
        accelerator.print(f"run folder       {start.folder} (had finished)")
        push_finished(config, start.folder, accelerator)
        return

    if start.warning:
        accelerator.print(start.warning, file=sys.stderr)
    with start:
        run = prepare(config, accelerator, start)
        states = run.states
        bar = tqdm(total=run.updates, initial=run.progress.updates, unit="update", mininterval=0.5)
        with (
            bar,
            run.objective,
            SignalHandler(accelerator) as signals,
            add_checkpoint_to_error(lambda: states.saved),
            explain_dead_worker(),
            explain_out_of_memory(),
        ):
            for epoch in run.epochs():  # epoch 0 measures the initial model
                if epoch:
                    train_epoch(run, signals, bar)
                measure_epoch(run)
                save_epoch(run)
                if signal := signals.requested():
                    stop(accelerator, signal, states.saved)
        with add_checkpoint_to_error(lambda: states.saved), explain_out_of_memory():
            run_test(run)
    accelerator.end_training()
    push_finished(config, start.folder, accelerator)


if __name__ == "__main__":
    sys.exit(main())
