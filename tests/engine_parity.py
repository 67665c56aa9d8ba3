"""The names that detectron2's modules have in the standalone engine's model."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

_RULES = [
    (r"backbone\.bottom_up\.stem\.conv1", "backbone.body.conv1"),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)", r"backbone.body.layer<\1-1>.\2.conv\3"),
    (
        r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut",
        r"backbone.body.layer<\1-1>.\2.downsample.0",
    ),
    (r"backbone\.fpn_lateral(\d)", r"backbone.fpn.inner_blocks.<\1-2>.0"),
    (r"backbone\.fpn_output(\d)", r"backbone.fpn.layer_blocks.<\1-2>.0"),
    (r"proposal_generator\.rpn_head\.conv", "rpn.head.conv.0.0"),
    (r"proposal_generator\.rpn_head\.objectness_logits", "rpn.head.cls_logits"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.bbox_pred"),
    (r"roi_heads\.box_head\.conv(\d)", r"roi_heads.box_head.<\1-1>.0"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)", r"roi_heads.mask_head.<\1-1>.0"),
    (r"roi_heads\.mask_head\.deconv", "roi_heads.mask_predictor.0"),
    (r"roi_heads\.mask_head\.predictor", "roi_heads.mask_predictor.2"),
    (r"roi_heads\.box_predictor\.(\w+)", r"roi_heads.box_predictor.\1"),
]


def our_layer(name: str, convs_in_box_head: int) -> str:
    """Our name of a convolution or linear layer of detectron2's."""
    fc = re.fullmatch(r"roi_heads\.box_head\.fc(\d)", name)
    if fc:  # convolution blocks, Flatten, then Linear and ReLU in turn
        return f"roi_heads.box_head.{convs_in_box_head + 2 * int(fc[1]) - 1}"
    for pattern, replacement in _RULES:
        if re.fullmatch(pattern, name):
            ours = re.sub(pattern, replacement, name)
            return re.sub(r"<(\d)-(\d)>", lambda m: str(int(m[1]) - int(m[2])), ours)
    raise KeyError(name)


def our_norm(conv: str) -> str:
    """The name of the norm that follows a convolution of ours."""
    stem, _, last = conv.rpartition(".")
    return f"{stem}.{last.replace('conv', 'bn')}" if "conv" in last else f"{stem}.1"


def our_state(theirs: dict[str, torch.Tensor], convs_in_box_head: int) -> dict[str, torch.Tensor]:
    """A detectron2 model's state dict as one of ours."""
    state = {}
    for key, value in theirs.items():
        layer, _, kind = key.rpartition(".")
        if layer in ("", "proposal_generator.anchor_generator.cell_anchors"):
            continue  # pixel_mean and pixel_std, the anchors
        if layer.endswith(".norm"):
            name = our_norm(our_layer(layer.removesuffix(".norm"), convs_in_box_head))
        else:
            name = our_layer(layer, convs_in_box_head)
        if name == "roi_heads.box_predictor.cls_score":
            value = value.roll(1, dims=0)  # the background: last there, first here
        state[f"{name}.{kind}"] = value.clone()
    return state


def norm_site(conv: nn.Conv2d, norm: nn.Module) -> tuple[Any, ...]:
    """What must agree between the engines at a norm."""
    return (
        type(norm).__name__,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.bias is None,
        conv.weight.requires_grad,
        [name for name, p in norm.named_parameters() if p.requires_grad],
        getattr(norm, "num_groups", None),
        norm.eps,
    )
