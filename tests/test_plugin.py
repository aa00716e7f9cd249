"""User-defined criterion, rule, method and backbone: one file each, named instead of a built-in name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapfl.adapters.rules import RULES, rule_of
from tapfl.config import RULES as NAMES
from tapfl.config import RunConfig
from tapfl.errors import ConfigError, ModelError
from tapfl.models.backbone import BackboneSpec, build
from tapfl.personalize.methods import method_of
from tapfl.pruning.criteria.registry import resolved

MODULE = """
from tapfl.adapters.rules import RULES
from tapfl.pruning.criteria.norms import random_units

RULE = RULES["fedit"]


class Method:
    def __init__(self, options, scale):
        self.seen = options.method, scale


def criterion(task):
    return random_units(task)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_built_in_rules_have_the_names_that_options_accept() -> None:
    assert set(RULES) == set(NAMES)


def test_one_file_is_enough(mine: str) -> None:
    options = {
        "adapters.rule": f"{mine}:RULE",
        "personalize.method": f"{mine}:Method",
        "pruning.criterion": f"{mine}:criterion",
    }
    config = RunConfig.from_flat(options)
    assert rule_of(config.adapters) is RULES["fedit"]
    assert method_of(config.personalize, config.adapters, 1).seen == (f"{mine}:Method", 2.0)  # type: ignore[attr-defined]
    assert resolved(config.pruning).ratio == "adaptive"
    assert RunConfig.from_flat(config.flat()) == config


@pytest.mark.parametrize("value", ["nowhere_at_all:RULE", "json:nothing"])
def test_a_missing_plugin_is_refused_by_its_option(value: str) -> None:
    config = RunConfig.from_flat(
        {"adapters.rule": value, "personalize.method": value, "pruning.criterion": value},
    )
    with pytest.raises(ConfigError, match=f"adapters.rule = '{value}': cannot be imported"):
        rule_of(config.adapters)
    with pytest.raises(ConfigError, match=f"personalize.method = '{value}'"):
        method_of(config.personalize, config.adapters, 1)
    with pytest.raises(ConfigError, match=f"pruning.criterion = '{value}'"):
        resolved(config.pruning)


@pytest.mark.parametrize("option", ["adapters.rule", "personalize.method"])
@pytest.mark.parametrize("value", ["flexx", "a:b:c", "os.path", "a b:c"])
def test_other_names_are_refused_with_those_that_are_accepted(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option} = '{value}': must be one of .*, or module:name"):
        RunConfig.from_flat({option: value})


def test_privacy_is_refused_for_a_plugin_rule(mine: str) -> None:
    with pytest.raises(ConfigError, match="accepted are fedit, ffa, rolora and embed_side"):
        RunConfig.from_flat({"privacy.dp-clip": 1.0, "adapters.rule": f"{mine}:RULE"})


def test_a_package_can_offer_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slim_backbones.py").write_text(
        "from timm.models import build_model_with_cfg, register_model\n"
        "from timm.models.vision_transformer import VisionTransformer\n\n\n"
        "@register_model\n"
        "def vit_slim_for_tests(pretrained=False, **kwargs):\n"
        "    sizes = dict(patch_size=4, embed_dim=24, depth=2, num_heads=2)\n"
        "    return build_model_with_cfg(VisionTransformer, 'vit_slim_for_tests', pretrained, **sizes, **kwargs)\n"
    )
    (tmp_path / "slim-1.0.dist-info").mkdir()
    (tmp_path / "slim-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: slim\nVersion: 1.0\n")
    (tmp_path / "slim-1.0.dist-info" / "entry_points.txt").write_text(
        "[tapfl.backbones]\nvit_slim_for_tests = slim_backbones:vit_slim_for_tests\n"
    )
    spec = BackboneSpec(name="vit_slim_for_tests", args={"img_size": 16}, num_classes=3)
    with pytest.raises(ModelError, match="timm has no such model"):
        build(spec)
    monkeypatch.syspath_prepend(tmp_path)
    assert build(spec).embed_dim == 24
