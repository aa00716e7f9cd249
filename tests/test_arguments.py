"""Arguments of timm's constructors: each that does not give a model from images to (n, classes) is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from backbones import SWIN, VIT
from torch import nn

from tapfl.arguments import parse_args, written
from tapfl.config import ModelOptions
from tapfl.errors import ModelError
from tapfl.models.backbone import BackboneSpec, build, check_arguments, spec_of
from tapfl.models.dense import layers_of

CLASSES = tuple("abcde")
# for each family: timm's name, and arguments for a tiny model
BASES = {
    "vit": ("vit_tiny_patch16_224", "img_size=16,patch_size=4,embed_dim=16,depth=1,num_heads=2"),
    "deit": ("deit_tiny_distilled_patch16_224", "img_size=32,embed_dim=16,depth=1,num_heads=2"),
    "pit": ("pit_ti_224", "img_size=32,base_dims=8/8,depth=1/1,heads=2/4"),
    "swin": ("swin_tiny_patch4_window7_224", "img_size=32,embed_dim=12,depths=1/1,num_heads=2/4,window_size=2"),
}
REFUSED = [
    # for timm text and numbers are true, so a text such as "no" would switch something on
    ("vit", "class_token=no", "accepted for class_token: True or False"),
    ("vit", "qkv_bias=flase", "accepted for qkv_bias: True or False"),
    ("vit", "no_embed_class=2", "accepted for no_embed_class: True or False"),
    ("vit", "patch_size=True", "accepted for patch_size: whole numbers"),
    ("vit", "num_heads=True", "accepted for num_heads: whole numbers"),
    ("vit", "depth=two", "accepted for depth: whole numbers"),
    ("vit", "depth=", "accepted for depth: whole numbers"),
    ("vit", "embed_dim=16.0", "accepted for embed_dim: whole numbers"),
    ("vit", "mlp_ratio=True", "accepted for mlp_ratio: numbers"),
    ("vit", "init_values=None", "accepted for init_values: numbers"),
    ("vit", "global_pool=fast", "accepted for global_pool: avg or avgmax or max or token or map or prr"),
    ("vit", "weight_init=x", "accepted for weight_init: reset or jax or jax_nlhb or moco"),
    ("vit", "block_fn=ResPostBlock", "accepted for block_fn: none, as it takes a class"),
    ("vit", "norm_layer=1", "accepted for norm_layer: a name"),
    ("pit", "distilled=1", "accepted for distilled: True or False"),
    ("pit", "stride=1.5", "accepted for stride: whole numbers"),
    ("swin", "head_dim=False", "accepted for head_dim: whole numbers"),
    # arguments that timm removes before it calls the constructor
    ("vit", "depht=3", "vit_tiny_patch16_224 has no argument depht; accepted: act_layer"),
    ("vit", "kwargs_filter=depth", "has no argument kwargs_filter"),
    ("vit", "features_only=True", "has no argument features_only"),
    ("vit", "out_indices=0/1", "has no argument out_indices"),
    ("vit", "exportable=True", "has no argument exportable"),
    ("vit", "cache_dir=x", "has no argument cache_dir"),
    ("vit", "pruned=True", "has no argument pruned"),
    ("vit", "use_naflex=False", "has no argument use_naflex"),
    ("deit", "distilled=True", "has no argument distilled"),
    ("swin", "output_stride=8", "has no argument output_stride"),
    ("vit", "num_classes=5", "num_classes: is set by the classes of the data"),
    ("vit", "weight_init=skip", "leaves the weights uninitialised"),
    ("swin", "weight_init=skip", "leaves the weights uninitialised"),
    # output is not one row of classes per image
    ("vit", "global_pool=", r"turns one image into \(1, 17, 5\); accepted: \(1, 5\)"),
    ("pit", "global_pool=", r"turns one image into \(1, 1, 5\)"),
    ("swin", "global_pool=", r"turns one image into \(1, 4, 4, 5\)"),
    ("vit", "in_chans=4", r"images of in_chans=4 channels; accepted: 1 \(grey\) or 3 \(colour\)"),
    ("swin", "in_chans=2", "images of in_chans=2 channels"),
    ("pit", "in_chans=0", "images of in_chans=0 channels"),
    # a forward pass that fails
    ("vit", "img_size=3", r"cannot take an image of \(3, 3, 3\) \(.*size"),
    ("vit", "patch_size=32", r"cannot take an image of \(3, 16, 16\)"),
    ("vit", "num_heads=-1", "cannot take an image of"),
    ("vit", "norm_layer=batchnorm2d", "cannot take an image of .*expected 4D input"),
    ("vit", "embed_norm_layer=layernorm2d", "cannot take an image of"),
    ("deit", "no_embed_class=True", "cannot take an image of .*broadcast"),
    ("pit", "depth=1/", "base_dims=8/8,heads=2/4,depth=1/': differ in length"),
    ("pit", "heads=1/1/1", "differ in length; accepted: one value per stage"),
    ("swin", "num_heads=1/1/1", "depths=1/1,num_heads=1/1/1': differ in length"),
    ("pit", "patch_size=0", r"has an empty patch_embed\.conv\.weight"),
    # refused by timm itself; an assertion without a message is quoted
    ("vit", "pos_embed=sincos", "timm cannot build .*assert pos_embed in"),
    ("vit", "class_token=False", "timm cannot build .*Token pooling needs the class token"),
    ("vit", "embed_dim=15", "timm cannot build .*divisible by num_heads"),
    ("pit", "global_pool=avg", "timm cannot build .*token pooling"),
    # dropout is never active
    ("vit", "patch_drop_rate=0.5", "dropout is not supported, even in training; accepted: 0"),
    ("swin", "drop_path_rate=1.5", "dropout is not supported"),
]
# valid but unusual: accepted
TAKEN = [
    ("vit", "patch_size=4/2"),
    ("vit", "global_pool=map"),
    ("vit", "init_values=1"),
    ("vit", "norm_layer=rmsnorm"),
    ("vit", "reg_tokens=4"),
    ("vit", "dynamic_img_size=True"),
    ("vit", "drop_rate=0"),
    ("pit", "img_size=32/64"),
    ("pit", "patch_size=2/2"),
    ("swin", "depths=0/1"),
    ("swin", "img_size=15/18"),
    ("swin", "window_size=100"),
    ("swin", "strict_img_size=False"),
]


def options(family: str, argument: str) -> ModelOptions:
    name, base = BASES[family]
    key = argument.partition("=")[0]
    args = [part for part in base.split(",") if part.partition("=")[0] != key]
    return ModelOptions.model_validate({"name": name, "args": ",".join([*args, argument])})


@pytest.mark.parametrize(("family", "argument", "said"), REFUSED)
def test_an_argument_that_gives_no_classifier_of_images_is_refused(family: str, argument: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as refused:
        build(spec_of(options(family, argument), CLASSES))
    message = str(refused.value)
    assert message.startswith("model.args = ") and argument.partition("=")[0] in message and "\n" not in message


@pytest.mark.parametrize(("family", "argument"), TAKEN)
def test_an_unusual_argument_is_accepted(family: str, argument: str) -> None:
    model = build(spec_of(options(family, argument), CLASSES))
    height, width = model.patch_embed.img_size  # type: ignore[union-attr]
    with torch.no_grad():
        assert model(torch.zeros(2, 3, height, width)).shape == (2, 5)


@pytest.mark.parametrize(("argument", "said"), [("qk_norm=True", "it has q_norm"), ("depth=0", "has no attention")])
def test_a_backbone_that_cannot_be_cut_is_refused_by_its_options(argument: str, said: str) -> None:
    given = options("vit", argument)
    with pytest.raises(ModelError, match=rf"model\.name = 'vit_tiny.*' with model\.args = '.*{argument}': .*{said}"):
        layers_of(build(spec_of(given, CLASSES)), given)


def test_zero_classes_mean_features() -> None:
    model = build(BackboneSpec(name=VIT.name, args=VIT.args, num_classes=0))
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 32)


@pytest.mark.parametrize("text", ["=1", " = ", "depth=2,=", "depth=2,3"])
def test_a_part_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match=r"model\.args = .*must have the form key=value"):
        spec_of(ModelOptions(args=text), CLASSES)


def test_a_key_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.args = 'depth=2, depth =3': depth is given twice"):
        spec_of(ModelOptions(args="depth=2, depth =3"), CLASSES)


def test_arguments_are_written_as_they_are_read() -> None:
    text = "img_size=36/60,class_token=False,global_pool=avg,init_values=0.5,depths=2/"
    assert written(parse_args(text)) == text


def test_a_message_s_arguments_are_checked_as_well() -> None:
    spec = BackboneSpec.from_json(json.dumps(SWIN.model_dump() | {"args": SWIN.args | {"qkv_bias": "no"}}))
    with pytest.raises(ModelError, match="accepted for qkv_bias: True or False"):
        build(spec)


def test_arguments_of_an_own_class_are_known_by_its_constructors() -> None:
    """A parameter without type takes any value; a class that passes on the rest takes what its parents take."""

    class Parent(nn.Module):
        def __init__(self, depth: int = 2) -> None: ...

    class Child(Parent):
        def __init__(self, slim=None, **others: int) -> None: ...  # type: ignore[no-untyped-def]

    check_arguments({"slim": "x", "depth": 3}, VIT.name, Child)
    with pytest.raises(ModelError, match="accepted for depth: whole numbers"):
        check_arguments({"depth": "x"}, VIT.name, Child)
    with pytest.raises(ModelError, match=r"has no argument slim; accepted: depth"):
        check_arguments({"slim": "x"}, VIT.name, Parent)
