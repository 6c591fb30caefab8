"""Which configs are refused, and how."""

from types import SimpleNamespace

import pytest

import pipelines.sweep
from pipelines.config_file import load_config
from pipelines.errors import PipelineError
from pipelines.sweep import prepare
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.settings import Setting, grid_settings
from pipelines.training.data_config import SetConfig, SubsetConfig
from tests.conftest import ROOT
from tests.pipelines.sweeping.made import REFINE


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["tune.space.attn_splits=[[3],[8]]"], r"attn_splits 3 at scale 1 .* 8×12 of crop 64×96 .* valid are 1, 2, 4"),
        (["tune.space.attn_splits=[[2]]"], r"tune.space.attn_splits holds 1 list; this model has 2 scale"),
        (
            ["probe.grid.corr_radius=[0, 3]"],
            r"probe.grid.corr_radius: 0 makes no sense; valid are whole numbers from 1",
        ),
        (["probe.grid.corr_radius=[-1]"], r"corr_radius: -1 makes no sense"),
        (["model.variant=base", "probe.grid.attn_splits=[[2]]"], "a model of one scale matches globally"),
        (["tune.space.num_layers=[2, 4]"], r"change the weights' layout.* set tune.start=random"),
        (["tune.searcher=random"], "trials is missing"),
        (["tune.space.peak_lr={low: 1e-5, high: 1e-4}"], "a grid needs values"),
        (["tune.stage.validate_every=30"], "asha stops nothing"),
        (["tune.stage.validation=[{data: chairs, subset: val, limit: 2}]"], r"of chairs/val.*\(all / first 2 pairs\)"),
        (["tune.stage.validation=[{data: chairs, subset: val, only: ['0*']}]"], r"of chairs/val.*\(all / only 0\*\)"),
        (["seed=9223372036854775808"], "seed"),
        (
            ["tune.stage.gates=[{data: chairs, subset: val, metric: epe, below: 5}]"],
            "stage.gates: nothing is built on a trial",
        ),
        (["objective.subset=train"], r"probe.validation lacks chairs/train, the objective"),
        (["weights=null"], "which model is probed"),
        (["probe.gird={}"], "unknown key probe.gird; did you mean grid"),
        (["tune.machine.num_workers=5"], "cannot feed"),
        (["cost={use_gpu: true, clock: cpu}"], "tells nothing of a GPU"),
    ],
)
def test_a_wrong_config_is_refused_with_the_way_out(tree, load, overrides, complaint):
    load(tree)
    with pytest.raises(PipelineError, match=complaint):
        load(tree, *overrides)


@pytest.mark.parametrize("file", ["sweep.yaml", "sweep_demo.yaml"])
def test_the_ready_configs_are_valid(file):
    urls = [f"data.{name}=URL" for name in ("sintel", "things", "kitti", "chairs")]
    config = load_config(SweepConfig, str(ROOT / "pipelines" / "configs" / file), [*urls, "weights=w.pth"])
    assert config.tune is not None
    held_out = {(part.data, part.without) for part in config.tune.stage.mixture if part.without}
    assert {(chosen.data, chosen.only) for chosen in config.tune.stage.validation if chosen.only} == held_out
    if config.probe is not None:
        assert {(chosen.data, chosen.only) for chosen in config.probe.validation} == held_out
        assert config.reference == Setting((2, 8), (-1, 4), (-1, 1))
        assert config.reference in config.probed


def test_the_grid_is_every_combination_and_holds_the_reference(tree, load):
    probed = load(tree).probed
    assert len(probed) == 9  # 2 × 2 × 2, and the reference, whose radius 4 is not in the grid
    assert len(set(probed)) == 9
    assert probed[-1] == Setting.of(REFINE)
    assert probed[:8] == grid_settings(Setting.of(REFINE), [[1, 2], [4, 8]], [2, 3], None)


def test_a_sweep_whose_windows_do_not_fit_its_pictures_says_so_before_anything_starts(manifests, tmp_path):
    sets = [{"data": "chairs", "subset": "val"}]
    config = {
        "name": "probe",
        "storage": str(tmp_path / "storage"),
        "data": {"chairs": manifests["chairs"]},
        "model": {"variant": "refine", "attn_splits": [1, 2], "corr_radius": [-1, 2]},
        "weights": "w.pth",
        "objective": sets[0],
        "cost": {"height": 48, "width": 64},
        "probe": {"grid": {"attn_splits": [[1], [2, 16]]}, "validation": sets},
    }
    with pytest.raises(PipelineError, match=r"attn_splits 16 at scale 2 cuts images of 48×64"):
        prepare(SweepConfig.model_validate(config))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["tune.space.corr_radius=[2,2]"], r"corr_radius: \[2, 2\]: give at least one value, and each once"),
        (["tune.space.peak_lr=[]"], r"peak_lr: \[\]: give at least one value"),
        (["tune.start=random", "tune.space.num_layers=[]"], r"num_layers: \[\]: give at least one value"),
        (["tune.space.attn_splits=[[],[4]]"], r"attn_splits: \[\]: give at least one value"),
        (["probe.grid.attn_splits=[[],[4]]"], r"attn_splits: \[\]: give at least one value"),
        (["tune.searcher=optuna", "tune.trials=3", "tune.space=null"], "space"),
        (["tune.start=random", "tune.space.feature_channels=[30, 64]"], "feature_channels"),
        (["name=champion", "registration={best: 1}"], "'champion' means something else in the model registry"),
        (["name=v3", "registration={best: 1}"], "'v3' means something else in the model registry"),
        (["data={chairs: c.json, a/b: c.json}"], "allowed are letters, digits"),
        (
            ["probe.validation=[{data: chairs, subset: val}, {data: chairs, subset: val, limit: 2}]"],
            "names chairs/val twice",
        ),
        (["weights=null", "probe=null"], "give what trials start from"),
        (["tune.stage.crop=[64, 100]"], "crop 64×100 must be divisible by 8"),
    ],
)
def test_what_no_search_could_use_is_refused(tree, load, overrides, complaint):
    with pytest.raises(PipelineError, match=complaint):
        load(tree, *overrides)


def test_optuna_needs_something_to_choose(tree, load):
    tree["tune"]["space"] = {}
    with pytest.raises(PipelineError, match="space is empty: between what may optuna choose"):
        load(tree, "tune.searcher=optuna", "tune.trials=3")


def test_what_is_asked_for_of_asha_and_of_weights_is_not_asked_for_without_them(tree, load):
    load(tree, "tune.stage.validate_every=30", "tune.scheduler=none")
    load(tree, "weights=null", "probe=null", "tune.start=random")
    load(tree, "name=champion")  # it becomes no alias


def test_a_trials_best_checkpoint_is_by_what_its_data_can_tell(tree, load, monkeypatch):
    config = load(tree, "tune.stage.keep_best={data: chairs, subset: val, metric: matched}")
    manifest = SimpleNamespace(has_occlusion=False, dataset="chairs")
    monkeypatch.setattr(pipelines.sweep.Manifest, "load", lambda url: manifest)
    monkeypatch.setattr(SubsetConfig, "indices", lambda *_: [])
    monkeypatch.setattr(SetConfig, "indices", lambda *_: [])
    with pytest.raises(PipelineError, match="keep_best: val/chairs/val/matched will have no value"):
        prepare(config)
