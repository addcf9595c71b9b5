"""Meta-Weight-Net, Co-teaching+ and AUM against their equations."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional

from data.dataset import DataSpec, load
from data.seeds import derive, generator
from data.table import Batch, TrainData
from methods.aum import AUM, AUMConfig, flagged, margin
from methods.base import Clock, Learner, Method
from methods.co_teaching import CoTeachingConfig, small_losses
from methods.co_teaching_plus import CoTeachingPlus, CoTeachingPlusConfig
from methods.mw_net import MetaWeightNet, MWNetConfig, Pair, WeightNet
from tests.loss_cases import few
from tests.mutation import Mutation
from tests.tiny import (
    BATCH,
    EPOCHS,
    K,
    N,
    differences,
    finish,
    make,
    net_state,
    nets_in_turn,
    plain,
    tiny_data,
    tiny_net,
    tiny_task,
    train,
    trusted_data,
    without_dropout,
)

PLAIN = {"augmentation": "none", "momentum": 0.0, "weight_decay": 0.0}


# Meta-Weight-Net


def mw_net(**values: Any) -> MetaWeightNet:
    """Without dropout, in training mode, with weights that depend on the loss."""
    method = make("mw-net", tiny_task(tiny_data(), without_dropout_for), **values)
    method.train()
    with torch.no_grad():
        for parameter in method.weight_net.parameters():
            parameter.mul_(3)
    return method


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners keep the precision of their network."""
    monkeypatch.setattr(Learner, "forward", lambda self, images: self.net(images))


def without_dropout_for(num_classes: int | None = None) -> nn.Module:
    return without_dropout()


def pair() -> Pair:
    trusted = trusted_data()
    return Pair(tiny_data().gather(torch.arange(BATCH)), trusted.gather(torch.arange(len(trusted))))


def sample_losses(net: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(net(plain(batch.images).to(next(net.parameters()))), batch.labels, reduction="none")


def agreements(net: nn.Module, weights: Tensor, batch: Pair, alpha: float, how: str) -> Tensor:
    """s_i = <grad L_i(w), grad Meta(w^)> for the given samples, [B], w^ being a copy of the network that was stepped."""
    parameters = list(net.parameters())
    losses = sample_losses(net, batch.given)
    stepped = copy.deepcopy(net)
    for there, gradient in zip(
        stepped.parameters(), torch.autograd.grad((weights * losses).sum(), parameters, retain_graph=True), strict=True
    ):
        there.data -= alpha * gradient
    direction = torch.autograd.grad(sample_losses(stepped, batch.trusted).mean(), list(stepped.parameters()))
    if how == "sample by sample":
        each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        return torch.stack([sum((g * d).sum() for g, d in zip(row, direction, strict=True)) for row in each])
    if how == "finite difference":
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(net)
            for there, along in zip(moved.parameters(), direction, strict=True):
                there.data += sign * step * along
            ends.append(sample_losses(moved, batch.given).detach())
        return (ends[0] - ends[1]) / (2 * step)
    state = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with forward_ad.dual_level():
        for (name, parameter), along in zip(net.named_parameters(), direction, strict=True):
            state[name] = forward_ad.make_dual(parameter.detach(), along)
        images = plain(batch.given.images).to(direction[0])
        duals = functional.cross_entropy(functional_call(net, state, (images,)), batch.given.labels, reduction="none")
        return forward_ad.unpack_dual(duals).tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, when forward mode is first used
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("how", ["sample by sample", "finite difference", "forward mode"])
@pytest.mark.usefixtures("in_float64")
def test_the_gradient_of_the_weights_in_closed_form(how: str, normalise: bool) -> None:
    """-alpha sum_i s_i dw_i / dTheta, with batch normalisation in training mode; w_i = v_i / n, or v_i / sum v."""
    alpha, batch = 0.3, pair()
    method = mw_net(normalise=normalise).double()
    net, theta = method.learner.net, list(method.weight_net.net.parameters())
    losses = sample_losses(net, batch.given)
    loss = method.clean_loss(losses, plain(batch.trusted.images).double(), batch.trusted.labels, alpha)
    found = torch.autograd.grad(loss, theta)
    v = method.weight_net(losses.detach())
    weights = v / v.sum() if normalise else v / BATCH
    s = agreements(net, weights.detach(), batch, alpha, how)
    expected = torch.autograd.grad(-alpha * (s * weights).sum(), theta)
    assert max(gradient.abs().max() for gradient in expected) > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.usefixtures("in_float64")
def test_in_float32_the_gradient_of_the_weights_is_that_of_float64() -> None:
    batch = pair()
    found = {}
    for method in (mw_net(), mw_net().double()):
        kind = next(method.parameters())
        images = plain(batch.trusted.images).to(kind)
        loss = method.clean_loss(sample_losses(method.learner.net, batch.given), images, batch.trusted.labels, 0.3)
        found[kind.dtype] = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(method.weight_net.net.parameters()))]
        )
    error = (found[torch.float32].double() - found[torch.float64]).norm() / found[torch.float64].norm()
    assert error < 1e-4


