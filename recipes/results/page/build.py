"""A page made of a study: figures drawn, tables filled in, sentences found, and all of it put into the template."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from recipes.results.page import answer, curves
from recipes.results.page.study import UNSOLVED, Group, Look, Study, unsolved
from recipes.results.page.svg import as_svg
from recipes.results.page.tables import (
    Row,
    Table,
    difference_cells,
    difference_tables,
    groups_of,
    run_table,
    setting_tables,
)
from recipes.results.tables import few_seeds
from recipes.results.theory.figure import panels_title, theory_panels
from recipes.results.theory.tables import Settings

HERE = Path(__file__).parent

COLLAPSE_CURVES = {"nc1": "NC1: spread within classes / between", "nc2_etf": "NC2: distance to a simplex ETF"}
COLLAPSE_CURVES |= {"nc3": "NC3: distance of W to class means", "nc2_seli": "distance of class means to SELI"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as `<svg>`, and the sentence below it."""

    svg: str
    caption: str


class Gallery:
    """Draws the figures of a page, each under a name of its own."""

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, figure: Callable[[], Figure | None], *, alt: str, caption: str = "") -> list[Picture]:
        """Draw a figure, if there is something to draw."""
        self.drawn += 1
        svg = as_svg(figure, name=f"f{self.drawn}", alt=alt)
        return [Picture(svg=svg, caption=caption)] if svg else []


def build_page(study: Study, *, theory: bool = True) -> str:
    """Make the page, a text of HTML; the same of the same study.

    Args:
        study: what it is about.
        theory: draw the panels of the layer-peeled theory too, which takes ten seconds.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    gallery = Gallery()
    styles = curves.arm_styles([*study.arms])
    rows = {setting: differences_at(study, setting) for setting in study.settings}
    pooled = answer.over_all_settings(study)
    counted = {"all settings": pooled} if pooled else {}
    forest: list[Picture] = []
    if any(found.n for arms in rows.values() for found in arms.values()):
        alt = "Differences in accuracy between arms, with intervals"
        forest = gallery.draw(partial(curves.forest_figure, study, {**rows, **counted}), alt=alt)
    context: dict[str, Any] = {
        "study": study,
        "question": answer.question(study),
        "answer": answer.answer(study),
        "forest": forest,
        "pooled": _pooled_table(study, pooled),
        "notes": _notes(study),
        "unsolved": UNSOLVED,
        "styles": styles,
        "sections": [_section(study, setting, gallery, styles) for setting in study.settings],
        "theory": _theory(gallery) if theory and study.runs else None,
        "all_runs": run_table(study) if study.runs else None,
        "anchors": {str(run.folder): f"run-{i}" for i, run in enumerate(study.runs)},
        "made_with": _made_with(study),
        "style": Markup((HERE / "style.css").read_text()),
        "script": Markup((HERE / "sort.js").read_text()),
        "safe": Markup,
    }
    return environment.get_template("page.html").render(context)


def differences_at(study: Study, setting: str) -> Mapping[str, Any]:
    """Tested minus each other arm at the endpoint of a setting."""
    groups = study.at(setting)
    if study.tested not in groups:
        return {}
    measure = answer.accuracy(study.endpoint(setting))
    tested = groups[study.tested]
    return {arm: answer.compare(tested, groups[arm], measure) for arm in study.others if arm in groups}


def _pooled_table(study: Study, pooled: Mapping[str, Any]) -> Table | None:
    rows = [
        Row(
            head=f"minus {arm}",
            cells=difference_cells(found),
            runs=[run for group in study.groups if group.arm in (study.tested, arm) for run in group.runs.values()],
            main=arm == study.reference,
        )
        for arm, found in pooled.items()
        if found.n
    ]
    columns = ["n", "difference", "95 % interval", "t test p", "sign-flip p"]
    title = f"{study.tested} minus another arm, over all settings"
    note = "Points of accuracy on the rarest classes: the mean over settings of each seed, then over seeds."
    return Table(title=title, note=note, first="arm", columns=columns, rows=rows) if rows else None


def _notes(study: Study) -> list[str]:
    """What a reader has to know before the numbers."""
    notes = []
    for arm in study.arms:
        bad = [group.setting for group in study.groups if group.arm == arm and group.runs and unsolved(group)]
        if bad:
            where = f" at {'; '.join(bad)}" if any(bad) else ""
            notes.append(f"⚠ {arm}: the mean residual of its solves is above {UNSOLVED:g}{where}.")
    fewest = {}
    for setting in study.settings:
        if seeds := [found.n for found in differences_at(study, setting).values()]:
            fewest.setdefault(min(seeds), []).append(setting)
    for seeds, settings in sorted(fewest.items()):
        if seeds < 6:
            notes.append(f"{'; '.join(filter(None, settings))}{': ' if any(settings) else ''}{few_seeds(seeds)}")
    if study.missing:
        notes.append(f"{len(study.missing)} of {len(study.missing) + len(study.runs)} runs are missing; see the end.")
    return notes + [*study.notes]


def _section(study: Study, setting: str, gallery: Gallery, styles: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What the template shows of a setting."""
    groups = [*study.at(setting).values()]
    where = f" at {setting}" if setting else ""
    found: dict[str, Any] = {"title": setting or "All runs", "tables": setting_tables(study, setting)}
    found["differences"] = difference_tables(study, setting)
    found["curves"] = _curves(groups, groups_of(study, setting), gallery, styles, where)
    limit = curves.gram_limit(groups)
    found["grams"], found["tsne"], found["solve"] = [], [], []
    for group in groups:
        alt = f"Gram matrices of {group.arm}{where}"
        found["grams"] += gallery.draw(
            partial(curves.gram_figure, group, limit=limit), alt=alt, caption=_caption(group)
        )
    found["scale"] = gallery.draw(partial(curves.scale_figure, limit), alt="Colours of cosines")
    seen = {group.arm: pair for group in groups if (pair := _seen(study, group)) is not None}
    for arm, (run, look) in seen.items():
        counts = run.results["collapse"].get("class_count") or []
        draw, caption = partial(curves.tsne_figure, look, counts), f"{arm}, run {run.name}"
        found["tsne"] += gallery.draw(draw, alt=f"t-SNE of features of {arm}{where}", caption=caption)
    looks = {arm: look for arm, (_, look) in seen.items() if look.iterates}
    caption = "Runs " + ", ".join(run.name for run, look in seen.values() if look.iterates)
    for key, log in (("nc1", True), ("nc2_etf", False), ("cdnv", True)):
        title = {**COLLAPSE_CURVES, "cdnv": "CDNV: variance / squared distance of classes"}[key]
        draw = partial(curves.solve_figure, looks, styles, key, title=title, log=log)
        found["solve"] += gallery.draw(draw, alt=f"{title}, along the solve{where}", caption=caption)
    return found


