"""Evaluate a classifier: its accuracy overall, by group and by class, and what its solver did.

    accelerate launch recipes/evaluate.py runs/digits --max-steps 1 2 4 8 16 --output runs/anytime

prints the anytime curve of a deep equilibrium network that recipes/train.py has trained: its accuracy on test images
when the solver may evaluate the cell that many times. It takes half a minute on one thread. Instead of a run folder,
any model of timm and any image data set will do: `resnet50 --pretrained --dataset ORG/NAME --split validation`;
`--help` lists everything. Devices, ranks and precision are chosen by `accelerate launch` or `torchrun`.

The output folder holds `results.json`, `confusion.png`, `reliability.png` (both at the largest budget) and, for a model
that solves, `anytime.png`. A mistake ends the run with one line; `python -X dev` shows where it was found.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from recipes.errors import exit_code
from recipes.settings.flags import Parser


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(read_flags(argv)))


def read_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; --help prints and exits. IMAGE_FLAGS that are not given are not in the result.

    Raises:
        UserError: an unknown flag, or a value of the wrong type.
    """
    parser = Parser(
        prog="accelerate launch recipes/evaluate.py",
        description="Evaluate an image classifier, a deep equilibrium network at several budgets of evaluations.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    parser.add_model()
    flag("--split", default="test", help="images to evaluate on (default: test)")
    flag("--max-steps", type=int, nargs="+", metavar="N", help="budgets of evaluations; the model's own if not given")
    flag("--tol", type=float, help="relative residual at which a solve ends; the model's own if not given")
    flag("--no-gather", action="store_true", help="evaluate each batch until its last image has finished")
    flag("--adjust-tau", type=float, metavar="TAU", help="subtract TAU log(share of the class) from logits; say 1")
    flag("--tau-normalise", type=float, metavar="TAU", help="divide class vectors by length^TAU, 0 to 1")
    parser.add_images()
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Evaluate a model, print the table and write the output folder."""
    # Imported after the command line has been read, so that --help and mistakes are answered at once.
    from recipes.imbalance.classifiers import tau_normalise
    from recipes.training.checkpoint import new_folder
    from recipes.training.evaluation import equilibria, evaluate_budgets, figures, logit_adjustment, table
    from recipes.training.faults import explain_out_of_memory
    from recipes.training.outcome import environment
    from recipes.training.subject import Subject, save_results

    started = time.perf_counter()
    folder = None if args.output is None else new_folder(args.output)
    subject = Subject(args, args.split)
    adjust = logit_adjustment(subject, args.adjust_tau)
    net = subject.load_model()
    layers = equilibria(subject, max_steps=args.max_steps, tol=args.tol)
    for layer in layers:
        layer.gather = not args.no_gather
    if args.tau_normalise is not None:
        tau_normalise(net, args.tau_normalise)
    with explain_out_of_memory():
        points, evaluation = evaluate_budgets(subject, layers, args.max_steps, tol=args.tol, adjust=adjust)

    if subject.accelerator.is_main_process:
        print(table(points))
        if folder is not None:
            results = {
                "model": args.model,
                "dataset": subject.config.dataset,
                "split": args.split,
                "adjust_tau": args.adjust_tau,
                "tau_normalise": args.tau_normalise,
                "images": int(evaluation.confusion.sum()),
                "tol": max((layer.solver.tol for layer in layers), default=None),
                "points": points,
                "seconds": time.perf_counter() - started,
                **environment(subject.accelerator),
            }
            save_results(folder, "results.json", results, figures(subject, points, evaluation))
    subject.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