def test_without_a_virtual_step_the_weights_have_no_gradient() -> None:
    method, batch = mw_net(), pair()
    losses = sample_losses(method.learner.net, batch.given)
    loss = method.clean_loss(losses, plain(batch.trusted.images), batch.trusted.labels, 0.0)
    gradients = torch.autograd.grad(loss, list(method.weight_net.net.parameters()))
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_virtual_step_and_clean_pass_leave_the_network_as_it_is(dropout: float) -> None:
    """The running statistics after a step are those of one forward pass over the training batch."""
    method, batch = mw_net(**PLAIN), pair()
    method.learner.net.dropout.p = dropout
    twin = copy.deepcopy(method.learner.net)
    losses = sample_losses(method.learner.net, batch.given)
    before = copy.deepcopy(method.learner.state_dict())
    method.clean_loss(losses, plain(batch.trusted.images), batch.trusted.labels, 0.3).backward()
    assert differences(before, method.learner.state_dict()) == []
    fresh = mw_net(**PLAIN)
    fresh.step(batch, Clock(0, EPOCHS))
    twin.load_state_dict(mw_net().learner.net.state_dict())
    twin(plain(batch.given.images))
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, fresh.learner.net.get_buffer(name)), name


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.usefixtures("in_float64")
def test_three_steps_by_hand(normalise: bool) -> None:
    """A virtual step of a copied network, torch's Adam on the weights, plain SGD on the losses with the new weights."""
    lr, batch = 0.1, pair()
    method = mw_net(lr=lr, normalise=normalise, weight_lr=0.05, weight_net_decay=0.1, **PLAIN).double()
    method.task = copy.copy(method.task)
    object.__setattr__(method.task, "plain", lambda images: plain(images).double())
    net, weigh = copy.deepcopy(method.learner.net), copy.deepcopy(method.weight_net.net)
    adam = torch.optim.Adam(weigh.parameters(), lr=0.05, weight_decay=0.1)

    def weights(losses: Tensor) -> Tensor:
        v = weigh(losses.detach().unsqueeze(1)).squeeze(1)
        return v / v.sum() if normalise else v / BATCH

    for epoch in range(3):
        rate = lr * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        step = method.step(batch, Clock(epoch, EPOCHS))
        losses = sample_losses(net, batch.given)

        s = agreements(copy.deepcopy(net), weights(losses).detach(), batch, rate, "sample by sample")
        adam.zero_grad()
        (-rate * (s * weights(losses)).sum()).backward()
        adam.step()
        loss = (weights(losses).detach() * losses).sum()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        torch.testing.assert_close(step.loss, loss.detach())
        torch.testing.assert_close(step.scalars["weight/mean"], weigh(losses.detach().unsqueeze(1)).mean().detach())
        for there, gradient in zip(net.parameters(), gradients, strict=True):
            there.data -= rate * gradient
    torch.testing.assert_close(dict(method.learner.net.named_parameters()), dict(net.named_parameters()))
    torch.testing.assert_close(method.weight_net.net.state_dict(), weigh.state_dict())


