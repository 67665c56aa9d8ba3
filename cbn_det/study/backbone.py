"""Takes the backbone out of a detector's checkpoint, for the fine-tune recipe.

    python -m cbn_det.study.backbone output/digits_pretrain/model_final.pth backbone.pth

Loading the whole checkpoint instead would start FPN and heads from trained weights too, and from
running statistics that only some of the compared norms have a use for.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..run.files import replace_file

# Where detectron2's and the standalone engine's FPN keep the network below it.
PREFIXES = ("backbone.bottom_up.", "backbone.body.")


def extract_backbone(checkpoint: Path, output: Path) -> int:
    """Write the weights of the network below the FPN, from either engine's checkpoint, to `output`;
    how many tensors that are.

    Raises:
        ValueError: the checkpoint has no such weights.
    """
    import torch  # only needed here: everything else of the study works without it

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = {name: w for name, w in state.get("model", {}).items() if name.startswith(PREFIXES)}
    if not weights:
        raise ValueError(f"{checkpoint}: no weights below {' or '.join(PREFIXES)} in it")
    # detectron2 otherwise matches names by their longest common suffix, which could hide a mistake.
    state = {"model": weights, "matching_heuristics": False}
    replace_file(output, lambda file: torch.save(state, file))
    return len(weights)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m cbn_det.study.backbone CHECKPOINT OUTPUT")
    print(f"{extract_backbone(Path(sys.argv[1]), Path(sys.argv[2]))} tensors -> {sys.argv[2]}")
