"""Configurations: the published ones, files of them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gmflow import (
    GMFlow,
    GMFlowConfig,
    GMFlowError,
)
from tests.gmflow.models import REFINE


def test_variants_have_the_published_parameter_counts() -> None:
    for config, parameters in ((GMFlowConfig.base(), 4_680_288), (GMFlowConfig.refine(), 4_716_720)):
        assert sum(p.numel() for p in GMFlow(config).parameters()) == parameters


def test_config_survives_json() -> None:
    for config in (GMFlowConfig.base(), GMFlowConfig.refine(), REFINE):
        told = json.loads(json.dumps(config.to_dict()))
        assert told == config.to_dict(), "plain lists, which YAML holds as well"
        assert GMFlowConfig.from_dict(told) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_scales", 3),
        ("num_scales", True),
        ("backbone_channels", (64, 96)),
        ("backbone_channels", (64, 96, 0)),
        ("feature_channels", 126),
        ("num_layers", 0),
        ("ffn_expansion", 1.5),
        ("attn_splits", (2, 8)),
        ("attn_splits", (0,)),
        ("attn_splits", 2),
        ("corr_radius", (0,)),
        ("corr_radius", (-2,)),
        ("prop_radius", ("1",)),
    ],
)
def test_impossible_settings_name_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(GMFlowError, match=field) as error:
        GMFlowConfig(**{field: value})
    assert str(value).strip("(),'") in str(error.value)


def test_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(GMFlowError, match=r"atn_splits; known: .*attn_splits"):
        GMFlowConfig.from_dict({"atn_splits": [2]})


@pytest.mark.parametrize(
    ("config", "multiple"),
    [
        (GMFlowConfig.base(), 16),
        (GMFlowConfig.refine(), 32),
        (GMFlowConfig(attn_splits=(3,)), 24),
        (GMFlowConfig(2, attn_splits=(3, 8), corr_radius=(-1, 4), prop_radius=(-1, 1)), 96),
        (GMFlowConfig(2, attn_splits=(1, 1), corr_radius=(-1, 4), prop_radius=(-1, 1)), 8),
    ],
)
def test_size_multiple(config: GMFlowConfig, multiple: int) -> None:
    assert config.size_multiple == multiple
