"""Any content of a plan or of a backbone's description is accepted, or refused with one line."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from backbones import SWIN, VIT, Tiny, plan_of, random_kept, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models import SwinTransformer, VisionTransformer

from tapfl.errors import TapflError
from tapfl.models.backbone import BackboneSpec, outline
from tapfl.pruning.plan import PruningPlan, read_plan
from tapfl.pruning.surgery import apply_plan, require_fitting

ODD = st.sampled_from(
    [
        None,
        True,
        0,
        1,
        -1,
        2,
        7,
        10**5,
        2**16,
        2**63,
        10**40,
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "\x1b[2J",
        "64",
        [],
        [0],
        [2, 2],
    ]
) | st.text(max_size=5)
ARGUMENTS = sorted(
    {*inspect.signature(VisionTransformer).parameters, *inspect.signature(SwinTransformer).parameters}
    - {"num_classes", "kwargs"}
)
slowly = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def backbone() -> Tiny:
    return tiny(VIT)


@st.composite
def changed(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a plan after one to three changes at random places."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            match draw(st.sampled_from(("replace", "remove", "twice"))):
                case "replace":
                    place[key] = copy.deepcopy(draw(ODD))  # the next change may be in it
                case "remove":
                    del place[key]
                case _ if isinstance(place, list):
                    place.insert(key, copy.deepcopy(place[key]))
                case _:
                    place[draw(st.text(max_size=5))] = copy.deepcopy(place[key])
            break
    return content


def one_line(action: Callable[[], object]) -> None:
    said = ""
    try:
        action()
    except TapflError as error:
        said = str(error)
    assert said.isprintable() and len(said) < 1000


@slowly
@given(data=st.data())
def test_any_plan(data: st.DataObject, backbone: Tiny, tmp_path: Path) -> None:
    plan = plan_of(backbone, random_kept(backbone.layers, 0.5))
    content = data.draw(changed(plan.content()))
    (tmp_path / "plan.json").write_text(json.dumps(content))
    one_line(lambda: read_plan(tmp_path / "plan.json"))
    with suppress(TapflError):
        plan = PruningPlan.from_json(json.dumps(content))
        one_line(lambda: apply_plan(plan, backbone.model))
        one_line(lambda: require_fitting(plan))


@slowly
@given(
    text=st.text(max_size=50)
    | st.recursive(ODD, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(json.dumps)
)
def test_any_text_as_a_plan(text: str) -> None:
    one_line(lambda: PruningPlan.from_json(text))
    one_line(lambda: BackboneSpec.from_json(text))


@slowly
@given(
    spec=st.sampled_from([VIT, SWIN]),
    args=st.dictionaries(st.sampled_from(ARGUMENTS), ODD, min_size=1, max_size=3),
    classes=st.sampled_from([0, 1, 3, 2**16]),
)
def test_any_arguments_of_a_backbone(spec: BackboneSpec, args: dict[str, Any], classes: int) -> None:
    text = json.dumps({"name": spec.name, "args": dict(spec.args) | args, "num_classes": classes})
    one_line(lambda: outline(BackboneSpec.from_json(text)))
