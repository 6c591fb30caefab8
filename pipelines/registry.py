"""Look at registered models and move their aliases from the shell.

python pipelines/registry.py list                                    # all versions: stage, metrics, aliases
python pipelines/registry.py show models:/gmflow@champion            # one version, with its lineage
python pipelines/registry.py compare models:/gmflow/3 models:/gmflow/4
python pipelines/registry.py promote models:/gmflow/4                # the alias champion moves to it
python pipelines/registry.py rollback gmflow                         # the alias moves back to where it was
python pipelines/registry.py pull models:/gmflow@champion DIR        # weights and lineage, as files
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

# First: see pipelines/__init__.py.
from pipelines.arguments import Parser, local_path

# isort: split
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from pipelines.errors import PipelineError, command
from pipelines.lasting import lasting_store
from pipelines.training import aliases, mlflow_client, model_versions
from pipelines.training.aliases import CHAMPION
from pipelines.training.mlflow_client import place_of
from pipelines.training.registration import MEASURED_TAG

DEFAULT_MODEL = "gmflow"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Look at registered models, and move their aliases.")
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("list", help="all versions")
    task.add_argument("name", nargs="?", help="of one model (default: all)")
    task = tasks.add_parser("show", help="one version with its lineage")
    task.add_argument("reference", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    task = tasks.add_parser("compare", help="two versions side by side")
    task.add_argument("references", nargs=2, metavar="REF")
    task = tasks.add_parser("promote", help="move an alias to a version")
    task.add_argument("reference", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    task.add_argument("--alias", default=CHAMPION, help="(default: %(default)s)")
    task = tasks.add_parser("rollback", help="move an alias back to the version it was on before")
    task.add_argument("name", nargs="?", default=DEFAULT_MODEL, help="of the model (default: %(default)s)")
    task.add_argument("--alias", default=CHAMPION, help="(default: %(default)s)")
    task = tasks.add_parser("pull", help="copy weights and lineage into a folder")
    task.add_argument("reference", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    task.add_argument("folder", type=local_path)
    return parser.parse_args(argv)


def list_versions(client: MlflowClient, name: str | None) -> Table:
    """A table of all versions, the newest of a model first."""
    models = sorted(model.name for model in model_versions.registered_models(client))
    if name is not None and name not in models:
        raise PipelineError(f"no model {name!r} at {place_of(client)}; there is {', '.join(models) or 'none'}")
    table = Table(title=place_of(client), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("model", "stage", "aliases", "from", "EPE by validation set", "registered"):
        # If 80 columns are too few, only names of sets and of files may be wrapped.
        table.add_column(column, overflow="fold", no_wrap=not column.startswith(("EPE", "from")))
    for model in [name] if name is not None else models:
        aliases = _aliases(client, model)
        for version in sorted(model_versions.versions_of(client, model), key=lambda v: -int(v.version)):
            scores = [f"{n[4:-4]} {float(v):.3f}" for n, v in _metrics(version).items() if n.endswith(".epe")]
            parent = _short(version.tags.get("parent", ""))
            table.add_row(
                f"{model}/{version.version}",
                version.tags.get("stage", "?"),
                "\n".join(aliases.get(str(version.version), [])),
                escape(parent),
                "\n".join(scores),
                _when(version).replace(" ", "\n", 1),  # on two lines, for want of room in 80 columns
            )
    return table


def _short(parent: str) -> str:
    """What a version was trained from; for a file, its name and enough of its hash to tell two apart."""
    if parent.startswith("models:/"):
        return parent.removeprefix("models:/")
    path, digest, rest = parent.partition(" (sha256 ")
    return f"{path.rpartition('/')[2]}{digest}{rest[:8]}{')' * bool(digest)}"


def describe(client: MlflowClient, version: ModelVersion) -> Table:
    """Lineage and metrics of one version."""
    table = Table(title=f"models:/{version.name}/{version.version}", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in _facts(client, version).items():
        table.add_row(name, escape(value))
    table.add_section()
    for name, value in _metrics(version).items():
        table.add_row(name, value)
    return table


def compare(client: MlflowClient, first: ModelVersion, second: ModelVersion) -> Group:
    """The lineage where it differs, one value below the other; then every metric with its difference."""
    titles = [f"{version.name}/{version.version}" for version in (first, second)]
    lineage = Table(title=" and ".join(titles), show_header=False)
    for _ in range(3):
        lineage.add_column(overflow="fold")
    facts = [_facts(client, version) for version in (first, second)]
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        values = [fact.get(name, "") for fact in facts]
        if values[0] != values[1] and name != "reference":
            lineage.add_section()
            lineage.add_row(name, titles[0], escape(values[0]))
            lineage.add_row("", titles[1], escape(values[1]))
    scores = Table("")
    for title in (*titles, "difference"):
        scores.add_column(title, justify="right")
    metrics = [_metrics(version) for version in (first, second)]
    for name in dict.fromkeys([*metrics[0], *metrics[1]]):
        values = [found.get(name, "") for found in metrics]
        difference = f"{float(values[1]) - float(values[0]):+.4g}" if all(values) else ""
        scores.add_row(name, *values, difference)
    return Group(lineage, scores)


def promote(client: MlflowClient, version: ModelVersion, alias: str) -> str | None:
    """Move an alias. Returns the version it was on. Raises PipelineError if MLflow does not accept the alias."""
    with _naming_alias(alias):
        return aliases.move_alias(client, version.name, alias, version.version)


def roll_back(client: MlflowClient, name: str, alias: str) -> tuple[str, str]:
    """`aliases.roll_back`. Raises PipelineError if MLflow does not move the alias, too."""
    with _naming_alias(alias):
        return aliases.roll_back(client, name, alias)


@contextlib.contextmanager
def _naming_alias(alias: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise PipelineError(f"--alias {alias}: MLflow does not move it: {error.message}") from error


def pull(client: MlflowClient, version: ModelVersion, folder: Path) -> None:
    """Write `model.safetensors` and, last, `lineage.json` into a folder: one of another version is removed first."""
    store = lasting_store(str(folder.absolute()), "folder")
    weights = model_versions.version_weights(client, version)
    store.delete("lineage.json")
    store.write("model.safetensors", weights)
    lineage = {**_facts(client, version), "metrics": {n: float(v) for n, v in _metrics(version).items()}}
    store.write("lineage.json", json.dumps(lineage, indent=1).encode())
    print(folder.absolute() / "model.safetensors")


def _aliases(client: MlflowClient, name: str) -> dict[str, list[str]]:
    """Version → its aliases."""
    found: dict[str, list[str]] = {}
    for alias, version in sorted(client.get_registered_model(name).aliases.items()):
        found.setdefault(str(version), []).append(alias)
    return found


def _metrics(version: ModelVersion) -> dict[str, str]:
    return {name: value for name, value in sorted(version.tags.items()) if name.startswith("val.")}


def _facts(client: MlflowClient, version: ModelVersion) -> dict[str, str]:
    facts = {
        "reference": f"models:/{version.name}/{version.version}",
        "aliases": ", ".join(_aliases(client, version.name).get(str(version.version), [])),
        "registered": _when(version),
        "MLflow run": version.run_id or "",
    }
    known = ("stage", "parent", "config_hash", "code_version")
    facts |= {name: version.tags[name] for name in known if name in version.tags}
    for data, url in json.loads(version.tags.get("manifests", "{}")).items():
        facts[f"data {data}"] = url
    facts |= {tag.replace(".", " ", 1): pairs for tag, pairs in version.tags.items() if tag.startswith(MEASURED_TAG)}
    return facts


def _when(version: ModelVersion) -> str:
    return f"{datetime.fromtimestamp(version.creation_timestamp / 1000, UTC):%Y-%m-%d %H:%M} UTC"


@command
def main() -> None:
    arguments = parse_arguments()
    client = mlflow_client.connect_existing(None)
    console = Console(soft_wrap=False)
    match arguments.task:
        case "list":
            table = list_versions(client, arguments.name)
            console.print(table if table.row_count else f"no model is registered at {place_of(client)}")
        case "show":
            console.print(describe(client, model_versions.find_version(client, arguments.reference)))
        case "compare":
            first, second = (model_versions.find_version(client, reference) for reference in arguments.references)
            console.print(compare(client, first, second))
        case "promote":
            version = model_versions.find_version(client, arguments.reference)
            _say_moved(version.name, arguments.alias, promote(client, version, arguments.alias), version.version)
        case "rollback":
            before, after = roll_back(client, arguments.name, arguments.alias)
            _say_moved(arguments.name, arguments.alias, before, after)
        case "pull":
            pull(client, model_versions.find_version(client, arguments.reference), arguments.folder)


def _say_moved(name: str, alias: str, before: str | None, after: str) -> None:
    print(f"models:/{name}@{alias} is version {after}" + (f", was {before}" if before else ""))


if __name__ == "__main__":
    main()
