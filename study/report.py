"""Writes a study's report from its results: a page in Markdown, and plots of accuracy against FLOPs and time.

Losses are percentage points of top-1 on the evaluation images of each seed. Models that were not fine-tuned are
compared with the dense model; fine-tuned models with the dense model trained further for the same number of updates,
because additional training helps without pruning, too. For several seeds, the mean and the sample standard deviation
are reported. A claim holds if it is true for every seed.
"""

import io
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vssm_prune.training.atomic_files import write_text
from study.plan import Study, smaller_name, tuned_name


if TYPE_CHECKING:
    from matplotlib.axes import Axes


ELASTIC_TOLERANCE = 0.3  # percentage points
# Top-1 in the logs of the authors' early code, which has no alignment and scores tokens in mirrored order.
AUTHORS_CURVES = {
    "Vim-S, {5, 15} keep 0.8, ImageNet": (77.4, 78.5, 79.1),
    "Vim-S, {5, 10, 15} keep 0.8, ImageNet": (73.4, 77.2, 78.4),
    "Vim-T, {10, 20} keep 0.8, ImageNet": (71.1, 74.0, 74.8),
}


# ---- Figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The results for one data set and family.

    Attributes:
        study: the study's plan.
        records: results by (seed, name of the piece).
        times: the times that study/times.py measured relative to the dense model's, by schedule and smaller model.
    """

    study: Study
    records: Mapping[tuple[int, str], dict[str, Any]]
    times: Mapping[str, float] = field(default_factory=dict)

    def seeds(self, *names: str) -> list[int]:
        """The seeds for which all of these pieces are finished."""
        return [seed for seed in self.study.seeds if all((seed, name) in self.records for name in names)]

    def compared_seeds(self, piece: str, schedule: str, *names: str) -> list[int]:
        """The seeds for which a comparison includes this schedule and all other pieces are finished."""
        return [seed for seed in self.seeds(piece, *names) if schedule in self.records[seed, piece]["figures"]]

    def top1(self, name: str, seed: int) -> float:
        return 100 * self.records[seed, name]["figures"]["top1"]

    def schedule_name(self, variant: str, budget: float) -> str:
        """The name under which a comparison lists a variant's schedule: that of the first compared variant with the
        same pruning."""
        study, pruning = self.study, self.study.all_variants[variant].pruning
        compared = [name for name in study.all_variants if budget == study.main_budget or name in study.every_budget]
        return tuned_name(next(name for name in compared if study.all_variants[name].pruning == pruning), budget)

    def compared(self, piece: str, schedule: str, seed: int) -> dict[str, float]:
        return self.records[seed, piece]["figures"][schedule]

    def compared_top1(self, piece: str, schedule: str, seed: int) -> float:
        return 100 * self.compared(piece, schedule, seed)["top1"]

    def tuned_losses(self, variant: str, budget: float) -> dict[int, float]:
        """Points lost after fine-tuning, by seed."""
        return self._trained_losses(tuned_name(variant, budget))

    def untrained_losses(self, variant: str, budget: float) -> dict[int, float]:
        """Points lost without fine-tuning, by seed."""
        return self._compared_losses("dense", "untrained", self.schedule_name(variant, budget))

    def elastic_losses(self, budget: float) -> dict[int, float]:
        """Points lost by the checkpoint trained for all budgets, by seed."""
        return self._compared_losses("dense tuned", "elastic compared", tuned_name("elastic", budget))

    def smaller_losses(self, name: str) -> dict[int, float]:
        """Points that a smaller dense model loses, by seed."""
        return self._trained_losses(smaller_name(name))

    def smaller_flops_share(self, name: str, seed: int) -> float:
        dense, smaller = (self.records[seed, each]["figures"]["gflops"] for each in ("dense", smaller_name(name)))
        return smaller / dense

    def _trained_losses(self, name: str) -> dict[int, float]:
        seeds = self.seeds("dense tuned", name)
        return {seed: self.top1("dense tuned", seed) - self.top1(name, seed) for seed in seeds}

    def _compared_losses(self, reference: str, piece: str, schedule: str) -> dict[int, float]:
        return {
            seed: self.top1(reference, seed) - self.compared_top1(piece, schedule, seed)
            for seed in self.compared_seeds(piece, schedule, reference)
        }

    def time_shares(self, piece: str, schedule: str) -> dict[int, float]:
        """The time of a forward pass relative to the dense model's, measured alternately, by seed."""
        if schedule in self.times:
            return dict.fromkeys(self.compared_seeds(piece, schedule), self.times[schedule])
        return {
            seed: self.compared(piece, "dense", seed)["images_per_second"]
            / self.compared(piece, schedule, seed)["images_per_second"]
            for seed in self.compared_seeds(piece, schedule)
        }

    def flops_share(self, piece: str, schedule: str, seed: int) -> float:
        return self.compared(piece, schedule, seed)["gflops"] / self.compared(piece, "dense", seed)["gflops"]