def _caption(group: Group) -> str:
    seeds = f"mean over {len(group.runs)} seeds" if len(group.runs) > 1 else "one seed"
    return f"{group.arm}, {seeds}{', ⚠ not converged' if unsolved(group) else ''}"


def _seen(study: Study, group: Group) -> tuple[Any, Look] | None:
    """The first run of a group that has been looked at in full, and what was seen."""
    for run in group.runs.values():
        look = study.looks.get(str(run.folder))
        if look is not None and (look.iterates or len(look.points)):
            return run, look
    return None


def _curves(
    groups: Sequence[Group],
    names: Sequence[str],
    gallery: Gallery,
    styles: Mapping[str, tuple[str, str]],
    where: str,
) -> list[Picture]:
    panels: dict[str, tuple[curves.Value, bool]] = {}
    for name in names:
        panels[f"{name}: accuracy on validation images, %"] = (partial(_percent, name=name), False)
    for key, title in COLLAPSE_CURVES.items():
        panels[title] = (partial(_inner, part="collapse", key=key), key == "nc1")
    panels["mean ‖z‖² of training images"] = (partial(_inner, part="collapse", key="mean_square_norm"), False)
    panels["training loss"] = (lambda record: record.get("train_loss"), True)
    panels["mean residual of solves"] = (partial(_inner, part="solver", key="mean_residual"), True)
    found = []
    for title, (value, log) in panels.items():
        axis = {"log": log, "percent": title.endswith("%")}
        draw = partial(curves.curve_figure, groups, styles, value, title=title, **axis)
        found += gallery.draw(draw, alt=f"{title}, against epochs{where}")
    return found


def _percent(record: Mapping[str, Any], *, name: str) -> float | None:
    value = _inner(record, part="val", key=name)
    return None if value is None else 100 * value


def _inner(record: Mapping[str, Any], *, part: str, key: str) -> Any:
    return (record.get(part) or {}).get(key)


def _theory(gallery: Gallery) -> dict[str, Any]:
    """The panels of the theory, each a figure."""
    settings = Settings()
    pictures = []
    for i, panel in enumerate(theory_panels(settings), 1):
        pictures += gallery.draw(partial(_one_panel, panel), alt=f"Layer-peeled theory, panel {i} of 4")
    return {"title": panels_title(settings), "pictures": pictures}


def _one_panel(panel: Any) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    panel(figure.subplots())
    return figure


def _made_with(study: Study) -> str:
    """Versions and devices of the runs, in a sentence."""
    kinds = []
    for run in study.runs:
        versions = ", ".join(f"{name} {version}" for name, version in (run.results.get("versions") or {}).items())
        precision = run.results.get("mixed_precision")
        kinds.append(f"{run.results.get('device', 'unknown device')}, precision {precision or 'unknown'}, {versions}")
    hours = math.fsum(float(run.results.get("seconds") or 0) for run in study.runs) / 3600
    return f"{len(study.runs)} runs, {hours:.2f} hours together. " + " / ".join(dict.fromkeys(kinds))
