"""Measure this package against its peers, on the same inputs, in one run.

    python recipes/benchmark.py [solvers] [layer] [probe] [pipeline] [presets] [--device cuda]
        [--json FILE] [--figures FOLDER]

prints the machine and the versions, and Markdown tables, a ratio below 1 being in our favour:

* `solvers`: fixed-point solvers against TorchDEQ. A minute or two on two CPU cores; see recipes/benchmarks/solvers.py.
* `layer`: solve and backward pass of a cell and of a model against TorchDEQ and the explicit twin, by gradient, dtype
  and layout. Two minutes on two CPU cores; see recipes/benchmarks/layer.py.
* `probe`: neural collapse against three passes of accumulators, its share of an evaluation and of training, and NC1
  where class means merge. Five minutes on two CPU cores; see recipes/benchmarks/probe.py and
  recipes/benchmarks/merged.py.
* `pipeline`: images a second that the input pipeline delivers, against those that a model trains at. A minute; see
  recipes/benchmarks/pipeline.py.
* `presets`: what a run of each preset costs at most, foretold from a few updates. Two minutes on two CPU cores; see
  recipes/benchmarks/presets.py.

Without a name it does all of them.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

from recipes.benchmarks.tables import Row, table

Tables = Mapping[str, Iterable[Row]]


def solvers(args: argparse.Namespace) -> Tables:
    from recipes.benchmarks import solvers as part  # needs torchdeq

    return {
        "evaluations": part.evaluations(args.device, args.tolerances),
        "overhead": part.overhead(args.device, args.sizes, args.rounds),
        "memory": part.memory(args.device),
    }


def layer(args: argparse.Namespace) -> Tables:
    from recipes.benchmarks import layer as part  # needs torchdeq

    return {
        "one cell": part.one_cell(args.device, args.rounds),
        "one model": part.one_model(args.device, args.rounds),
        "channels_last": part.channels_last(args.device, args.rounds),
        "second derivative": part.second_derivative(args.device),
        "gradient errors": part.gradient_errors(args.device),
    }


def probe(args: argparse.Namespace) -> Tables:
    from recipes.benchmarks import merged
    from recipes.benchmarks import probe as part

    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        merged.merged_figure().savefig(args.figures / "nc1_merged.png", dpi=150)
    return {
        "features in memory": part.features_in_memory(args.device, args.rounds),
        "many classes": part.many_classes(args.device, args.rounds),
        "share of an evaluation": part.share_of_evaluation(args.device, args.rounds),
        "share of training": part.share_of_training(args.rounds),
        "merged minorities": merged.merged_minorities(),
    }


def pipeline(args: argparse.Namespace) -> Tables:
    from recipes.benchmarks import pipeline as part

    return {"pipeline": part.pipeline_rows(part.images_of(args.dataset), device=args.device)}


def presets(args: argparse.Namespace) -> Tables:
    from recipes.benchmarks import presets as part

    return {
        "presets": part.preset_rows(args.device, args.rounds),
        "grids": part.grid_rows(args.device, args.rounds),
    }


# Each part gives its tables by name, with their rows as they are measured.
PARTS: dict[str, Callable[[argparse.Namespace], Tables]] = {
    "solvers": solvers,
    "layer": layer,
    "probe": probe,
    "pipeline": pipeline,
    "presets": presets,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure this package against its peers.")
    flag = parser.add_argument
    flag("parts", type=part, nargs="*", default=list(PARTS), metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    flag("--device", type=torch.device, default="cpu", help="cpu (the default) or cuda")
    flag("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: torch's)")
    flag("--rounds", type=int, default=5, help="times that everything is timed (default: 5)")
    flag("--tolerances", type=float, nargs="+", default=[1e-3, 1e-5], help="of the solvers (default: 1e-3 1e-5)")
    sizes = [(16, 61440), (64, 1024)]
    flag("--sizes", type=size, nargs="+", default=sizes, help="of states, BxD (default: 16x61440 64x1024)")
    flag("--dataset", help="whose train split the pipeline delivers (default: 10000 images of 32x32 random pixels)")
    flag("--json", type=Path, metavar="FILE", help="write the same numbers there")
    flag("--figures", type=Path, metavar="FOLDER", help="draw the pictures of the README there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    header = environment(args.device)
    print("\n".join(f"{key}: {value}" for key, value in header.items()))
    tables: dict[str, list[Row]] = {}
    for name in dict.fromkeys(args.parts):
        for title, rows in PARTS[name](args).items():
            tables[title] = list(tqdm(rows, title, unit="row", leave=False))
            print(f"\n{title}\n\n{table(tables[title])}")
    if args.json:
        args.json.write_text(json.dumps({"environment": header, **tables}, indent=1) + "\n")
    return 0


def part(text: str) -> str:
    """Parse the name of a part of the benchmark."""
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; allowed: {', '.join(PARTS)}")
    return text


def size(text: str) -> tuple[int, int]:
    """`BxD` as batch size and length of the state."""
    batch, length = text.split("x")
    return int(batch), int(length)


def environment(device: torch.device) -> dict[str, str | int]:
    """Return the conditions of the numbers: processor, threads, device and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        **{name: installed(name) for name in ("timm", "timm-deq", "torchdeq")},
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