@pytest.mark.parametrize(("scale", "decay"), [(1.0, 0.1), (1e-8, 0.0)])
def test_the_weighing_network_steps_as_torchs_adam_does(scale: float, decay: float) -> None:
    ours = WeightNet(MWNetConfig(weight_net_decay=decay)).double()
    theirs = copy.deepcopy(ours.net)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3, weight_decay=decay)
    for _ in range(4):
        losses = 5 * torch.rand(BATCH, dtype=torch.float64)
        ours.update(scale * ours(losses).sum())
        adam.zero_grad()
        (scale * theirs(losses.unsqueeze(1)).sum()).backward()
        adam.step()
    torch.testing.assert_close(ours.net.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-12)


def test_the_weight_of_a_loss_is_one_hidden_layer_and_a_sigmoid() -> None:
    net = WeightNet(MWNetConfig())
    first, second = net.net[0], net.net[2]
    assert first.weight.shape == (100, 1)
    losses = torch.tensor([0.0, 0.7, 30.0])
    hidden = (losses.unsqueeze(1) * first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(net(losses), 1 / (1 + (-(hidden @ second.weight[0] + second.bias)).exp()))


def test_published_defaults_of_meta_weight_net() -> None:
    config = MWNetConfig()
    assert (config.hidden, config.weight_lr, config.weight_net_decay, config.normalise) == (100, 1e-3, 1e-4, False)


def test_constant_weights_are_cross_entropy_times_a_constant() -> None:
    data, constant = tiny_data(), 0.25
    method = make("mw-net", tiny_task(data, without_dropout_for), weight_lr=0.0, augmentation="none")
    with torch.no_grad():
        method.weight_net.net[2].weight.zero_()
        method.weight_net.net[2].bias.fill_(math.log(constant / (1 - constant)))
    alone = Learner(copy.deepcopy(method.learner.net), method.config)
    for clock, step in train(method, data):
        batch = data.gather(step.index)
        loss = functional.cross_entropy(alone(plain(batch.images)), batch.labels)
        alone.update(constant * loss, method.learning_rate(clock))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(method.learner.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_where_the_clean_batch_is_the_training_batch_weights_rise() -> None:
    method = mw_net(lr=0.1, weight_lr=0.01, weight_net_decay=0.0, **PLAIN)
    batch = tiny_data().gather(torch.arange(BATCH))
    losses = sample_losses(copy.deepcopy(method.learner.net), batch).detach()
    s = agreements(
        copy.deepcopy(method.learner.net), method.weights(losses).detach(), Pair(batch, batch), 0.1, "sample by sample"
    )
    assert s.mean() > 0
    before = method.weight_net(losses).mean()
    method.step(Pair(batch, batch), Clock(0, EPOCHS))
    assert method.weight_net(losses).mean() > before


def test_normalised_weights_sum_to_one_and_vanish_together() -> None:
    method = mw_net(normalise=True)
    losses = torch.tensor([0.1, 2.0, 5.0])
    torch.testing.assert_close(method.weights(losses).sum(), torch.tensor(1.0))
    with torch.no_grad():
        method.weight_net.net[2].bias.fill_(-1e4)
    assert torch.equal(method.weights(losses), torch.zeros(3))


@pytest.mark.parametrize(("batch_size", "drawn"), [(5, 5), (8, 8), (20, 8)])
def test_a_clean_batch_has_no_row_twice_and_changes_from_step_to_step(batch_size: int, drawn: int) -> None:
    method = make("mw-net", tiny_task(tiny_data()), batch_size=batch_size)
    torch.manual_seed(0)
    rows = [batch.trusted.index for batch in method.batches(tiny_data(), Clock(0, EPOCHS))]
    assert all(len(index) == len(index.unique()) == drawn for index in rows)
    assert len({tuple(index.tolist()) for index in rows}) > 1
    assert torch.equal(torch.cat(rows).unique(), torch.arange(8))
    trusted = trusted_data()
    for batch in method.batches(tiny_data(), Clock(0, EPOCHS)):
        assert torch.equal(batch.trusted.images, trusted.images[batch.trusted.index])
        assert torch.equal(batch.trusted.labels, trusted.labels[batch.trusted.index])


def test_trusted_and_training_samples_are_disjoint() -> None:
    dataset = load(DataSpec(data="digits", noise="symmetric:0.4", trusted=50))
    assert dataset.trusted is not None
    assert len(dataset.trusted) == 50
    assert not set(dataset.split.trusted.tolist()) & set(dataset.split.train.tolist())


# Co-teaching+


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return without_dropout(), without_dropout()


def pair_method(name: str, *nets: nn.Module, **values: Any) -> Method[Any]:
    return make(name, tiny_task(tiny_data(), nets_in_turn(*nets)), **values)


def everywhere(self: CoTeachingPlus, first: Tensor, second: Tensor) -> Tensor:
    return torch.ones(len(first), dtype=torch.bool)


def test_before_it_begins_it_is_co_teaching_bit_for_bit(nets: tuple[nn.Module, nn.Module]) -> None:
    data = tiny_data()
    plus = pair_method("co-teaching-plus", *nets, warmup=0.5, lr=1e-3)  # so low that the two do not agree before it begins
    base = pair_method("co-teaching", *nets, lr=1e-3)
    for method in (plus, base):
        finish(method, data, 0, 3)
    assert differences(plus.state_dict(), base.state_dict()) == []
    for method in (plus, base):
        finish(method, data, 3, 4)
    assert differences(plus.state_dict(), base.state_dict()) != []


@pytest.mark.parametrize("forget_rate", [0.0, 0.2, 0.5])
def test_where_everything_counts_as_disagreement_it_is_co_teaching_bit_for_bit(
    nets: tuple[nn.Module, nn.Module], forget_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoTeachingPlus, "disagreement", everywhere)
    plus = pair_method("co-teaching-plus", *nets, warmup=0.0, forget_rate=forget_rate)
    base = pair_method("co-teaching", *nets, forget_rate=forget_rate)
    for method in (plus, base):
        finish(method, tiny_data())
    assert differences(plus.state_dict(), base.state_dict()) == []


def test_where_everything_is_disagreement_and_kept_it_is_two_cross_entropies(
    nets: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoTeachingPlus, "disagreement", everywhere)
    plus = pair_method("co-teaching-plus", *nets, warmup=0.0, forget_rate=0.0)
    finish(plus, tiny_data())
    for learner, net in zip((plus.first, plus.second), nets, strict=True):
        alone = pair_method("ce", net)
        finish(alone, tiny_data())
        assert differences(learner.state_dict(), net_state(alone)) == []


def test_identical_networks_never_disagree_and_fall_back_on_co_teaching(nets: tuple[nn.Module, nn.Module]) -> None:
    twins = [pair_method(name, nets[0], nets[0], forget_rate=0.5) for name in ("co-teaching-plus", "co-teaching")]
    for method in twins:
        finish(method, tiny_data())
    assert differences(twins[0].first.state_dict(), twins[0].second.state_dict()) == []
    assert differences(twins[0].state_dict(), twins[1].state_dict()) == []


def test_each_network_learns_from_what_the_other_kept_of_the_disagreement(nets: tuple[nn.Module, nn.Module]) -> None:
    """One step by hand: plain SGD on the mean loss of the peer's selection among the samples that the two see differently."""
    lr, clock = 0.1, Clock(EPOCHS - 1, EPOCHS)
    batch = tiny_data().gather(torch.arange(20))
    method = pair_method("co-teaching-plus", *nets, forget_rate=0.5, lr=lr, **PLAIN)
    method.train()
    method.step(batch, clock)
    copies = [copy.deepcopy(net).train() for net in nets]
    logits = [net(plain(batch.images)) for net in copies]
    losses = [functional.cross_entropy(z, batch.labels, reduction="none") for z in logits]
    differ = (logits[0].argmax(1) != logits[1].argmax(1)).nonzero().flatten()
    assert 4 <= len(differ) < 20
    kept = [differ[loss.detach()[differ].argsort()[: len(differ) // 2]] for loss in losses]
    assert set(kept[0].tolist()) != set(kept[1].tolist()), "crossing matters"
    rate = lr * 0.5 * (1 + math.cos(math.pi * clock.fraction))
    for net, loss, chosen, learner in zip(copies, losses, kept[::-1], (method.first, method.second), strict=True):
        loss[chosen].mean().backward()
        for before, after in zip(net.parameters(), learner.net.parameters(), strict=True):
            torch.testing.assert_close(after, before - rate * before.grad)


@pytest.mark.parametrize(
    ("num_different", "forget_rate", "candidates", "kept"),
    [
        (10, 0.8, 10, 2),
        (10, 0.7, 10, 3),
        (3, 0.5, 3, 1),
        (1, 0.0, 1, 1),
        (20, 0.9, 20, 2),
        (1, 0.5, 20, 10),
        (0, 0.2, 20, 16),
        (4, 0.8, 20, 4),
    ],
)
def test_how_many_are_kept_and_when_it_falls_back(num_different: int, forget_rate: float, candidates: int, kept: int) -> None:
    method = CoTeachingPlus(CoTeachingPlusConfig(forget_rate=forget_rate), tiny_task(tiny_data()))
    first = functional.one_hot(torch.zeros(20, dtype=torch.int64), K).float()
    second = first.clone()
    second[:num_different] = second[:num_different].roll(1, dims=1)
    mask, num_kept = method.candidates(first, second, Clock(199, 200))
    assert mask is not None
    assert int(mask.sum()) == candidates
    assert int(num_kept) == kept
    assert bool(mask[:num_different].all())


@few
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 9.0]), st.booleans()), min_size=1, max_size=20), st.data())
def test_kept_losses_are_the_smallest_of_the_candidates(rows: list[tuple[float, bool]], data: st.DataObject) -> None:
    losses, candidates = torch.tensor([loss for loss, _ in rows]), torch.tensor([among for _, among in rows])
    num_kept = data.draw(st.integers(0, int(candidates.sum())))
    mask = small_losses(losses, torch.tensor(num_kept), candidates) == 1
    assert mask.sum() == num_kept
    assert not bool((mask & ~candidates).any())
    dropped = losses[candidates & ~mask]
    assert not num_kept or not len(dropped) or losses[mask].max() <= dropped.min()


