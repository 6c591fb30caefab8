"""Configs: what is written is what is run, and what is wrong is said with the way out."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import yaml

import pipelines.sweeping.config
import pipelines.training.config
from datasets_etl.manifest import Manifest, SampleEntry, ShardEntry
from gmflow import GMFlowError
from pipelines.config_file import Frozen, load_config
from pipelines.errors import PipelineError
from pipelines.sweeping.config import SweepConfig
from pipelines.training import data_config, dry_run, machine_config
from pipelines.training import estimate as estimating
from pipelines.training.config import CurriculumConfig, MlflowConfig
from pipelines.training.data_config import PartConfig, SetConfig
from pipelines.training.plan import learned_pairs
from tests.conftest import ROOT

MEASURE: Any = estimating._measure

CONFIGS = ROOT / "pipelines" / "configs"
URLS = [f"data.{name}=file:///x/{name}.json" for name in ("chairs", "things", "sintel", "kitti", "hd1k")]


@pytest.fixture
def small() -> dict:
    stage = {"name": "chairs", "steps": 10, "global_batch": 4, "peak_lr": 1e-4, "crop": [32, 48]}
    stage["mixture"] = [{"data": "chairs", "subset": "train"}]
    return {"name": "small", "storage": "s", "data": {"chairs": "c.json"}, "stages": [stage]}


@pytest.fixture
def load(tmp_path: Path):
    def _load(tree: dict, *overrides: str) -> CurriculumConfig:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(CurriculumConfig, str(path), overrides)

    return _load


RECIPE = {  # the paper's
    "chairs": (100_000, 16, 4e-4, (384, 512)),
    "things": (800_000, 8, 2e-4, (384, 768)),
    "sintel": (200_000, 8, 2e-4, (320, 896)),
    "kitti": (100_000, 8, 2e-4, (320, 1152)),
}


@pytest.mark.parametrize(("file", "variant"), [("curriculum_base.yaml", "base"), ("curriculum_refine.yaml", "refine")])
def test_the_ready_configs_are_the_papers_recipe(file, variant):
    config = load_config(CurriculumConfig, str(CONFIGS / file), URLS)
    found = {s.name: (s.steps, s.global_batch, s.peak_lr, s.crop) for s in config.stages}
    assert found == RECIPE
    assert config.model.build().num_scales == {"base": 1, "refine": 2}[variant]
    assert {(s.weight_decay, s.warmup, s.clip_norm, s.gamma, s.max_flow) for s in config.stages} == {
        (1e-4, 0.05, 1.0, 0.9, 400.0)
    }
    mixture = config.stages[2].mixture
    copies = {(part.data, part.subset): part.repeats for part in mixture}
    assert copies == {
        ("sintel", "training-clean"): 100,
        ("sintel", "training-final"): 100,
        ("kitti", "training"): 200,
        ("hd1k", "training"): 5,
        ("things", "train-clean"): 1,
    }
    assert {part.data: (part.min_log2_scale, part.max_log2_scale, part.hflip, part.vflip) for part in mixture} == {
        "sintel": (-0.2, 0.6, 0.5, 0.1),
        "things": (-0.2, 0.6, 0.5, 0.1),
        "kitti": (-0.3, 0.5, 0.5, 0.0),
        "hd1k": (-0.5, 0.2, 0.5, 0.0),
    }


def test_the_config_for_data_of_ones_own_needs_nothing_but_the_data(load):
    config = load_config(CurriculumConfig, str(CONFIGS / "finetune.yaml"), ["data.mine=m.json"])
    assert [stage.name for stage in config.selected_stages] == ["mine"]
    assert config.mlflow.registered_model != MlflowConfig().registered_model, "the paper's models keep their aliases"


@pytest.mark.parametrize(("variant", "known"), [("base", "afb2db5e6651"), ("refine", "15edde0b881f")])
def test_what_earlier_versions_trained_is_still_found(variant, known):
    """A folder is named by this hash: with another one, an update of the code would train finished stages again."""
    config = load_config(CurriculumConfig, str(CONFIGS / f"curriculum_{variant}.yaml"), URLS)
    parent = "random"
    for stage in config.chain:
        parent = config.stage_hash(stage, dict.fromkeys(config.data, "v1"), parent)
    assert parent == known


def test_pairs_that_are_held_out_decide_the_weights(small, load):
    def hashed(*overrides: str) -> str:
        config = load(small, *overrides)
        return config.stage_hash(config.stages[0], {"chairs": "v1"}, "random")

    held_out = [hashed(f"stages.0.mixture.0.{name}=['0001*']") for name in ("only", "without")]
    assert len({hashed(), *held_out}) == 3


SCENES = {
    "sintel": ("training-clean", "training-final", "alley_1_frame_0001", "alley_1_frame_0002", "cave_2_frame_0001"),
    "things": ("train-clean", "val-clean", "into_future_A_0000_0006", "into_future_A_0001_0006"),
    "kitti": ("training", "testing", "000001_10"),
    "hd1k": ("training", "testing", "000001_10"),
}


@pytest.mark.parametrize(
    ("mixture", "chosen", "learned"),
    [
        ([{"data": "sintel", "subset": "training-final"}], {"data": "sintel", "subset": "training-final"}, 3),
        (
            [{"data": "sintel", "subset": "training-clean"}],
            {"data": "sintel", "subset": "training-final", "limit": 2},
            2,
        ),
        (
            [{"data": "sintel", "subset": subset, "without": ["alley_*"]} for subset in SCENES["sintel"][:2]],
            {"data": "sintel", "subset": "training-final", "only": ["alley_*"]},
            0,
        ),
        (
            [
                {"data": "things", "subset": "train-clean"},
                {"data": "sintel", "subset": "training-clean", "only": ["c*"]},
            ],
            {"data": "sintel", "subset": "training-final"},
            1,
        ),
        (
            [
                {"data": "sintel", "subset": "training-clean", "only": ["c*"]},
                {"data": "sintel", "subset": "training-final", "only": ["alley_*"]},
            ],
            {"data": "sintel", "subset": "training-final"},
            3,
        ),
        ([{"data": "things", "subset": "train-clean"}], {"data": "things", "subset": "val-clean"}, 0),
        ([{"data": "hd1k", "subset": "training"}], {"data": "kitti", "subset": "training"}, 0),
        ([{"data": "under-another-name", "subset": "training"}], {"data": "kitti", "subset": "training"}, 1),
    ],
)
def test_pairs_that_were_trained_on_are_counted_in_every_pass(mixture, chosen, learned):
    manifests = {}
    for name, (first, second, *names) in SCENES.items():
        samples = [SampleEntry(f"{part}_{one}", part, 0, 1, 0, 8, 8, 0) for part in (first, second) for one in names]
        manifests[name] = Manifest(name, (ShardEntry(name, 1, "", tuple(samples)),))
    manifests["under-another-name"] = manifests["kitti"]
    parts = [PartConfig(**part) for part in mixture]
    assert learned_pairs(parts, SetConfig(**chosen), manifests) == learned


def test_overrides_reach_sections_and_stages_by_name_or_number(small, load):
    config = load(small, "seed=3", "stages.chairs.steps=7", "stages.0.peak_lr=2e-4", "machine.num_workers=2")
    assert (config.seed, config.stages[0].steps, config.stages[0].peak_lr) == (3, 7, 2e-4)
    assert config.machine.num_workers == 2


def test_an_override_of_one_stage_leaves_those_that_share_its_yaml_alone(small, load):
    """`safe_dump` writes what is shared as an anchor and aliases to it, as the recipes do."""
    small["stages"][0]["validation"] = [{"data": "chairs", "subset": "val"}]
    small["stages"].append({**small["stages"][0], "name": "again"})
    config = load(small, "stages.chairs.validation.0.limit=7", "stages.chairs.mixture.0.repeats=3")
    first, second = config.stages
    assert (first.validation[0].limit, second.validation[0].limit) == (7, None)
    assert (first.mixture[0].repeats, second.mixture[0].repeats) == (3, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=3", r"unknown key sead; did you mean seed\?"),
        ("stages.chairs.stpes=3", r"unknown key stages\.chairs\.stpes; did you mean steps\?"),
        ("machine.num_worker=3", r"unknown key machine\.num_worker; did you mean num_workers\?"),
        ("stages.things.steps=3", r"no 'things' here; there is chairs"),
        ("stages.chairs.steps=many", r"override .stages\.chairs\.steps=many.: stages\.chairs\.steps: .*not 'many'"),
        ("stages.chairs.steps=0", r"stages\.chairs\.steps: .*greater than 0"),
        ("seed", r"write key=value"),
        ("seed.deeper=1", r"seed"),
        ("stages.chairs.crop=[32, 50]", r"stage chairs: crop \(32, 50\) must be divisible by 16"),
        ("model.attn_splits=[0]", r"attn_splits"),
        ("model.variant=bass", r"model\.variant"),
        ("machine.num_workers=5", r"global_batch 4 cannot feed machine\.num_workers 5"),
        ("stages.0.mixture.0.data=things", r"stage chairs: no data 'things'; data has chairs"),
        ("data.chairs=null", r"data\.chairs is not set"),
        ("promotion={data: chairs, subset: val}", r"validation lacks chairs/val"),
        ("only=[kitti]", r"no stage 'kitti'"),
        (
            "stages.0.validation=[{data: chairs, subset: val}, {data: chairs, subset: val, limit: 9}]",
            r"stage chairs: validation names chairs/val twice",
        ),
        ("stages.0.mixture.0.min_log2_scale=0.5", r"is above max_log2_scale"),
    ],
)
def test_what_is_wrong_is_one_line_naming_it(small, load, override, message):
    small["stages"][0]["mixture"][0]["max_log2_scale"] = 0.1
    small["seed"] = 1
    with pytest.raises(PipelineError, match=message) as caught:
        load(small, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "file", "given"),
    [
        (CurriculumConfig, "demo.yaml", "data.things=URL data.sintel=URL data.kitti=URL data.hd1k=URL"),
        (SweepConfig, "sweep.yaml", "weights=w.pth data.kitti=URL"),
    ],
)
def test_all_data_that_lacks_is_told_at_once(kind, file, given):
    """Not one dataset a try, each of which takes seconds."""
    with pytest.raises(PipelineError) as caught:
        load_config(kind, str(CONFIGS / file), given.split())
    told = str(caught.value).partition(": ")[2]
    two = ["data.chairs", "data.sintel_unseen"] if kind is CurriculumConfig else ["data.sintel", "data.things"]
    assert told == f"{two[0]}, {two[1]} are not set; give the manifests' URLs: {two[0]}=URL {two[1]}=URL"


def test_what_is_wrong_is_laid_to_what_said_it(small, load):
    def told(*overrides: str) -> str:
        with pytest.raises(PipelineError) as caught:
            load(small, *overrides)
        return str(caught.value)

    assert told("seed=1", "stages.chairs.name=champion").startswith("override 'stages.chairs.name=champion': ")
    assert told("machine={num_workers: 0}").startswith("override 'machine={num_workers: 0}': machine.num_workers: ")
    assert "config.yaml with seed=1 machine.num_workers=5: stage chairs" in told("seed=1", "machine.num_workers=5")
    many = ("seed=1", "machine.num_workers=5", "stages.chairs.steps=20")
    assert "config.yaml with its 3 overrides: stage chairs" in told(*many)
    small["stages"][0]["steps"] = 0
    assert "config.yaml: stages.chairs.steps: " in told("seed=1")


def test_a_missing_file_and_a_file_without_yaml_are_named(tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match=r"nothing\.yaml: no such config file$"):
        load_config(CurriculumConfig, str(tmp_path / "nothing.yaml"), [])
    uploaded = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    uploaded.mkdir(parents=True)
    monkeypatch.chdir(uploaded)
    with pytest.raises(
        PipelineError, match=r"mine\.yaml: no such config file; what git ignores, such as runs/, is not"
    ):
        load_config(CurriculumConfig, "runs/mine.yaml", [])
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(PipelineError, match=r"broken\.yaml: not readable as YAML"):
        load_config(CurriculumConfig, str(tmp_path / "broken.yaml"), [])
    with pytest.raises(PipelineError, match=r"runtime_resources: a folder, no config file$"):
        load_config(CurriculumConfig, str(tmp_path / "runtime_resources"), [])


def test_what_decides_the_weights_decides_the_hash_and_nothing_else(small, load):
    def hashed(*overrides: str, version: str = "v1", parent: str = "random") -> str:
        config = load(small, *overrides)
        return config.stage_hash(config.stages[0], {"chairs": version}, parent)

    first = hashed()
    unchanged = ["machine.num_workers=4", "stages.0.checkpoint_every=3", "storage=elsewhere", "data.chairs=moved.json"]
    assert {hashed(override) for override in unchanged} == {first}
    changed = [hashed(f"stages.0.{key}") for key in ("steps=11", "peak_lr=2e-4", "crop=[48, 48]", "gamma=0.8")]
    changed += [hashed("seed=9"), hashed("model.num_layers=2"), hashed("precision=bf16")]
    changed += [hashed(version="v2"), hashed(parent="x.pth")]
    assert len({first, *changed}) == len(changed) + 1


def test_what_a_worker_imports_at_its_start_leaves_torch_alone():
    """Ray has not yet said how many threads it may use; torch would take all, and round otherwise."""
    code = "import pipelines.cluster, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("promotion={data: chairs, subset: val, metric: eppe}", r"promotion\.metric: .*'epe'.*not 'eppe'"),
        ("promotion={data: chairs, subset: val, metric: wauc}", r"promotion\.metric: .*not 'wauc'"),  # more is better
        ("stages.chairs.name=champion", "'champion' means something else in the model registry"),
        ("stages.chairs.name=v1", "'v1' means something else in the model registry"),
        ("only=[]", "only: .*at least 1"),
        ("mlflow.registered_model=team/gmflow", r"mlflow\.registered_model: .* all characters but / and :$"),
        ("name=Base 2", r"name: 'Base 2' is not a valid name; allowed are 100 lower-case letters, digits"),
        (f"name={'n' * 101}", r"name: 'n{101}' is not a valid name; allowed are 100 lower-case letters"),
        (f"stages.0.name={'n' * 101}", r"name: 'n{101}' is not a valid name; allowed are 100 lower-case letters"),
        ("mlflow.experiment=''", r"mlflow\.experiment: .*not ''"),
        ("data={chairs: URL, 'sintel+hd1k': URL}", r"data\.sintel\+hd1k: 'sintel\+hd1k' .* letters, digits"),
        ("machine.cache={folder: cache, gib: 1}", r"machine\.cache\.folder: cache: give an absolute path"),
    ],
)
def test_what_would_show_after_weeks_is_said_at_once(small, load, override, message):
    with pytest.raises(PipelineError, match=message):
        load(small, override)


def test_a_stage_runs_alone(small, load):
    second = {**small["stages"][0], "name": "kitti"}
    config = load({**small, "stages": [small["stages"][0], second]}, "only=[kitti]")
    assert [stage.name for stage in config.selected_stages] == ["kitti"]


def test_a_range_of_stages_is_the_same_as_in_the_whole(small, load):
    names = ["chairs", "things", "sintel", "kitti"]
    stages = [{**small["stages"][0], "name": name} for name in names]
    whole, part = load({**small, "stages": stages}), load({**small, "stages": stages}, "only=[things, sintel]")
    assert [stage.name for stage in part.selected_stages] == ["things", "sintel"]
    assert [stage.name for stage in part.chain] == ["chairs", "things", "sintel"], "and what it starts from"

    def hashes(config: CurriculumConfig) -> dict[str, str]:
        parent, found = "random", {}
        for stage in config.chain:
            parent = found[stage.name] = config.stage_hash(stage, {"chairs": "v1"}, parent)
        return found

    assert hashes(part).items() < hashes(whole).items()


def test_a_file_that_extends_itself_or_several_says_so(tmp_path):
    for name, base in (("a", "b.yaml"), ("b", "a.yaml"), ("c", "c.yaml"), ("d", "[a.yaml]")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}\n")
    for name, told in (
        ("a", "a.yaml: extends itself, by way of"),
        ("c", "extends itself"),
        ("d", "extends: the name of"),
    ):
        with pytest.raises(PipelineError, match=told):
            load_config(CurriculumConfig, str(tmp_path / f"{name}.yaml"), [])


@pytest.mark.parametrize(
    ("override", "purpose"),
    [
        ("stages.chairs.gates=[{data: chairs, subset: val, below: 2}]", "gates"),
        ("stages.chairs.keep_best={data: chairs, subset: val}", "keep_best"),
    ],
)
def test_what_a_stage_is_judged_by_must_be_validated(small, load, override, purpose):
    with pytest.raises(PipelineError, match=f"validation lacks chairs/val, which {purpose} compares by"):
        load(small, override)


@pytest.mark.usefixtures("local_ray")
def test_an_estimate_counts_every_micro_batch_of_a_worker(small, load, monkeypatch):
    measure = SimpleNamespace(remote=lambda config, stage: ray.put((2.0, 1.5)))
    monkeypatch.setattr(estimating, "_measure", SimpleNamespace(options=lambda **how: measure))

    def told(workers: int, micro_batch: int) -> float:
        machine = f"machine={{num_workers: {workers}, micro_batch: {micro_batch}}}"
        config = load(small, "stages.chairs.global_batch=8", machine)
        found = estimating.estimate(config, config.stages[0])
        assert found is not None
        assert found.memory_gib == 1.5
        return found.step_s

    assert [told(1, 1), told(2, 2), told(2, 99), told(1, 8)] == [16.0, 4.0, 2.0, 2.0]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), estimating.TooLargeError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), estimating.TooLargeError),
        (GMFlowError("no compiler here"), GMFlowError),
    ],
    ids=["too large", "too large for a CPU", "no compiler"],
)
def test_a_step_that_cannot_be_measured_says_why(small, load, monkeypatch, error, told):
    @ray.remote
    def measure(config: CurriculumConfig, stage: object) -> None:
        raise error

    monkeypatch.setattr(estimating, "_measure", measure)
    config = load(small)
    with pytest.raises(told):
        estimating.estimate(config, config.stages[0])


@pytest.mark.usefixtures("local_ray")
def test_a_step_whose_worker_is_killed_for_its_memory_is_too_large_at_once(small, load, monkeypatch, tmp_path):
    """Ray's default is to try it again: without end, where Ray itself killed it."""

    def measure(config: CurriculumConfig, stage: object) -> None:
        with (tmp_path / "tries").open("a") as tries:
            tries.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(estimating, "_measure", ray.remote(**MEASURE._default_options)(measure))
    config = load(small)
    with pytest.raises(estimating.TooLargeError):
        estimating.estimate(config, config.stages[0])
    assert (tmp_path / "tries").read_text() == "x"


