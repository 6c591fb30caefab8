"""`sweep.py --dry-run`: the settings that would be probed, and the trials that would be trained."""

from rich.console import Console
from rich.table import Table

from datasets_etl.objects import ObjectStore
from pipelines.progress import print_line
from pipelines.references import check_reference
from pipelines.sweeping.config import ProbeConfig, SweepConfig, TuneConfig
from pipelines.sweeping.pinned_weights import weights_are_pinned
from pipelines.sweeping.settings import padded_size
from pipelines.sweeping.trials import listed_points
from pipelines.wording import counted


def show_dry_run(config: SweepConfig, store: ObjectStore, console: Console) -> None:
    """Print every setting and trial in order. Raises DataError or PipelineError if the weights cannot be found."""
    if config.weights is not None and not weights_are_pinned(store, config.weights):
        check_reference(config.weights, config.mlflow.tracking_uri)
    if config.probe is not None:
        _show_probe(config, config.probe, console)
    if config.tune is not None:
        _show_trials(config, config.tune, console)


def _show_probe(config: SweepConfig, probe: ProbeConfig, console: Console) -> None:
    # No title of the table, within whose width a path would be broken.
    print_line(console, f"probe: {counted(len(config.probed), 'setting')} of {config.weights}")
    table = Table()
    for name in ("windows", "radius", "prop", f"{config.cost.height}×{config.cost.width} padded to", ""):
        table.add_column(name, justify="right")
    for setting in config.probed:
        height, width = padded_size(setting.on(config.architecture), config.cost.size)
        radii = str(setting.corr_radius[-1]), str(setting.prop_radius[-1])
        mark = "reference" if setting == config.reference else ""
        table.add_row(setting.splits, *radii, f"{height}×{width}", mark)
    console.print(table)
    sets = ", ".join(f"{chosen.name}" + (f" ({chosen.cut})" if chosen.cut else "") for chosen in probe.validation)
    print_line(console, f"each on {sets}")


def _show_trials(config: SweepConfig, tuned: TuneConfig, console: Console) -> None:
    points = [] if tuned.searcher == "optuna" else listed_points(config, [])
    count = len(points) or tuned.trials or 0
    seeded = ""
    if config.probe is not None and tuned.seeds:
        most = counted(min(tuned.seeds, count), "setting")
        seeded = f"; the first are at most {most} of the probe's front"
        seeded += ", in place of the last ones listed here" if tuned.searcher == "random" else ""
    chosen = ", chosen by Optuna" if tuned.searcher == "optuna" else ""
    each = counted(tuned.stage.steps, "step")
    print_line(console, f"tune: {counted(count, 'trial')} of {each}{chosen}{seeded}")
    if not points:
        return
    table = Table()
    for name in points[0]:
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(*(f"{value:g}" for value in point.values()))
    console.print(table)