def test_published_defaults_of_co_teaching_plus() -> None:
    config = CoTeachingPlusConfig()
    assert config.begins() * 200 == 20
    assert config.ramp == CoTeachingConfig().ramp


# AUM


def aum(**values: Any) -> AUM:
    return make("aum", tiny_task(tiny_data()), **values)


def start_of(probe: int, epochs: int = EPOCHS) -> int:
    """With the default length of a probe, a quarter."""
    return (0, 2, 3)[probe] if epochs == EPOCHS else probe * epochs // 4


def test_margins_worked_out_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0], [1.0, 1.0, 0.0]])
    labels = torch.tensor([1, 0, 0])
    assert margin(logits, labels).tolist() == [-1.0, 1.0, 0.0]
    torch.testing.assert_close(margin(logits + 7, labels), margin(logits, labels))
    torch.testing.assert_close(margin(3 * logits, labels), 3 * margin(logits, labels))


def test_the_area_is_the_mean_of_the_margins_of_the_training_steps() -> None:
    """Of every epoch of a probe, the first one included, with the label of that probe."""
    data, method = tiny_data(), aum()
    kept: dict[int, list[list[float]]] = {probe: [[] for _ in range(N)] for probe in (0, 1)}
    seen: list[Tensor] = []
    for learner in method.probes:
        learner.net.register_forward_hook(lambda _module, _images, logits: seen.append(logits.detach()))
    for clock, step in train(method, data, 0, 3):
        probe = int(clock.epoch >= 2)
        (logits,) = seen
        seen.clear()
        assert logits.shape[1] == K + 1
        for row, z in zip(step.index.tolist(), logits.tolist(), strict=True):
            label = K if method.threshold[row] == probe else int(data.labels[row])
            kept[probe][row].append(z[label] - max(z[:label] + z[label + 1 :]))
    for probe, visits in ((0, 2), (1, 1)):
        expected = torch.tensor([sum(margins) / len(margins) for margins in kept[probe]])
        assert method.visits[:, probe].tolist() == [visits] * N
        torch.testing.assert_close(method.margins[:, probe] / visits, expected)
    before = method.margins.clone()
    finish(method, data, 3, 4)
    assert torch.equal(method.margins, before), "the final run records nothing"