@pytest.mark.usefixtures("local_ray")
def test_a_step_that_takes_too_long_or_has_no_room_is_not_estimated(small, load, monkeypatch, tmp_path):
    @ray.remote
    def measure(config: CurriculumConfig, stage: object) -> None:
        time.sleep(1000)

    monkeypatch.setattr(estimating, "_measure", measure)
    monkeypatch.setattr(estimating, "_PATIENCE_S", 0.5)
    config = load(small)
    assert estimating.estimate(config, config.stages[0]) is None
    monkeypatch.setattr(estimating, "_measure", None)
    config = load(small, "machine.cpus_per_worker=1000")
    assert estimating.estimate(config, config.stages[0]) is None


@pytest.mark.parametrize(("workers", "micro_batch", "batch"), [(1, 3, 3), (2, 3, 2), (3, 9, 2)])
def test_what_is_measured_is_a_workers_micro_batch_without_the_first_passes(
    small, load, monkeypatch, workers, micro_batch, batch
):
    """A worker's share of a global batch of four may be less than a micro-batch; a first pass takes longer."""
    now, flows = 0.0, []

    def compute(frames: torch.Tensor, other: torch.Tensor) -> SimpleNamespace:
        nonlocal now
        now += 2.0 * len(flows) if flows else 100.0
        flows.append(torch.zeros(len(frames), 2, *frames.shape[-2:], requires_grad=True))
        return SimpleNamespace(predictions=flows[-1:])

    monkeypatch.setattr(estimating, "prepare_model", lambda *_: SimpleNamespace(train=lambda: compute))
    monkeypatch.setattr(estimating, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(estimating, "peak_bytes", lambda device: 3 * 2**29)
    threads = torch.get_num_threads()
    config = load(small, f"machine={{num_workers: {workers}, micro_batch: {micro_batch}, cpus_per_worker: {threads}}}")
    found = MEASURE._function(config, config.stages[0])
    assert found == (3.0, 1.5)
    assert [flow.shape for flow in flows] == [(batch, 2, 32, 48)] * 3
    assert all(flow.grad is not None for flow in flows), "the backward pass counts"


def test_a_dry_run_shows_what_does_not_fit(small, load, monkeypatch):
    def too_large(*_: object) -> None:
        raise estimating.TooLargeError

    monkeypatch.setattr(dry_run, "estimate", too_large)
    config = load(small)
    assert dry_run._cost(config, config.stages[0]) == ("", "does not fit")


def test_every_key_is_documented_in_its_class():
    """The guide sends its readers there."""
    modules = (pipelines.training.config, data_config, machine_config, pipelines.sweeping.config)
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    sections = [kind for kind in found if issubclass(kind, Frozen)]
    assert len(sections) >= 20
    missing = [
        f"{section.__name__}.{key}"
        for section in sections
        for key in section.model_fields
        if not any(re.search(rf"\b{key}\b", base.__doc__ or "") for base in section.__mro__[:-1])
    ]
    assert missing == []
