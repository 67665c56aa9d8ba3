"""Several processes (gloo, CPU): running statistics are pooled, memory stays each rank's own, and
nothing in forward waits for another rank."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cbn_det.norms import build_norm, memory_state_dict, sync_running_stats

SPECS = {
    "CBN": "CBN(window=3, burn_in=0)",
    "MBN": "MBN(window=3, burn_in=0)",
    "BRN": "BRN(burn_in=0, ramp=0, momentum=0.3)",
    "KN": "KN(gain=0.3)",
    "BGN": "BGN(groups=2)",
}
every_norm = pytest.mark.parametrize("key", SPECS)


def model_of(key="CBN"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), build_norm(SPECS[key], 4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), build_norm(SPECS[key], 4),
    )  # fmt: skip


def numbers(*tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def batch(rank, t, n=2):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(100 * rank + t)) + rank


# ---- pooling ---------------------------------------------------------------------------------


def pool(rank, world):
    model = model_of()
    norm, unseen = model[1], model[4]
    model[4].num_batches_tracked.zero_()
    for t in range(4):
        model[1](model[0](batch(rank, t)))
    if rank == 1:  # the other ranks' second layer sees nothing, as a mask head without a RoI
        unseen(model[3](torch.randn(2, 4, 6, 6) + 5.0))
    model[1].num_batches_tracked += rank
    before = numbers(norm.running_mean, norm.running_var, unseen.running_mean, unseen.running_var)
    addresses = [b.data_ptr() for b in model.buffers()]
    sync_running_stats(model)
    assert addresses == [b.data_ptr() for b in model.buffers()], "in place"
    after = numbers(norm.running_mean, norm.running_var, unseen.running_mean, unseen.running_var)
    return before, after, int(norm.num_batches_tracked)


@pytest.mark.parametrize("world", [2, 3])
def test_running_statistics_of_ranks_are_pooled(world, tmp_path):
    results = run_ranks(pool, world, tmp_path)
    mean = np.stack([before[0] for before, _, _ in results])
    var = np.stack([before[1] for before, _, _ in results])
    pooled = mean.mean(0), var.mean(0) + mean.var(0)
    assert mean.std(0).min() > 0.005
    for _, after, tracked in results:
        np.testing.assert_allclose(after[0], pooled[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after[1], pooled[1], rtol=1e-5)
        assert tracked in (4, 5, 6)
    # a rank that saw no data does not count, and gets the statistics of those that did
    for _, after, _ in results:
        np.testing.assert_allclose(after[2], results[1][0][2], rtol=1e-6)
        np.testing.assert_allclose(after[3], results[1][0][3], rtol=1e-6)
        assert abs(after[2]).max() > 0.01


def pool_batchnorms(rank, world):
    model = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(3)])
    model[1].eval()  # frozen
    for norm in model:
        norm.running_mean.fill_(float(rank))
        norm.running_var.fill_(2.0 + rank)
    if rank > 0:
        model[0](batch(rank, 0))
        model[2].num_batches_tracked += 1
    before = numbers(model[0].running_mean, model[0].running_var)
    sync_running_stats(model)
    return before, [numbers(norm.running_mean, norm.running_var) for norm in model]


def test_plain_batchnorms_are_pooled_too(tmp_path):
    """Else a checkpoint would be rank 0's, and an evaluation that of several models."""
    results = run_ranks(pool_batchnorms, 3, tmp_path)
    mean, var = (np.stack([before[i] for before, _ in results[1:]]) for i in (0, 1))
    for rank, (_, (seen, frozen, last)) in enumerate(results):
        np.testing.assert_allclose(seen[0], mean.mean(0), rtol=1e-5)
        np.testing.assert_allclose(seen[1], var.mean(0) + mean.var(0), rtol=1e-5)
        np.testing.assert_array_equal(frozen, [[rank] * 3, [2 + rank] * 3])
        np.testing.assert_allclose(last, [[1.5] * 3, [3.5 + 0.25] * 3], rtol=1e-6)


def pool_nothing(rank, world):
    model = model_of()
    model[1].running_mean.fill_(3.0)  # as loaded from a checkpoint that counts no batches
    sync_running_stats(model)
    sync_running_stats(nn.Linear(2, 2))
    return numbers(*[b for b in model.buffers() if b.dim()])


def test_pooling_before_any_data_changes_nothing(tmp_path):
    for buffers in run_ranks(pool_nothing, 2, tmp_path):
        assert [b.mean() for b in buffers] == [3, 1, 0, 1]


# ---- DistributedDataParallel -----------------------------------------------------------------


def ddp(rank, world, key):
    model = model_of(key)
    alone = model_of(key)  # the same, without DDP: this rank's data, all ranks' gradients
    parallel = DistributedDataParallel(model, broadcast_buffers=True)
    pair = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone)]
    for t in range(6):
        x = batch(rank, t, n=0 if rank == 1 and t in (2, 4) else 2)
        if key == "BRN":  # the only one that sees in training what is broadcast
            for buffer in alone.buffers():
                dist.broadcast(buffer, 0)
        a, b = parallel(x), alone(x)
        a.square().sum().div(100).backward()
        b.square().sum().div(100).backward()
        assert torch.equal(a, b), t  # memory is this rank's own, whatever is broadcast
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(q.grad)
            q.grad /= world
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
            q.grad.copy_(p.grad)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    if key == "MBN":  # its running statistics are the memory's
        for norm, own in ((model[1], alone[1]), (model[4], alone[4])):
            assert torch.equal(norm.running_mean, own.running_mean)
            assert torch.equal(norm.running_var, own.running_var)
    parallel(batch(rank, 9))  # commits
    memory = memory_state_dict(model)
    assert memory.keys() == ({"1", "4"} if key in ("CBN", "MBN", "BRN") else set())
    return numbers(model[0].weight), memory.get("1")


@every_norm
def test_ddp_that_broadcasts_buffers_leaves_memory_alone(key, tmp_path):
    """One rank gets empty input in two iterations: no hang, zero gradients from it."""
    (first, memory), (second, other) = run_ranks(ddp, 2, tmp_path, key)
    np.testing.assert_array_equal(first, second)  # the weights are the same
    if memory is None:
        return
    assert (memory["steps"], other["steps"]) == (6, 4)
    if key == "BRN":  # rank 0's statistics serve all ranks
        assert torch.equal(memory["kept"]["invstd"], other["kept"]["invstd"])
        assert torch.equal(memory["older"], other["older"])
    else:  # what is remembered is not the same
        own, theirs = (m["rows"][0] for m in (memory, other))
        assert abs(own - theirs).min() > 1e-4


def no_communication(rank, world, key):
    """Rank 1 runs far fewer forwards than rank 0; any collective in forward would hang."""
    model = model_of(key)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(8 if rank == 0 else 1):
        model(batch(rank, t)).square().mean().backward()
        optimizer.step()
    sync_running_stats(model)
    return numbers(model[1].running_mean)


@every_norm
def test_ranks_need_not_run_alike(key, tmp_path):
    first, second = run_ranks(no_communication, 2, tmp_path, key)
    np.testing.assert_array_equal(first[0], second[0])