def test_threshold_sets_are_disjoint_and_as_large_as_a_class() -> None:
    method = aum()
    sizes = [int((method.threshold == probe).sum()) for probe in range(3)]
    assert sizes == [8, 8, 25]  # floor(41 / 5)
    others = make("aum", tiny_task(tiny_data()), seed=1)
    assert not torch.equal(method.threshold, others.threshold)


@few
@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=30),
    st.lists(st.integers(-5, 5), min_size=1, max_size=30),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_the_flag_rule_is_its_definition(areas: list[int], of_threshold: list[int], percentile: float) -> None:
    found = flagged(torch.tensor(areas).float(), torch.tensor(of_threshold).float(), percentile).tolist()
    hundredths = round(100 * (1 - percentile))
    assert found == [100 * sum(other > area for other in of_threshold) > hundredths * len(of_threshold) for area in areas]
    from_the_top = sorted(of_threshold, reverse=True)[hundredths * len(of_threshold) // 100]
    assert found == [area < from_the_top for area in areas]


def test_about_ninety_nine_in_a_hundred_threshold_samples_are_flagged_themselves() -> None:
    areas = torch.randn(1000, generator=generator("areas"))
    assert int(flagged(areas, areas, 0.99).sum()) == 989
    assert int(flagged(areas, areas, 0.9).sum()) == 899


def test_a_sample_goes_if_each_probe_that_judged_it_flags_it() -> None:
    method = aum()
    method.threshold[:] = torch.tensor([2] * 5 + [0] * 10 + [1] * 10 + [2] * 16)
    areas = torch.full((N, 2), 5.0)
    areas[5:15, 0] = areas[15:25, 1] = torch.arange(10.0) / 10  # the threshold samples' areas: 0 to 0.9
    low, high = -1.0, 5.0
    areas[0], areas[1], areas[2], areas[3] = (torch.tensor(row) for row in ([low, low], [low, high], [high, low], [high, high]))
    areas[5, 1] = areas[15, 0] = low  # threshold samples of one probe, judged by the other alone
    method.visits[:] = 2
    method.visits[4] = 0  # never visited
    method.visits[25, 0] = 0
    areas[25, 1] = low
    method.margins[:] = areas * method.visits
    assert (~method.kept()).nonzero().flatten().tolist() == [0, 5, 15, 25]


def test_where_hardly_any_sample_would_be_left_all_stay() -> None:
    method = aum()
    method.visits[:] = 1
    for num_left in (0, 1, 2, 3):
        method.margins[:] = -1.0
        for probe in (0, 1):
            method.margins[method.threshold == probe, probe] = 1.0
        left = (method.threshold == 2).nonzero().flatten()[:num_left]
        method.margins[left] = 2.0
        assert int(method.kept().sum()) == (num_left if num_left >= 2 else N)


def test_removed_samples_are_in_no_batch_of_the_final_run() -> None:
    data, method = tiny_data(), aum()
    finish(method, data, 0, 3)
    method.visits[:] = 1
    method.margins[:] = 5.0
    for probe in (0, 1):
        method.margins[method.threshold == probe, probe] = 0.0
    gone = (method.threshold == 2).nonzero().flatten()[:5]
    method.margins[gone] = -1.0
    steps = finish(method, data, 3, 4)
    seen = torch.cat([step.index for _, step in steps])
    assert sorted(seen.tolist() + gone.tolist()) == list(range(N))
    for _, step in steps:
        assert step.scalars["select/kept"].item() == pytest.approx((N - 5) / N)


def test_a_final_run_without_flags_is_cross_entropy_bit_for_bit() -> None:
    """Its own half cosine, its own network: the same as a run of cross-entropy with the final run's length for a budget."""
    data = tiny_data()
    ours, ce = aum(), make("ce", tiny_task(data))
    for epoch in range(3):
        for method, clock in ((ours, Clock(3 + epoch, EPOCHS)), (ce, Clock(epoch, 3))):
            torch.manual_seed(derive("epoch", 0, epoch))
            method.train()
            for batch in method.batches(data, clock):
                method.step(batch, clock)
    assert differences(ours.final.state_dict(), net_state(ce)) == []


def test_the_learning_rate_is_constant_in_the_probes_and_falls_in_the_final_run() -> None:
    method = aum(lr=0.1)
    rates = {epoch: method.learning_rate(Clock(epoch, 600)) for epoch in (0, 149, 150, 299, 300, 400, 450, 599)}
    expected = {0: 0.1, 149: 0.1, 150: 0.1, 299: 0.1, 300: 0.1, 400: 0.075, 450: 0.05}
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected)
    assert 0 < rates[599] < 1e-5


