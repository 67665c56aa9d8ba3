"""Lightning's trainer, as docs/integrate.md says to use it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from small import (
    Net,
    batches,
    distance,
    inputs_of_norms,
    loss_of,
    net,
    norms_of,
    worst_distance,
)
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from cbn_det.norms import (
    DoubleForward,
    load_memory_state_dict,
    memory_state_dict,
    resolve_burn_in,
)

pl = pytest.importorskip("lightning.pytorch", reason="no training library: lightning")


class Task(pl.LightningModule):
    """Trains a network by ``self.net``, as most Lightning modules do."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.net = net(norm)
        self.lr = 0.1

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Norms(pl.Callback):
    """What docs/integrate.md has a user write: schedule, second pass, checkpoints."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        resolve_burn_in(module, int(trainer.estimated_stepping_batches))
        self.second = DoubleForward(module.net)

    def on_train_batch_end(self, *_: object) -> None:
        self.second.refresh()

    def on_fit_end(self, *_: object) -> None:
        self.second.remove()

    def on_save_checkpoint(self, _: pl.Trainer, module: nn.Module, checkpoint: dict) -> None:
        checkpoint["norms"] = memory_state_dict(module)

    def on_load_checkpoint(self, _: pl.Trainer, module: nn.Module, checkpoint: dict) -> None:
        load_memory_state_dict(module, checkpoint["norms"])


def trainer(**options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(**quiet | options)


def loader(count: int, seed: int = 0, **shape) -> DataLoader:
    return DataLoader(batches(count, seed, **shape), batch_size=None)


@pytest.fixture(autouse=True)
def _quiet():
    """Lightning warns of few workers and the like."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


NORMS = ["BRN(burn_in=0.25, ramp=0.5)", "CBN(burn_in=0.25)", "MBN(burn_in=0.25)"]


@pytest.mark.parametrize("norm", ["BN", "BGN(groups=4)", "KN", *NORMS])
def test_stochastic_weight_averaging_leaves_the_statistics_of_what_it_showed(norm) -> None:
    """Its last epoch computes the statistics anew, with momentum None and gradient enabled."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    task = Task(norm)
    data = batches(20, 0, scale=2.0, shift=1.0)
    seen_by_epoch, states = [], []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, *_: object) -> None:
            self.watching = inputs_of_norms(task)
            seen_by_epoch.append(self.watching.__enter__())

        def on_train_batch_start(self, *_: object) -> None:
            states.append(copy.deepcopy(task.net.state_dict()))

        def on_train_epoch_end(self, *_: object) -> None:
            self.watching.__exit__(None, None, None)

    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    trainer(max_epochs=2, callbacks=[averaging, Norms(), Watch()]).fit(
        task, DataLoader(data, batch_size=None)
    )
    assert len(seen_by_epoch) == 3 and len(seen_by_epoch[2][0]) == len(data)
    assert worst_distance(task, seen_by_epoch[2]) < 0.02
    if norm.startswith("BGN"):
        return  # BatchNorm's statistics are others
    # at the weights of that epoch, whose last batch ends in a step with the gradients of an earlier
    plain = Net("BN")
    plain.load_state_dict(states[-1])
    update_bn(data, plain)
    for ours, theirs in zip(norms_of(task), norms_of(plain), strict=True):
        mean, var = (value.double().numpy() for value in (theirs.running_mean, theirs.running_var))
        assert distance(ours, mean, var) < 0.02


class StopAfter(pl.Callback):
    """Interrupts the training at the end of an epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("norm", NORMS)
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, norm) -> None:
    """fit(ckpt_path=...) at 3/4 of the schedule, in a process that remembers nothing."""
    whole = Task(norm)
    trainer(max_epochs=4, callbacks=[Norms()]).fit(whole, loader(4))

    saving = trainer(max_epochs=4, callbacks=[Norms(), StopAfter(3)])
    saving.fit(Task(norm), loader(4))
    saving.save_checkpoint(tmp_path / "at_12.ckpt")

    resumed, going_on = Task(norm), trainer(max_epochs=4, callbacks=[Norms()])
    going_on.fit(resumed, loader(4), ckpt_path=tmp_path / "at_12.ckpt")
    assert (saving.global_step, going_on.global_step) == (12, 16)
    for (key, one), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key


class StartOnly(Norms):
    """Tells the layers how far training was; their memory is in no checkpoint."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        resolve_burn_in(module, steps, start_iter=trainer.global_step)

    def on_save_checkpoint(self, *_: object) -> None:
        pass

    def on_load_checkpoint(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("norm", NORMS)
def test_a_resumed_fit_without_memory_is_past_its_burn_in(tmp_path, norm) -> None:
    saving = trainer(max_epochs=4, callbacks=[StartOnly(), StopAfter(3)])
    saving.fit(Task(norm), loader(4))
    saving.save_checkpoint(tmp_path / "at_12.ckpt")
    resumed, plain = Task(norm), Task("BN")
    for task, callbacks in ((resumed, [StartOnly()]), (plain, [])):
        trainer(max_epochs=4, callbacks=callbacks).fit(
            task, loader(4), ckpt_path=tmp_path / "at_12.ckpt"
        )
    assert [layer.steps for layer in norms_of(resumed)] == [15, 15]  # the last one is pending
    assert not torch.equal(resumed.net.layers[0].weight, plain.net.layers[0].weight)


@pytest.mark.parametrize("callbacks", [(), (Norms,)], ids=["alone", "with our callback"])
@pytest.mark.parametrize(
    "norm",
    ["BN", "BRN(burn_in=4, ramp=6)", "CBN(burn_in=4)", "MBN(burn_in=4, double_forward=False)"],
)
def test_the_learning_rate_finder_leaves_no_trace(tmp_path, norm, callbacks) -> None:
    """It trains, then loads the first weights back: memory and steps of what it tried are gone."""
    from lightning.pytorch.tuner import Tuner

    def fitting() -> pl.Trainer:
        return trainer(
            max_epochs=2, callbacks=[kind() for kind in callbacks], default_root_dir=tmp_path
        )

    plain, task = Task(norm), Task(norm)
    fitting().fit(plain, loader(6))
    with_finder = fitting()
    Tuner(with_finder).lr_find(task, loader(6), num_training=10, update_attr=False)
    with_finder.fit(task, loader(6))
    for (key, one), other in zip(
        plain.state_dict().items(), task.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key


def test_double_forward_of_a_module_that_is_never_called_is_told() -> None:
    """training_step calls ``self.net``, so hooks on the LightningModule see no forward."""

    class OfTheModule(Norms):
        def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            super().on_fit_start(trainer, module)
            self.second.remove()
            self.second = DoubleForward(module)

    with pytest.warns(UserWarning, match="DoubleForward") as caught:
        trainer(max_epochs=2, callbacks=[OfTheModule()]).fit(Task("MBN(burn_in=2)"), loader(6))
    told = [str(warning.message) for warning in caught if "DoubleForward" in str(warning.message)]
    assert len(told) == 1 and "MBN" in told[0]


def test_double_forward_of_the_network_runs_after_each_step_and_nothing_is_told() -> None:
    ran = []

    class Counted(Norms):
        def on_train_batch_end(self, *_: object) -> None:
            ran.append(self.second.refresh())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=2, callbacks=[Counted()]).fit(Task("MBN(burn_in=2)"), loader(6))
    assert ran == [False] * 2 + [True] * 10
    assert not [w for w in caught if "MBN" in str(w.message)]
