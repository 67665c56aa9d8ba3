"""RoI heads with detectron2's parameters and initial weights, from torchvision's parts.

torchvision counts the background as class 0 and gives it four box deltas and a mask of its own,
which nothing ever reads; detectron2 doesn't. The predictors here have detectron2's outputs and put
zeros where torchvision's code expects the background's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from .norm_layers import NormLayer

#: probability from which a pixel is of the object, in evaluation and in prediction
MASK_THRESHOLD = 0.5


class BoxPredictor(nn.Module):
    """Class scores and box deltas of RoIs.

    Args:
        in_channels: length of an RoI's feature vector.
        num_classes: K, without background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, num_classes * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[n, in_channels] to class logits [n, 1 + K], background first, and deltas
        [n, (1 + K) * 4], the background's zero."""
        return self.cls_score(features), F.pad(self.bbox_pred(features), (4, 0))


class MaskPredictor(nn.Sequential):
    """Mask logits of RoIs, at twice the resolution of their features.

    Args:
        in_channels: channels of an RoI's features.
        hidden_channels: channels after the upsampling.
        num_classes: K, without background.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_classes: int) -> None:
        deconv = nn.ConvTranspose2d(in_channels, hidden_channels, kernel_size=2, stride=2)
        logits = nn.Conv2d(hidden_channels, num_classes, kernel_size=1)
        super().__init__(deconv, nn.ReLU(inplace=True), logits)
        nn.init.kaiming_normal_(deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(logits.weight, std=0.001)
        nn.init.zeros_(deconv.bias)
        nn.init.zeros_(logits.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_channels, s, s] to [n, 1 + K, 2s, 2s]; channel 0, the background's, is zero."""
        return F.pad(super().forward(features), (0, 0, 0, 0, 1, 0))


def box_head(
    input_size: tuple[int, int, int],
    conv_layers: list[int],
    fc_layers: list[int],
    norm_layer: NormLayer,
) -> tuple[FastRCNNConvFCHead, int]:
    """torchvision's box head with detectron2's initial weights.

    Args:
        input_size: (channels, height, width) of an RoI's features.
        conv_layers: output channels of each 3x3 convolution.
        fc_layers: output length of each fully connected layer.
        norm_layer: makes the norm after each convolution from its channels; None for none.

    Returns:
        The head, and the length of the vectors that it gives.
    """
    head = FastRCNNConvFCHead(input_size, conv_layers, fc_layers, norm_layer)
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    channels, height, width = input_size
    flat = (conv_layers[-1] if conv_layers else channels) * height * width
    return head, fc_layers[-1] if fc_layers else flat
