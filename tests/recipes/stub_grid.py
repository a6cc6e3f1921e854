"""Runs recipes/grid.py with a stub in place of recipes/train.py, which takes a moment and writes what compare reads.

    python stub_grid.py STARTS SECONDS FLAG ...

Every start of a run is a line of the file STARTS.
"""

import sys

import recipes.results.page.build as build
import recipes.training.cells as cells
from recipes.grid import main

STUB = """
import json, pathlib, sys, time, yaml
words = sys.argv[3:]
flags = dict(zip(words[::2], words[1::2]))
settings = yaml.safe_load(open(flags["--config"]))
run = pathlib.Path(flags["--output"])
with open(sys.argv[1], "a") as starts:
    starts.write(run.name + chr(10))
if settings.get("lr") == 0.666:
    sys.exit("error: training has diverged")
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text(yaml.safe_dump(settings | {"seed": int(flags["--seed"])}))
time.sleep(float(sys.argv[2]))
val = 1 - abs(settings.get("lr", 0.1) - 0.2)
(run / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "train_loss": 0.1, "val": {"overall": val}}))
collapse = {"nc1": 0.5, "nc2_etf": 0.4, "nc3": 0.3, "nc4": 1.0}
results = {"test": {"overall": val - int(flags["--seed"]) / 100}, "collapse": collapse, "solver": {}}
(run / "results.json").write_text(json.dumps(results))
"""


LAUNCHED = []  # command lines that a stub has stood for


def stub(starts, seconds):
    """Replace training, and leave out all figures, which take seconds."""
    real, build.as_svg = cells.command, lambda draw, **_: ""

    def command(cell, folder, **how):
        words = real(cell, folder, **how)
        LAUNCHED.append(words)
        return [sys.executable, "-c", STUB, starts, seconds, *words[words.index("--config") :]]

    cells.command = command


if __name__ == "__main__":
    stub(*sys.argv[1:3])
    sys.exit(main(sys.argv[3:]))