def test_published_defaults_of_aum() -> None:
    """Probes of 150 epochs, a final run of 300, the 99th percentile."""
    method = aum()
    phases = [method.phase_at(Clock(epoch, 600)) for epoch in (0, 149, 150, 299, 300, 599)]
    assert phases == [0, 0, 1, 1, 2, 2]
    assert AUMConfig().begins() * 600 == 300
    assert AUMConfig().percentile == 0.99


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_step_is_cross_entropy_with_the_labels_of_its_phase(phase: int) -> None:
    """One step by hand: threshold samples of this probe, and of this one alone, have label K; the final run has none."""
    clock = Clock(start_of(phase), EPOCHS)
    method = make("aum", tiny_task(tiny_data(), no_dropout), label_smoothing=0.1, **PLAIN)
    batch = tiny_data().gather(torch.arange(N))
    net = copy.deepcopy(method.learner(phase).net)
    others = copy.deepcopy([method.learner(other).state_dict() for other in range(3) if other != phase])
    method.train()
    step = method.step(batch, clock)
    labels = torch.where((method.threshold == phase) & torch.tensor(phase < 2), K, batch.labels)
    logits = net(plain(batch.images))
    loss = functional.cross_entropy(logits, labels, label_smoothing=0.1 if phase == 2 else 0.0)
    torch.testing.assert_close(step.loss, loss.detach())
    torch.testing.assert_close(step.probabilities, logits[:, :K].softmax(1).detach())
    loss.backward()
    for before, after in zip(net.parameters(), method.learner(phase).net.parameters(), strict=True):
        torch.testing.assert_close(after, before - method.learning_rate(clock) * before.grad)
    assert differences(others, [method.learner(other).state_dict() for other in range(3) if other != phase]) == []


