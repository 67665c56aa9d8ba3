"""The engine for machines without detectron2: the same config files on torchvision's parts.

Faster R-CNN and Mask R-CNN with ResNet-FPN, one process, CPU or one GPU. Needs torchvision, fvcore
and pycocotools. Its config has detectron2's keys; a value that it cannot honour is an error.
"""

from .config import get_cfg, read_config

__all__ = ["get_cfg", "read_config"]
