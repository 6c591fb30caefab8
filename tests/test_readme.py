"""What README and guides show is run: Python, and commands as far as they need no cluster. Links lead somewhere."""

import re
import shlex
from typing import Any

import numpy as np
import pytest

import infra.local_stack.__main__
from datasets_etl.formats import encode_frame_png
from gmflow import GMFlow, GMFlowConfig, save_weights
from pipelines.cluster import slots
from pipelines.config_file import load_config
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.room import check_room
from pipelines.training import mlflow_client, registration, tracking
from pipelines.training.config import CurriculumConfig
from tests.conftest import ROOT
from tests.scripts import MODULES

PAGES = {
    path: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
README = PAGES[ROOT / "README.md"]
BLOCKS = [
    block
    for page in PAGES.values()
    for block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
]
SHELL = "\n".join(text for kind, text in BLOCKS if not kind).replace("\\\n", " ")
COMMANDS = sorted({line for line in map(str.strip, SHELL.splitlines()) if line.startswith("python pipelines/")})
JOBS = sorted({line for line in SHELL.splitlines() if line.startswith("ray job submit")})
SCRIPTS = {f"pipelines/{module.__name__.rpartition('.')[2]}.py": module for module in MODULES}


def test_every_everyday_command_is_shown():
    assert {line.split(" -- python ")[1].split()[0] for line in JOBS} <= set(SCRIPTS)
    assert {shlex.split(line)[1] for line in COMMANDS} == set(SCRIPTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", PAGES[page]):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(PAGES[target]), link


def headings(text):
    """Anchors of a page's headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood_by_its_script(line):
    _, script, *arguments = shlex.split(line)
    parsed = SCRIPTS[script].parse_arguments(arguments)
    if script.endswith("curriculum.py"):
        config = load_config(CurriculumConfig, str(ROOT / parsed.config), parsed.overrides)
        if "machine.num_workers=8" in parsed.overrides:
            assert (config.machine.num_workers, config.stages[0].steps) == (8, 50000)
    if script.endswith("sweep.py"):
        swept = load_config(SweepConfig, str(ROOT / parsed.config), parsed.overrides)
        assert swept.data["sintel"] == "URL"


def test_what_commands_write_here_lies_below_runs():
    """Anything else would be uploaded with every job from then on: tests/infra/test_uploads.py."""
    written = [path for line in COMMANDS for path in outputs(*shlex.split(line)[1:])]
    assert len(written) >= 9
    assert [path for path in written if not path.startswith("runs/")] == []


def outputs(script, *arguments):
    """Files and folders of this machine that a command names for what it makes."""
    parsed = vars(SCRIPTS[script].parse_arguments(list(arguments)))
    named = [*parsed.get("outputs", []), parsed.get("output"), parsed.get("folder")]
    return [str(path) for path in named if path is not None]


@pytest.mark.parametrize("line", JOBS)
def test_a_job_is_understood_by_its_script(line):
    options, entrypoint = line.split(" -- python ")
    assert options.startswith("ray job submit --working-dir .")
    script, *arguments = shlex.split(entrypoint)
    parsed = SCRIPTS[script].parse_arguments(arguments)
    if script.endswith("curriculum.py"):
        config = load_config(CurriculumConfig, str(ROOT / parsed.config), parsed.overrides)
        assert (config.machine.num_workers, config.machine.placement) == (8, "pack")


def test_the_stacks_commands_are_understood():
    lines = re.findall(r"python -m infra\.local_stack ([^`#\n]*)", PAGES[ROOT / "docs/cluster.md"])
    assert {infra.local_stack.__main__.parse_arguments(line.split()).task for line in lines} == {"status", "down"}


@pytest.mark.parametrize(
    "overrides", re.findall(r"^\| .* \| `('?\S*=[^`]*)`.*\|$", PAGES[ROOT / "docs/training.md"], re.MULTILINE)
)
def test_an_override_in_the_table_is_a_valid_one(overrides):
    urls = [f"data.{name}=URL" for name in ("chairs", "things", "sintel", "kitti", "hd1k")]
    config = str(ROOT / "pipelines/configs/curriculum_base.yaml")
    load_config(CurriculumConfig, config, [*urls, *shlex.split(overrides)])  # as the shell takes it


def test_the_hint_for_a_cluster_without_gpus_fits_that_of_make_stack():
    """Two nodes of one CPU."""
    (hint,) = re.findall(
        r"^On a cluster without GPUs.*?\. On one", PAGES[ROOT / "docs/cluster.md"], re.MULTILINE | re.DOTALL
    )
    _, of_curriculum, of_sweep = re.findall(r"`([^`]*)`", hint)
    urls = [f"data.{name}=URL" for name in ("chairs", "things", "sintel", "kitti", "hd1k")]
    configs = ROOT / "pipelines/configs"
    trained = load_config(
        CurriculumConfig, str(configs / "curriculum_refine.yaml"), [*urls, *shlex.split(of_curriculum)]
    )
    swept = ["weights=w.pth", "data.sintel=URL", "data.things=URL", *shlex.split(of_sweep)]
    nodes = [{"CPU": 1.0}, {"CPU": 1.0}]
    machine = trained.machine
    assert slots(nodes, machine.cpus_per_worker, machine.use_gpu) == machine.num_workers == 2
    check_room(load_config(SweepConfig, str(configs / "sweep.yaml"), [*swept, "data.kitti=URL"]), nodes)


def test_the_architecture_names_every_module():
    named = PAGES[ROOT / "docs/architecture.md"]
    rooms = ("gmflow", "datasets_etl", "pipelines", "pipelines/training", "pipelines/sweeping")
    modules = {path.name for room in rooms for path in (ROOT / room).glob("*.py")}
    assert [name for name in sorted(modules - {"__init__.py"}) if not re.search(rf"\b{name}", named)] == []


def test_the_librarys_example_runs():
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "from gmflow" in text]
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    names = {"frame0": frames[0], "frame1": frames[1]}
    exec(code, names)
    assert names["flow"].shape == (40, 50, 2)
    assert names["flow"].dtype == np.float32
    assert names["picture"].shape == (40, 50, 3)
    assert names["picture"].dtype == np.uint8


def test_the_registered_models_example_runs(registered_model, tmp_path, monkeypatch):
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "mlflow" in text]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    for number in (1, 2):
        (tmp_path / f"frame_000{number}.png").write_bytes(encode_frame_png(np.full((40, 50, 3), 99 * number, np.uint8)))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["flow"].shape == (40, 50, 2)


@pytest.fixture
def registered_model(tmp_path, monkeypatch):
    """`models:/gmflow@champion`, small, in an MLflow of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow_client.connect(None)
    run = tracking.start_run(client, "readme", "readme", {})
    small = GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    save_weights(GMFlow(small), tmp_path / "model.safetensors")
    lineage = registration.Lineage("chairs", "random", {}, "h", "sources:x", {})
    registration.register(client, "gmflow", run.info.run_id, tmp_path / "model.safetensors", lineage, None)


def test_the_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"^make ([\w-]+)", SHELL, re.MULTILINE))
    assert {"demo", "test", "stack", "stack-down", "bench"} == shown <= targets