def no_dropout(num_classes: int | None = None) -> nn.Module:
    net = tiny_net(num_classes)
    net.dropout.p = 0.0
    return net


def test_predictions_are_of_the_network_that_was_trained_last_over_the_real_classes() -> None:
    data, method = tiny_data(), aum()
    for epoch, phase in ((0, 0), (1, 0), (2, 1), (3, 2), (5, 2)):
        finish(method, data, epoch, epoch + 1)
        method.eval()
        logits = method.learner(phase).net(plain(data.images))[:, :K]
        torch.testing.assert_close(method.predict(data.images), logits.softmax(1))


def test_wrong_labels_are_removed_and_right_ones_stay() -> None:
    stream = generator("many")
    truth = torch.randint(K, (600,), generator=stream)
    prototypes = torch.randint(40, 216, (K, 1, 8, 8), generator=stream)
    images = (prototypes[truth] + torch.randint(-40, 40, (600, 1, 8, 8), generator=stream)).to(torch.uint8)
    wrong = torch.rand(600, generator=stream) < 0.2
    labels = torch.where(wrong, (truth + torch.randint(1, K, (600,), generator=stream)) % K, truth)
    data = TrainData(images, labels)
    method = make("aum", tiny_task(data), batch_size=32)
    for epoch in range(10):
        torch.manual_seed(epoch)
        for batch in method.batches(data, Clock(epoch, 20)):
            method.step(batch, Clock(epoch, 20))
    keep = method.kept()
    assert (~keep)[wrong].float().mean() > 0.9
    assert keep[~wrong].float().mean() > 0.9


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_selection.py::"
BY_HAND = HERE + "test_three_steps_by_hand[False]"
ADAM = HERE + "test_the_weighing_network_steps_as_torchs_adam_does"
PLUS_KEPT = HERE + "test_how_many_are_kept_and_when_it_falls_back"
AREA = HERE + "test_the_area_is_the_mean_of_the_margins_of_the_training_steps"
SETS = HERE + "test_threshold_sets_are_disjoint_and_as_large_as_a_class"
FLAGS = HERE + "test_about_ninety_nine_in_a_hundred_threshold_samples_are_flagged_themselves"
HARDLY_ANY = HERE + "test_where_hardly_any_sample_would_be_left_all_stay"
PHASE_STEP = HERE + "test_a_step_is_cross_entropy_with_the_labels_of_its_phase[0]"

