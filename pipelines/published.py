"""The figures that the paper reports, to show beside our own (Xu et al., CVPR 2022; trained on chairs, then things)."""

from collections.abc import Mapping

from datasets_etl.sources import EXPECTED_COUNTS
from gmflow import GMFlowConfig

NOTE = (
    "Published: the paper's, of the same variant, trained on FlyingChairs and FlyingThings3D and scored on the whole "
    "set. They compare with a model of those two stages, not with one that has seen Sintel or KITTI. "
    "Of FlyingThings3D, pixels whose true flow is 400 px or longer are left out, in theirs and in ours."
)

_PUBLISHED: dict[tuple[int, str, str], dict[str, float]] = {
    (1, "things", "val-clean"): {"epe": 3.475},
    (1, "sintel", "training-clean"): {"epe": 1.495, "s0_10": 0.457, "s10_40": 1.770, "s40_plus": 8.257},
    (1, "sintel", "training-final"): {"epe": 2.955},
    (2, "things", "val-clean"): {"epe": 2.804},
    (2, "sintel", "training-clean"): {"epe": 1.084, "s0_10": 0.303, "s10_40": 1.252, "s40_plus": 6.261},
    (2, "sintel", "training-final"): {"epe": 2.475},
    (2, "kitti", "training"): {"epe": 7.77, "f1_all": 23.40},
}


def published_figures(config: GMFlowConfig, dataset: str, subset: str | None, pairs: int) -> Mapping[str, float]:
    """The paper's figures for a subset, under our names.

    Empty for a model that is not a published variant, and for another number of pairs than the whole dataset has: an
    excerpt, or somebody's own pairs in its layout.
    """
    variant = GMFlowConfig.base() if config.num_scales == 1 else GMFlowConfig.refine()
    if config != variant or pairs != EXPECTED_COUNTS.get(dataset, {}).get(subset or ""):
        return {}
    return _PUBLISHED.get((config.num_scales, dataset, subset or ""), {})
