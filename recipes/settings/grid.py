"""A grid of runs, read from YAML: what its cells have in common, what they differ in, and their names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from recipes.errors import UserError, check, did_you_mean, user_errors
from recipes.settings.config import TrainConfig, parse

PRESETS = Path(__file__).parents[1] / "presets" / "grids"

# Set by the grid itself, for every cell.
OWN = ("seed", "output", "resume")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: its name, which is that of its folder, its arm, where it is on the axes, in words, and its settings but
    for OWN, with its seed apart."""

    name: str
    arm: str
    setting: str
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of runs.

    Attributes:
        base: settings of all runs. A key such as model_args.tol is one of an argument.
        arms: settings of each arm, by its name.
        axes: values of each setting that all arms go through, in every combination.
        also: settings that all arms go through besides those combinations, each in place of what `base` says.
        seeds: of the runs, the same for every arm.
        tune: values of settings, of which each arm takes the combination with the best validation accuracy.
        tune_seeds: of the runs that choose, other than `seeds`.
        mixed_precision: of `accelerate launch`, "no", "bf16" or "fp16".
        reference: the arm that the page compares the tested one with; the first if not given.
        tested: the arm that the page is about; the last if not given.
    """

    arms: dict[str, dict[str, Any]]
    seeds: list[int]
    base: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    also: list[dict[str, Any]] = field(default_factory=list)
    tune: dict[str, list[Any]] = field(default_factory=dict)
    tune_seeds: list[int] = field(default_factory=list)
    mixed_precision: str = "no"
    reference: str | None = None
    tested: str | None = None

    def __post_init__(self):
        for name in ("arms", "base", "axes", "tune"):
            check(isinstance(getattr(self, name), dict), name, getattr(self, name), "a mapping")
        for name, arm in self.arms.items():
            check(isinstance(arm, dict), f"arms.{name}", arm, "a mapping of settings, which may be {}")
            word = isinstance(name, str) and name.replace("_", "").isalnum()
            check(word, "arms", name, "names of letters, digits and _")
        check(bool(self.arms), "arms", self.arms, "one or more")
        for name in ("seeds", "tune_seeds"):
            seeds = getattr(self, name)
            allowed = "a list of whole numbers, each once"
            whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
            check(whole and len(set(seeds)) == len(seeds), name, seeds, allowed)
        check(bool(self.seeds), "seeds", self.seeds, "one or more")
        check(bool(self.tune) == bool(self.tune_seeds), "tune_seeds", self.tune_seeds, "some with tune, none without")
        check(not set(self.seeds) & set(self.tune_seeds), "tune_seeds", self.tune_seeds, "none of seeds")
        for name in ("axes", "tune"):
            for key, values in getattr(self, name).items():
                check(isinstance(values, list) and bool(values), f"{name}.{key}", values, "a list of values")
                texts = [str(value) for value in values]
                check(len(set(texts)) == len(texts), f"{name}.{key}", values, "each value once")
        precisions = ("no", "bf16", "fp16")
        check(self.mixed_precision in precisions, "mixed_precision", self.mixed_precision, str(precisions)[1:-1])
        listed = isinstance(self.also, list) and all(isinstance(point, dict) and point for point in self.also)
        check(listed, "also", self.also, "a list of mappings of settings")
        for name in ("reference", "tested"):
            arm = getattr(self, name)
            check(arm is None or arm in self.arms, name, arm, f"one of the arms {', '.join(self.arms)}")
        if len(self.arms) > 1:
            check(self.reference_arm != self.tested_arm, "tested", self.tested_arm, "an arm other than the reference")
        self._check_keys()

    @property
    def reference_arm(self) -> str:
        return self.reference or next(iter(self.arms))

    @property
    def tested_arm(self) -> str:
        return self.tested or next(reversed(self.arms))

    def _check_keys(self) -> None:
        names = [f.name for f in fields(TrainConfig)]
        given = {"axes": self.axes, "tune": self.tune, "base": self.base}
        given |= {f"arms.{name}": arm for name, arm in self.arms.items()}
        given |= {f"also[{i}]": point for i, point in enumerate(self.also)}
        for where, keys in given.items():
            for key in keys:
                first = str(key).split(".")[0]
                allowed = f"a setting of recipes/train.py{did_you_mean(first, names)}"
                check(first in names, where, key, allowed)
                check(first not in OWN, where, key, f"any setting but {', '.join(OWN)}")
        for key in (*self.axes, *self.tune):
            # What is said besides the axes is not said on them.
            placed = {where: keys for where, keys in given.items() if key in self.tune or not where.startswith("also")}
            twice = [where for where, keys in placed.items() if key in _flat(keys)]
            check(len(twice) == 1, key, " and ".join(twice), "a value in one place alone")

    def cells(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
        """The runs that are compared, seed by seed.

        Args:
            chosen: settings that tuning has chosen, by arm.
        """
        return list(self._cells({}, self.seeds, "", chosen or {}))

    def tuning_cells(self) -> list[Cell]:
        """The runs that choose among the values of `tune`."""
        return list(self._cells(self.tune, self.tune_seeds, "tune-", {})) if self.tune else []

    def _cells(
        self, more: dict[str, list[Any]], seeds: Sequence[int], prefix: str, chosen: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Cell]:
        for seed, point, values, arm in product(seeds, self._points(), product(*more.values()), self.arms):
            at = point | dict(zip(more, values, strict=True))
            parts = [arm, *(f"{key}={_word(value)}" for key, value in at.items()), f"seed={seed}"]
            settings = _merged(self.base, at, self.arms[arm], chosen.get(arm, {}))
            where = ", ".join(f"{key} = {value}" for key, value in point.items())
            yield Cell(name=prefix + "-".join(parts), arm=arm, setting=where, seed=seed, settings=settings)

    def _points(self) -> list[dict[str, Any]]:
        """Where cells are: every combination of the axes, and what there is besides; nowhere in particular without."""
        combinations = [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]
        return [*(combinations if self.axes or not self.also else []), *self.also]

    def check_cells(self) -> None:
        """Refuse a grid with a cell whose settings recipes/train.py would refuse.

        Raises:
            UserError: names the cell.
        """
        cells = [*self.tuning_cells(), *self.cells()]
        names = [cell.name for cell in cells]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"cells of different values have one name, {twice[0]!r}; allowed: values that read differently"
            )
        seen: list[dict[str, Any]] = []
        with TemporaryDirectory() as folder:
            for cell in cells:
                if cell.settings not in seen:  # seeds do not matter
                    seen.append(cell.settings)
                    path = Path(folder) / "cell.yaml"
                    path.write_text(yaml.safe_dump(cell.settings))
                    try:
                        parse(["--config", str(path), "--output", "-"])
                    except UserError as error:
                        raise UserError(f"cell {cell.name}: {error}") from error


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    return "".join(char if char.isalnum() or char in ".+" else "_" for char in str(value))


def _flat(settings: Mapping[str, Any]) -> set[str]:
    """Keys of settings, those of mappings in them dotted."""
    inner = {f"{key}.{name}" for key, value in settings.items() if isinstance(value, dict) for name in value}
    return inner | set(settings)


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which the later win, with dotted keys and mappings put together."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            first, _, rest = key.partition(".")
            if rest or isinstance(value, dict):
                before = merged.get(first)
                merged[first] = (before if isinstance(before, dict) else {}) | ({rest: value} if rest else value)
            else:
                merged[first] = value
    return merged


def read_grid(word: str) -> tuple[Grid, str]:
    """Read a grid and the text of its file.

    Args:
        word: a YAML file, or the name of a grid that comes with the recipes.

    Raises:
        UserError: there is no such file, or it is not that of a grid.
    """
    path = Path(word)
    if not path.is_file():
        presets = sorted(each.stem for each in PRESETS.glob("*.yaml"))
        allowed = f"a YAML file, or one of {', '.join(presets)}{did_you_mean(word, presets)}"
        check(word in presets, "grid", word, allowed)
        path = PRESETS / f"{word}.yaml"
    text = path.read_text()
    with user_errors(yaml.YAMLError, what=f"grid {word!r}: "):
        content = yaml.safe_load(text)
    check(isinstance(content, dict), "grid", word, "a mapping with arms and seeds")
    known = [f.name for f in fields(Grid)]
    for key in content:
        check(key in known, "grid", key, f"{', '.join(known)}{did_you_mean(str(key), known)}")
    for key in ("arms", "seeds"):
        check(key in content, "grid", word, f"a mapping with {key}")
    return Grid(**content), text