MUTATIONS = [
    Mutation("methods/mw_net.py", "beta1=0.9,", "beta1=0.99,", ADAM + "[1.0-0.1]"),
    Mutation("methods/mw_net.py", "beta2=0.999,", "beta2=0.9,", ADAM + "[1.0-0.1]"),
    Mutation("methods/mw_net.py", "eps=1e-8,", "eps=1.1e-8,", ADAM + "[1e-08-0.0]"),
    Mutation("methods/mw_net.py", "weights / len(weights)", "weights / (1.1 * len(weights))", BY_HAND),
    Mutation("methods/mw_net.py", "detach() - rate * gradient", "detach() - 1.1 * rate * gradient", BY_HAND),
    Mutation("methods/mw_net.py", "loss = (weights * losses).sum()", "loss = 1.1 * (weights * losses).sum()", BY_HAND),
    Mutation("methods/co_teaching_plus.py", "(1 - self.forgotten", "(1.1 - self.forgotten", PLUS_KEPT + "[10-0.8-10-2]"),
    Mutation("methods/co_teaching_plus.py", "num_kept < 1", "num_kept < 1.1", PLUS_KEPT + "[3-0.5-3-1]"),
    Mutation("methods/aum.py", "PROBES = 2", "PROBES = 3", SETS),
    Mutation("methods/aum.py", "N // (task.num_classes + 1)", "N // (task.num_classes + 1.1)", SETS),
    Mutation("methods/aum.py", "make_net(task.num_classes + 1)", "make_net(task.num_classes + 2)", AREA),
    Mutation("methods/aum.py", "phase] += 1\n", "phase] += 1.1\n", AREA),
    Mutation("methods/aum.py", "phase] += margin", "phase] += 1.1 * margin", AREA),
    Mutation("methods/aum.py", ">= 2 else", ">= 3 else", HARDLY_ANY),
    Mutation("methods/aum.py", "round((1 - percentile)", "round((1.1 - percentile)", FLAGS),
    Mutation(
        "methods/aum.py",
        "loss = cross_entropy(logits, labels).mean()",
        "loss = 1.1 * cross_entropy(logits, labels).mean()",
        PHASE_STEP,
    ),
]