def group_results(
    study: Study, results: Mapping[str, dict[str, Any]], times: Mapping[str, Mapping[str, float]] | None = None
) -> dict[tuple[str, str], Group]:
    """The groups by (data set, family), if their dense models are finished. `times` is by family."""
    groups = {}
    for dataset in study.datasets:
        for family in study.families:
            records = {
                (each["seed"], each["name"]): each
                for each in results.values()
                if (each["dataset"], each["family"]) == (dataset, family)
            }
            group = Group(study, records, (times or {}).get(family, {}))
            if group.seeds("dense"):
                groups[dataset, family] = group
    return groups


def mean_and_spread(values: Mapping[int, float] | Sequence[float], signed: bool = False) -> str:
    """The text "1.23 ± 0.45"; for a single value, "1.23 (1 seed)"; a dash if there are none."""
    numbers = list(values.values() if isinstance(values, Mapping) else values)
    if not numbers:
        return "–"
    mean = f"{statistics.mean(numbers):{'+' if signed else ''}.2f}"
    return f"{mean} (1 seed)" if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.2f}"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """The differences, for seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def verdict(advantages: Mapping[int, float]) -> str:
    """Whether a claim holds, given its advantage for each seed."""
    if len(advantages) < 2:
        return "not decided yet"
    if min(advantages.values()) > 0:
        return "holds"
    return "does not hold" if max(advantages.values()) < 0 else "differs between seeds"


# ---- The page ----------------------------------------------------------------------------------------------------


def write_report(study: Study, results: Mapping[str, dict[str, Any]], page: Path, plots: Path) -> None:
    """Writes the page, and a plot for each data set and family into the folder `plots`. If that folder has a file
    discussion.md, its text is inserted before the figures; if it has times.json (see study/times.py), these times are
    used."""
    times = plots / "times.json"
    groups = group_results(study, results, json.loads(times.read_text()) if times.exists() else None)
    discussion = plots / "discussion.md"
    parts = ["# The study: which pruning method works best\n"]
    if discussion.exists():
        parts.append(discussion.read_text(encoding="utf-8"))
    parts += [_claims(groups), _authors_curves(groups)]
    for (dataset, family), group in groups.items():
        picture = plots / f"{dataset}-{family}.svg"
        draw_group(group, f"{dataset}, {family}", picture)
        parts.append(_group_section(group, dataset, family, _link(picture, page)))
    write_text("\n".join(parts), page)


def _link(file: Path, page: Path) -> str:
    """How a page links to a file, wherever the two are."""
    return Path(os.path.relpath(file, page.parent)).as_posix()


def _group_section(group: Group, dataset: str, family: str, picture: str) -> str:
    study = group.study
    dense = {seed: group.top1("dense", seed) for seed in group.seeds("dense")}
    longer = {seed: group.top1("dense tuned", seed) for seed in group.seeds("dense tuned")}
    figures = group.records[group.seeds("dense")[0], "dense"]["figures"]
    return f"""\
## {dataset}, {family}

Dense: top-1 {mean_and_spread(dense)}% ({len(dense)} of {len(study.seeds)} seeds; {figures["num_parameters"]:,} \
parameters, {figures["gflops"]:.4f} GFLOPs). After as many additional updates as the pruned \
models get, but without pruning: {mean_and_spread(longer)}%.

![Accuracy against FLOPs and time]({picture})

With {study.main_budget:.1%} fewer FLOPs:

{_variants_table(group)}

Points of top-1 accuracy lost at each budget:

{_budgets_table(group)}
{_smaller_section(group)}"""


def _smaller_section(group: Group) -> str:
    """The smaller dense models; empty if there are no results."""
    rows = [
        [
            name,
            mean_and_spread([group.smaller_flops_share(name, seed) for seed in losses]),
            f"{time:.2f}" if (time := group.times.get(smaller_name(name))) else "–",
            mean_and_spread(losses),
        ]
        for name in group.study.smaller
        if (losses := group.smaller_losses(name))
    ]
    if not rows:
        return ""
    table = _table(["dense model", "FLOPs / dense", "time / dense", "points lost"], rows)
    return f"\nSmaller dense models, trained as long as the pruned ones:\n\n{table}\n"


