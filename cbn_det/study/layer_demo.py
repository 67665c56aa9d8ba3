"""The norms on a small classifier: what `make demo` can show where there is no detectron2.

Handwritten digits of scikit-learn (8x8 pixels), a plain convolutional network, 2 images per batch.
It shows that the layers train and how to build them; it says nothing about detection. This module,
unlike the rest of the study, trains something itself.

    python -m cbn_det.study.layer_demo
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from cbn_det.norms import build_norm, resolve_burn_in

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
    "CBN": lambda channels: build_norm("CBN", channels),
}
IMAGES_PER_BATCH = 2
ITERATIONS = 2000
SEEDS = (1, 2, 3)
CHANNELS = (32, 64, 64)


class Classifier(nn.Sequential):
    """Three 3x3 convolutions, each with norm and ReLU, then average pooling and a linear layer."""

    def __init__(self, norm: str) -> None:
        layers: list[nn.Module] = []
        inputs = 1
        for i, outputs in enumerate(CHANNELS):
            conv = nn.Conv2d(inputs, outputs, 3, stride=2 if i == 1 else 1, padding=1, bias=False)
            # CBN finds its convolution by itself: it is the one right before it.
            layers += [conv, NORMS[norm](outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def load_split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and validation images [N, 1, 8, 8] in 0..1, training and validation labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(data.target)
    parts = train_test_split(images, labels, test_size=0.3, random_state=0, stratify=labels)
    return tuple(parts)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers, in percent, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return 100.0 * (model(images).argmax(1) == labels).float().mean().item()


def train_one(norm: str, seed: int, iterations: int, progress: str | None = None) -> dict:
    """Train one classifier; the recipe is the same for every norm.

    Returns:
        {"accuracy": percent on held-out digits, "sec_per_iter": seconds}.
    """
    images, val_images, labels, val_labels = load_split()
    torch.manual_seed(seed)
    model = Classifier(norm)
    resolve_burn_in(model, iterations)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    started = time.perf_counter()
    steps = range(iterations)
    for _ in track(steps, description=progress) if progress else steps:
        chosen = torch.randint(len(images), (IMAGES_PER_BATCH,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        decay.step()
    seconds = (time.perf_counter() - started) / iterations
    return {"accuracy": accuracy(model, val_images, val_labels), "sec_per_iter": seconds}


def main(iterations: int = ITERATIONS) -> None:
    """Train every norm with every seed and print the table."""
    torch.set_num_threads(1)  # the network is too small to gain from more
    rows = []
    for norm in NORMS:
        runs = [train_one(norm, seed, iterations, f"{norm} seed {seed}") for seed in SEEDS]
        scores = [run["accuracy"] for run in runs]
        rows.append(
            {
                "norm": norm,
                "images per batch": IMAGES_PER_BATCH,
                "accuracy %": f"{statistics.fmean(scores):.1f} ± {statistics.stdev(scores):.1f}",
                "ms/iter": f"{1000 * statistics.fmean(run['sec_per_iter'] for run in runs):.2f}",
            }
        )
    print(f"\nDigit classification (not detection), {iterations} iterations, {len(SEEDS)} seeds:\n")
    print(tabulate(rows, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
