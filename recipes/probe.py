"""Measure the neural collapse of a classifier on the images that it was trained on.

    accelerate launch recipes/probe.py runs/digits --layers stages --iterates --output runs/collapse

prints the collapse (NC1 to NC4 and more, by group of classes) of a deep equilibrium network that recipes/train.py has
trained, at its features, after each stage, and at each iterate of its solver: half a minute on one thread. Instead of a
run folder, any model of timm and any image data set will do: `resnet50 --pretrained --dataset ORG/NAME --split train`;
with `--no-classifier`, a model of other classes than those of the data set; with `--model_args.img_size 64`, a vision
transformer at another image size. `--compare runs/explicit` measures a second model beside it. `--help` lists
everything. Devices, ranks and precision are chosen by `accelerate launch` or `torchrun`.

The output folder holds `collapse.json` and pictures, PNG or as `--format svg` or `pdf` says: `gram.png` and
`angles.png` (classes two by two), `classes.png` (each, by frequency), `depth.png` and `iterates.png` (if measured),
`compare.png` (of two models), `tsne.png` (some of the features). A mistake ends the run with one line; `python -X dev`
shows where it was found.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from recipes.errors import check, exit_code
from recipes.settings.flags import Parser


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(read_flags(argv)))


def read_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; --help prints and exits. IMAGE_FLAGS that are not given are not in the result.

    Raises:
        UserError: an unknown flag, or a value of the wrong type.
    """
    from nc_probe import CONVENTIONS

    parser = Parser(
        prog="accelerate launch recipes/probe.py",
        description="Measure the neural collapse of an image classifier: features, layers, iterates of its solver.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    parser.add_model()
    flag("--no-classifier", action="store_true", help="measure the features alone, of whatever classes the model knows")
    flag("--head", help="name of the classifier's module, where it cannot be found")
    flag("--split", help="images to measure on; if not given those trained on, for a run exactly those it chose")
    flag("--center", default="balanced", help="balanced: every class counts once (default); empirical: by its images")
    flag("--groups", nargs="+", metavar="NAME=0-2,5", help="classes of groups; if not given those of the run, or none")
    flag("--majority", type=int, nargs="+", metavar="N", help="K_A, or two or more classes: groups majority, minority")
    flag("--layers", nargs="+", default=(), metavar="NAME", help="modules to measure too, or 'stages'")
    flag("--iterates", action="store_true", help="measure the iterates of an equilibrium too")
    flag("--conventions", nargs="+", default=(), metavar="PAPER", help=f"formulas besides: {', '.join(CONVENTIONS)}")
    flag("--cache-mib", type=int, help="memory for features on each rank, in MiB (default: 1024); beyond it disk")
    flag("--second-pass", action="store_true", help="keep no features: show the images twice instead; no t-SNE then")
    flag("--no-tsne", action="store_true", help="draw no t-SNE of features")
    flag("--compare", metavar="MODEL", type=os.path.expanduser, help="measure the features of another run or model too")
    flag("--ood", metavar="DATASET", type=os.path.expanduser, help="images of no class, to be told from those measured")
    flag("--ood_split", metavar="SPLIT", help="of --ood (default: test, or the first that there is)")
    flag("--ood_known", metavar="SPLIT", help="images of the classes to be told from (default: those measured)")
    flag("--format", default="png", help="of the figures: png (default), svg or pdf")
    parser.add_model_args()
    parser.add_images()
    return parser.read_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure a model, print the report and write the output folder."""
    # Imported after the command line has been read, so that --help and mistakes are answered at once.
    from recipes.results.figures import FORMATS
    from recipes.training.checkpoint import new_folder
    from recipes.training.faults import explain_out_of_memory
    from recipes.training.outcome import environment
    from recipes.training.probing import (
        chosen_groups,
        chosen_images,
        create_probe,
        figures,
        load_ood,
        load_other,
        measure,
        measure_ood,
        measure_other,
        sample_features,
    )
    from recipes.training.subject import Subject, save_results

    started = time.perf_counter()
    folder = None if args.output is None else new_folder(args.output)
    cache = args.cache_mib
    check(cache is None or not args.second_pass, "cache-mib", cache, "not given with second-pass, which keeps nothing")
    for name in ("ood_split", "ood_known"):
        value = getattr(args, name)
        check(value is None or args.ood is not None, name, value, "not given without ood")
    check(args.format in FORMATS, "format", args.format, f"one of {', '.join(FORMATS)}")
    subject = Subject(args, args.split)
    indices, groups = chosen_images(subject), chosen_groups(subject)
    subject.load_model(classifier=not args.no_classifier)
    loader = subject.loader(indices)
    other = None if args.compare is None else load_other(subject)
    unknown = None if args.ood is None else load_ood(subject)
    probe = create_probe(subject, indices, groups)
    with explain_out_of_memory():
        report = measure(subject, probe, loader)
        ood = None if unknown is None else measure_ood(subject, probe, *unknown)
    sample = None
    if folder is not None and not args.no_tsne and not args.second_pass:
        sample = sample_features(subject, probe, loader, report)
    with explain_out_of_memory():
        compared = None if other is None else measure_other(other, subject, groups)

    if subject.accelerator.is_main_process:
        print(report)
        if ood is not None:
            print(f"\nout of distribution: {args.ood}\n{ood}")
        if compared is not None:
            print(f"\ncompared with {args.compare}:\n{compared}")
        if folder is not None:
            settings = {"dataset": subject.config.dataset, "split": subject.split, "groups": groups}
            results = {
                "settings": {**vars(args), **settings},
                "classes": subject.images.class_names,
                "images": len(indices),
                "collapse": report.as_dict(per_class=True),
                "seconds": time.perf_counter() - started,
                **environment(subject.accelerator),
            }
            if ood is not None:
                results["ood"] = ood.as_dict()
            if compared is not None:
                results["compared"] = {"model": args.compare, "collapse": compared.as_dict(per_class=True)}
            drawings = figures(subject, report, sample, groups, compared)
            save_results(folder, "collapse.json", results, drawings, format=args.format)
    subject.accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