def _variants_table(group: Group) -> str:
    study, budget = group.study, group.study.main_budget
    rows = []
    for variant, choices in study.all_variants.items():
        untrained, tuned = group.untrained_losses(variant, budget), group.tuned_losses(variant, budget)
        if not untrained and not tuned:
            continue
        rows.append(
            [
                variant,
                ", ".join(f"{name} {value}" for name, value in {**choices.pruning, **choices.training}.items()),
                mean_and_spread(untrained),
                mean_and_spread(tuned),
                mean_and_spread(difference(tuned, group.tuned_losses(study.baseline, budget)), signed=True),
                _time_share(group, group.schedule_name(variant, budget)),
            ]
        )
    titles = [
        "variant",
        "what differs",
        "points lost, not fine-tuned",
        "points lost, fine-tuned",
        f"difference from {study.baseline}",
        "time / dense",
    ]
    return _table(titles, rows)


def _time_share(group: Group, schedule: str) -> str:
    """The time relative to the dense model's. A time of study/times.py is one measurement for all seeds, so it has no
    spread over them."""
    shares = group.time_shares("untrained", schedule)
    return f"{group.times[schedule]:.2f}" if shares and schedule in group.times else mean_and_spread(shares)


def _budgets_table(group: Group) -> str:
    study, elastic = group.study, group.study.elastic["variant"]
    kinds = {"not fine-tuned": group.untrained_losses, "fine-tuned": group.tuned_losses}
    rows = [
        [f"{variant}, {kind}", *(mean_and_spread(losses(variant, budget)) for budget in study.budgets)]
        for variant in study.every_budget
        for kind, losses in kinds.items()
    ]
    rows.append(
        [
            "elastic (one checkpoint for all budgets)",
            *(mean_and_spread(group.elastic_losses(each)) for each in study.budgets),
        ]
    )
    gaps = [difference(group.elastic_losses(each), group.tuned_losses(elastic, each)) for each in study.budgets]
    rows.append([f"difference from {elastic}", *(mean_and_spread(gap, signed=True) for gap in gaps)])
    return _table(["", *(f"{budget:.1%}" for budget in study.budgets)], rows)


def _claims(groups: Mapping[tuple[str, str], Group]) -> str:
    """The paper's claims and this project's goals, with the advantage in points and whether they hold."""
    rows = []
    for (dataset, family), group in groups.items():
        for claim, advantages in _advantages(group).items():
            if advantages:
                advantage = mean_and_spread(advantages, signed=True)
                rows.append([f"{dataset}, {family}", claim, advantage, verdict(advantages)])
    return f"## Claims\n\n{_table(['', 'claim', 'advantage in points', 'verdict'], rows)}\n"


def _advantages(group: Group) -> dict[str, dict[int, float]]:
    """The claims, and for each seed the margin by which they are true."""
    study, budget, baseline = group.study, group.study.main_budget, group.study.baseline
    claims: dict[str, dict[int, float]] = {}
    kinds: dict[str, Callable[[str, float], dict[int, float]]] = {
        "not fine-tuned": group.untrained_losses,
        "fine-tuned": group.tuned_losses,
    }
    for name, variant in study.all_variants.items():
        if set(variant.pruning) not in ({"alignment"}, {"importance"}) or variant.training:
            continue
        for kind, losses in kinds.items():
            lost_more = difference(losses(name, budget), losses(baseline, budget))
            claims[f"{baseline} loses less than {name}, {kind}"] = lost_more
    for name in study.every_budget[1:]:
        own, base = group.tuned_losses(name, budget), group.tuned_losses(baseline, budget)
        claims[f"{name} loses at most half as much as {baseline}"] = difference(
            {seed: loss / 2 for seed, loss in base.items()}, own
        )
    elastic = study.elastic["variant"]
    for each in study.budgets:
        gap = difference(group.elastic_losses(each), group.tuned_losses(elastic, each))
        within = {seed: ELASTIC_TOLERANCE - lost for seed, lost in gap.items()}
        claims[f"elastic loses at most {ELASTIC_TOLERANCE} points more than {elastic} at {each:.1%}"] = within
    return claims


