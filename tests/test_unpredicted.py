"""What KN and GKN do not predict is said once, and nothing outside of their layers notices them."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from torch import nn

from cbn_det.norms import build_norm, convert_norm, find_chain, kn_chain

KN, GKN = "KN(gain=0.5)", "GKN(groups=2, gain=0.5)"


def network(activation: nn.Module, layers: int, norm: str = KN) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(4 if k else 3, 4, 3, padding=1), build_norm(norm, 4), activation)
        for k in range(layers)
    ]
    return nn.Sequential(*blocks)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def warnings_of_training(model: nn.Module, iterations: int = 4) -> list[str]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(iterations):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
    return [str(w.message) for w in caught if "KN" in str(w.message)]


# ---- one warning -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [KN, GKN])
def test_a_network_of_unknown_activations_says_so_once(norm):
    (said,) = warnings_of_training(network(nn.Tanh(), 9, norm))
    assert "predict nothing for 9 of 9 layers" in said and "kn_chain(model)" in said
    assert "(8: no rule for Tanh; 1: a model input, or frozen)" in said


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.1), nn.GELU()])
def test_the_first_layer_of_a_network_is_nothing_to_speak_of(activation):
    model = network(activation, 3)
    assert warnings_of_training(model) == []
    assert [row.follows.startswith("-") for row in kn_chain(model)] == [True, False, False]


def test_frozen_parts_that_nobody_looked_through_are_named_with_the_remedy():
    """A frozen backbone, of which four levels go into norms, as into an FPN."""

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = network(nn.ReLU(), 4, "KN(gain=0)").requires_grad_(False)
            self.laterals = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 4, 1), build_norm(KN, 4)) for _ in range(4)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = 0.0
            for block, lateral in zip(self.backbone, self.laterals, strict=True):
                x = block(x)
                total = total + lateral(x)
            return total

    model = Levels()
    (said,) = warnings_of_training(copy.deepcopy(model))
    assert "4 of 4 layers" in said and "find_chain(model, batch) before training" in said
    find_chain(model, X)
    assert warnings_of_training(model) == []
    assert kn_chain(model)[-1].follows == "relu(backbone.3.1)"


def test_several_models_are_not_taken_for_one():
    models = nn.ModuleList(network(nn.ReLU(), 2) for _ in range(4))
    optimizer = torch.optim.SGD(models.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            sum(model(X).sum() for model in models).backward()
            optimizer.step()


def test_a_copy_of_a_trained_model_says_nothing_again():
    model = network(nn.Tanh(), 3)
    assert len(warnings_of_training(model)) == 1
    assert warnings_of_training(copy.deepcopy(model)) == []


# ---- other people's models -------------------------------------------------------------------


@pytest.fixture(params=[KN, GKN])
def alive(request) -> nn.Module:
    """A model of these norms that has trained and looks for its chain."""
    model = network(nn.ReLU(), 2, request.param)
    model(X).sum().backward()
    find_chain(model, X)
    return model


def bystander() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def test_no_hook_of_the_process_watches_forwards(alive):
    from torch.nn.modules import module

    hooks = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    assert [len(getattr(module, name)) for name in hooks] == [0, 0, 0]
    # which makes torch's way from a call to the forward the short one
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in alive.modules())


def test_looking_for_a_chain_keeps_no_batch_alive():
    model = network(nn.ReLU(), 2)
    batch = X.clone()
    alive = weakref.ref(batch)
    model(batch).sum().backward()
    del batch
    gc.collect()
    assert alive() is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_frozen_scripts_of_other_models_run(alive):
    model = bystander()
    frozen = torch.jit.freeze(torch.jit.script(model))
    file = io.BytesIO()
    torch.jit.save(frozen, file)
    file.seek(0)
    for script in (frozen, torch.jit.load(file)):
        torch.testing.assert_close(script(X), model(X))


def test_other_models_are_exported(alive):
    model = bystander()
    exported = torch.export.export(model, (X,), strict=True)
    torch.testing.assert_close(exported.module()(X), model(X))


def test_replaced_modules_of_other_models_change_nothing(alive):
    rows = kn_chain(alive)
    other = bystander()
    other[2] = nn.SiLU()
    other[1].weight = nn.Parameter(torch.ones(4))
    assert kn_chain(alive) == rows and not any(row.follows == "?" for row in rows)
    alive[0][2] = nn.SiLU()
    assert all(row.follows == "?" for row in kn_chain(alive))


# ---- exporting GKN, and the report of a conversion -------------------------------------------


def gkn_in_evaluation() -> nn.Module:
    model = network(nn.ReLU(), 3, GKN).eval()
    find_chain(model, X)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("gradients", [True, False])
def test_gkn_is_traced(gradients):
    model = gkn_in_evaluation()
    x = torch.randn(3, 3, 8, 8)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (X,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for script in (traced, torch.jit.load(file), torch.jit.freeze(traced)):
        torch.testing.assert_close(script(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_gkn_is_exported(strict):
    model = gkn_in_evaluation()
    exported = torch.export.export(model, (X,), strict=strict)
    torch.testing.assert_close(exported.module()(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_gkn_runs_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime")
    model, file = gkn_in_evaluation(), str(tmp_path / "model.onnx")
    axes = {"x": {0: "images", 2: "height", 3: "width"}}
    torch.onnx.export(model, (X,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    x = torch.randn(3, 3, 11, 9)
    (found,) = runtime.InferenceSession(file).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def test_a_conversion_speaks_of_binding_only_where_the_norm_needs_it():
    def converted(norm: str) -> str:
        return str(convert_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), norm))

    assert converted("KN") == "1 of 1 norm layers converted: BatchNorm2d -> KN"
    assert converted("CBN").endswith("-> CBN; 1 bound to their convolution")