def _authors_curves(groups: Mapping[tuple[str, str], Group]) -> str:
    rows = [
        [f"authors' log: {name}", "–", *(f"{value:.1f}" for value in values)] for name, values in AUTHORS_CURVES.items()
    ]
    for (dataset, family), group in groups.items():
        budget = group.study.main_budget
        for variant in group.study.every_budget:
            name = tuned_name(variant, budget)
            schedule = group.schedule_name(variant, budget)
            seeds, compared = group.seeds("dense", name), group.compared_seeds("untrained", schedule)
            if not seeds:
                continue
            curves = {seed: group.records[seed, name]["figures"]["top1_by_epoch"] for seed in seeds}
            rows.append(
                [
                    f"{dataset}, {family}, {variant}",
                    mean_and_spread([group.top1("dense", seed) for seed in seeds]),
                    mean_and_spread([group.compared_top1("untrained", schedule, seed) for seed in compared]),
                    mean_and_spread([100 * curve[0] for curve in curves.values()]),
                    mean_and_spread([100 * max(curve) for curve in curves.values()]),
                ]
            )
    table = _table(["", "dense", "pruned, not fine-tuned", "after one epoch", "best epoch"], rows)
    title = "## Accuracy during fine-tuning, compared with the authors' logs"
    return f"{title}\n\nTop-1 accuracy in %. The first rows are from the authors' logs.\n\n{table}\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- The plots ---------------------------------------------------------------------------------------------------


def draw_group(group: Group, title: str, file: Path) -> None:
    """Draws accuracy against the fractions of FLOPs and time, with mean and spread over seeds, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "hf_vssm_prune"}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        by_flops, by_time = figure.subplots(1, 2, sharey=True)
        for name, points in plot_lines(group).items():
            _draw_line(by_flops, name, [(flops, top1) for flops, _, top1 in points])
            _draw_line(by_time, name, [(time, top1) for _, time, top1 in points])
        by_flops.set(xlabel="FLOPs / dense", ylabel="top-1 (%)", title=title)
        by_time.set(xlabel="measured time / dense")
        if by_flops.get_legend_handles_labels()[0]:
            by_flops.legend(fontsize=8)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    write_text(drawing.getvalue(), file)


# Fractions of FLOPs, fractions of time, and top-1, each for the seeds that have it.
Point = tuple[list[float], list[float], list[float]]


def plot_lines(group: Group) -> dict[str, list[Point]]:
    """The points of each line by its name; lines start at the dense model. Each point has all seeds that were run."""
    study = group.study
    dense: Point = ([1.0], [1.0], [group.top1("dense", seed) for seed in group.seeds("dense")])
    lines: dict[str, list[Point]] = {}
    for variant in study.every_budget:
        lines[f"{variant}, not trained"] = [dense]
        lines[f"{variant}, fine-tuned"] = [dense]
        for budget in study.budgets:
            schedule, name = group.schedule_name(variant, budget), tuned_name(variant, budget)
            untrained = [
                group.compared_top1("untrained", schedule, seed) for seed in group.compared_seeds("untrained", schedule)
            ]
            lines[f"{variant}, not trained"].append(_point(group, "untrained", schedule, untrained))
            tuned = [group.top1(name, seed) for seed in group.seeds(name)]
            lines[f"{variant}, fine-tuned"].append(_point(group, "untrained", schedule, tuned))
    lines["elastic (one checkpoint for all budgets)"] = [dense]
    for budget in study.budgets:
        schedule = tuned_name("elastic", budget)
        seeds = group.compared_seeds("elastic compared", schedule)
        top1 = [group.compared_top1("elastic compared", schedule, seed) for seed in seeds]
        lines["elastic (one checkpoint for all budgets)"].append(_point(group, "elastic compared", schedule, top1))
    for name in study.smaller:
        lines.setdefault(f"dense, fewer {name.split()[1]}", [dense]).append(_smaller_point(group, name))
    return lines


def _smaller_point(group: Group, name: str) -> Point:
    """Without a measured time, the model is only in the plot against FLOPs."""
    seeds, time = group.seeds("dense", smaller_name(name)), group.times.get(smaller_name(name))
    times = [] if time is None else [time] * len(seeds)
    return (
        [group.smaller_flops_share(name, seed) for seed in seeds],
        times,
        [group.top1(smaller_name(name), seed) for seed in seeds],
    )


def _point(group: Group, piece: str, schedule: str, top1: list[float]) -> Point:
    """FLOPs and time are those of the schedule in a comparison, which may have been run with fewer seeds."""
    flops = [group.flops_share(piece, schedule, seed) for seed in group.compared_seeds(piece, schedule)]
    return flops, [*group.time_shares(piece, schedule).values()], top1


def _draw_line(axes: "Axes", name: str, points: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    points = [(xs, ys) for xs, ys in points if xs and ys]
    if len(points) < 2:
        return
    spread = [statistics.stdev(ys) if len(ys) > 1 else 0 for _, ys in points]
    x, y = ([statistics.mean(values) for values in axis] for axis in zip(*points, strict=True))
    axes.errorbar(x, y, yerr=spread, marker="o", markersize=4, capsize=3, label=name)
