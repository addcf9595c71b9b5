"""DivideMix against its own equations: the division, the schedule, one update worked out by hand, and its limits."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from data.seeds import derive, generator
from data.table import Batch, TrainData
from methods import dividemix
from methods.base import Clock, SingleNet, first_epoch
from methods.dividemix import DivideMix, DivideMixConfig, Portion, believed, cycled, refined, sharpened
from methods.parts.mixture import min_max
from models.network import Network
from tests.loss_cases import few
from tests.mutation import Mutation
from tests.tiny import (
    BATCH,
    EPOCHS,
    InOrder,
    K,
    N,
    assert_finite,
    differences,
    finish,
    make,
    plain,
    tiny_data,
    tiny_net,
    tiny_task,
    weak,
)

LAST = Clock(EPOCHS - 1, EPOCHS)


def one_hot(labels: Tensor) -> Tensor:
    return functional.one_hot(labels, K).float()


def without_dropout() -> Network:
    net = tiny_net()
    net.dropout.p = 0.0
    return net


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return without_dropout(), without_dropout()


def nets_in_turn(*nets: nn.Module) -> Any:
    """A ``make_net`` that hands out copies of ``nets`` in turn."""
    turns = iter([copy.deepcopy(net) for net in nets])
    return lambda num_classes=None: next(turns)


def divide_mix(*nets: nn.Module, data: TrainData | None = None, **values: Any) -> DivideMix:
    make_net = nets_in_turn(*nets) if nets else tiny_net
    method = make("dividemix", tiny_task(data or tiny_data(), make_net), **values)
    assert isinstance(method, DivideMix)
    return method


def rows(*index: int) -> Batch:
    return tiny_data().gather(torch.tensor(index))


def portion(number: int = 0, ramp: float = 0.5) -> Portion:
    clean = torch.rand(4, generator=generator("clean")) * 0.5 + 0.5
    return Portion(number, rows(0, 1, 2, 3), clean, rows(10, 11, 12), ramp, torch.tensor(0.6))


# Defaults and schedules


def test_the_published_defaults() -> None:
    config = DivideMixConfig()
    assert first_epoch(config.begins(), 300) == 30
    assert config.begins() * 300 == pytest.approx(30)
    assert config.ramp * 300 == pytest.approx(16, abs=0.02)
    assert (config.threshold, config.temperature, config.mixing) == (0.5, 0.5, 4)
    assert (config.unlabelled_weight, config.balance_weight) == (25, 1)
    assert (config.averaged, config.warmup_entropy) == (1, 0)


def test_the_ramp_rises_over_sixteen_epochs_after_the_warm_up() -> None:
    method = divide_mix()
    found = [method.ramp(Clock(epoch, 300), part) for epoch, part in ((30, 0), (30, 0.5), (38, 0), (46, 0), (299, 0.9))]
    assert found == pytest.approx([0, 0.5 / 16, 0.5, 1, 1], abs=1e-3)
    assert found[0] == 0
    assert found[3:] == [1, 1]
    assert method.ramp(Clock(29, 300), 0.9) == 0


def test_the_ramp_moves_with_every_step(pair: tuple[nn.Module, nn.Module]) -> None:
    """Within an epoch as iteration / (|X| // batch + 1)."""
    method = divide_mix(*pair, warmup=0.5, ramp=0.5)
    clean, kept = torch.rand(N), torch.arange(N) < 20
    for epoch in (3, 4):
        found = [p.ramp for p in method.portions(tiny_data(), Clock(epoch, EPOCHS), 0, clean, kept)]
        since = epoch - 3
        assert found == pytest.approx([(since + step / 3) / 3 for step in range(3)])


def test_the_first_step_after_the_warm_up_has_no_unlabelled_term() -> None:
    losses = []
    for weight in (0.0, 150.0):
        method = divide_mix(unlabelled_weight=weight)
        torch.manual_seed(0)
        steps = [method.step(p, Clock(1, EPOCHS)).loss.item() for p in method.batches(tiny_data(), Clock(1, EPOCHS))]
        losses.append(steps)
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


# The warm-up


def net_state(method: Any) -> dict[str, Any]:
    assert isinstance(method, SingleNet)
    return method.learner.state_dict()


def test_each_network_is_warmed_up_with_cross_entropy(pair: tuple[nn.Module, nn.Module]) -> None:
    """The first as CE alone would be, bit for bit; the second in its own order."""
    data = tiny_data()
    both, alone = divide_mix(*pair, warmup=0.5), make("ce", tiny_task(data, nets_in_turn(pair[0])))
    finish(both, data, 0, 3)
    finish(alone, data, 0, 3)
    assert differences(both.first.state_dict(), net_state(alone)) == []
    assert torch.equal(both.refined_labels(), one_hot(data.labels))
    parts = InOrder.of(data, [torch.arange(BATCH)])
    both, alone = (
        divide_mix(*pair[::-1], augmentation="none"),
        make("ce", tiny_task(data, nets_in_turn(pair[0])), augmentation="none"),
    )
    finish(both, parts, 0, 1)
    finish(alone, parts, 0, 1)
    assert differences(both.second.state_dict(), net_state(alone)) == []


def test_the_warm_up_can_reward_entropy(pair: tuple[nn.Module, nn.Module]) -> None:
    batch = rows(*range(BATCH))
    method = divide_mix(*pair, augmentation="none", warmup_entropy=0.7)
    step = method.step(Portion(1, batch), Clock(0, EPOCHS))
    logits = copy.deepcopy(pair[1]).train()(plain(batch.images))
    p = logits.softmax(1)
    expected = (functional.cross_entropy(logits, batch.labels) + 0.7 * (p * p.log()).sum(1).mean()).detach()
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.probabilities, p.detach())


# The division


def test_the_division_is_scikit_learns_on_scaled_losses(pair: tuple[nn.Module, nn.Module]) -> None:
    from sklearn.mixture import GaussianMixture as ScikitMixture

    data = tiny_data()
    method = divide_mix(*pair, warmup=0.5)
    finish(method, data, 0, 3)
    clean, kept = method.divide(data, Clock(3, EPOCHS))
    assert bool(((clean >= 0) & (clean <= 1)).all())
    beliefs = []
    for number, learner in enumerate(method.networks):
        logits = copy.deepcopy(learner.net).eval()(plain(data.images)).detach()
        losses = functional.cross_entropy(logits, data.labels, reduction="none").double().numpy()
        scaled = ((losses - losses.min()) / (losses.max() - losses.min()))[:, None]
        theirs = ScikitMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0, n_init=3).fit(scaled)
        expected = torch.from_numpy(theirs.predict_proba(scaled)[:, theirs.means_.argmin()]).float()
        torch.testing.assert_close(clean[:, number], expected, atol=1e-2, rtol=0)
        assert torch.equal(kept[:, number], clean[:, number] > 0.5)
        beliefs.append(clean[:, [number]] * one_hot(data.labels) + (1 - clean[:, [number]]) * logits.softmax(1))
    torch.testing.assert_close(method.refined_labels(), (beliefs[0] + beliefs[1]) / 2)
    assert not torch.equal(clean[:, 0], clean[:, 1])


def test_each_network_gets_the_others_division(monkeypatch: pytest.MonkeyPatch) -> None:
    """X and U are a partition, X is seen once, and the probabilities are those of the network that made the division."""
    clean = torch.rand(N, 2, generator=generator("division"))
    kept = clean > 0.4
    monkeypatch.setattr(DivideMix, "divide", lambda self, data, clock: (clean, kept))
    method = divide_mix()
    portions = list(method.batches(tiny_data(), LAST))
    assert [p.number for p in portions] == sorted(p.number for p in portions)
    for number in range(2):
        own = [p for p in portions if p.number == number]
        labelled = torch.cat([p.labelled.index for p in own])
        unlabelled = torch.cat([p.unlabelled.index for p in own if p.unlabelled is not None])
        assert labelled.sort().values.tolist() == kept[:, 1 - number].nonzero().flatten().tolist()
        assert not bool(kept[unlabelled, 1 - number].any())
        for p in own:
            assert p.clean is not None
            assert torch.equal(p.clean, clean[p.labelled.index, 1 - number])
            assert p.kept == kept[:, 1 - number].float().mean()
        assert own[0].unlabelled is not None
        assert len(own[0].unlabelled.index) == BATCH


def test_both_divisions_are_made_before_any_update(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = dividemix.pass_over_training_set

    def counted(*arguments: Any) -> Any:
        passes.append(0)
        return original(*arguments)

    monkeypatch.setattr(dividemix, "pass_over_training_set", counted)
    method = divide_mix()
    batches = iter(method.batches(tiny_data(), LAST))
    next(batches)
    assert len(passes) == 2
    assert len(list(batches)) > 1
    assert len(passes) == 2


def test_losses_can_be_averaged_over_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the last three scaled losses of each network, of those that there are at the start."""
    fitted: list[Tensor] = []
    original = dividemix.GaussianMixture.fit

    def recorded(values: Tensor) -> Any:
        fitted.append(values)
        return original(values)

    monkeypatch.setattr(dividemix.GaussianMixture, "fit", recorded)
    data = tiny_data()
    method = divide_mix(warmup=1 / EPOCHS, averaged=3)
    scaled: list[list[Tensor]] = [[], []]
    for epoch in range(1, EPOCHS):
        for number, learner in enumerate(method.networks):
            logits = copy.deepcopy(learner.net).eval()(plain(data.images)).detach()
            scaled[number].append(min_max(functional.cross_entropy(logits, data.labels, reduction="none")))
        finish(method, data, epoch, epoch + 1)
        for number in range(2):
            expected = torch.stack(scaled[number][-3:]).mean(0)
            found = fitted[2 * (epoch - 1) + number].double()
            torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-4, atol=1e-5)


def test_too_few_believed_labels_are_replaced_by_the_tenth_of_smallest_loss() -> None:
    losses = torch.linspace(1, 0, 40)
    clean = torch.zeros(40)
    tenth = [36, 37, 38, 39]
    assert believed(clean, losses, 0.5, 8).nonzero().flatten().tolist() == tenth
    clean[:3] = 0.9
    assert believed(clean, losses, 0.5, 8).nonzero().flatten().tolist() == tenth, "three are fewer than a tenth"
    clean[:4] = 0.9
    assert believed(clean, losses, 0.5, 8).nonzero().flatten().tolist() == [0, 1, 2, 3]
    clean[3] = 0.0
    assert believed(clean, losses, 0.5, 3).nonzero().flatten().tolist() == [0, 1, 2], "but a batch is enough"
    assert believed(torch.full((40,), 0.5), torch.zeros(40), 0.5, 8).all(), "equal losses stay together"
    clean = torch.full((40,), 0.5)
    clean[7:17] = 0.51
    assert believed(clean, losses, 0.5, 8).nonzero().flatten().tolist() == list(range(7, 17)), "the threshold is strict"


def test_unlabelled_batches_go_round_and_none_come_from_nothing() -> None:
    data, keep = tiny_data(), torch.arange(N) < 5
    torch.manual_seed(0)
    batches = cycled(data, 3, keep)
    seen = [next(batches).index.tolist() for _ in range(6)]
    for turn in range(3):
        assert sorted(seen[2 * turn] + seen[2 * turn + 1]) == [0, 1, 2, 3, 4]
    assert len({str(seen[2 * turn] + seen[2 * turn + 1]) for turn in range(3)}) > 1, "in a new order each time"
    assert list(cycled(data, 3, torch.zeros(N, dtype=torch.bool))) == []


# Targets


@few
@given(st.integers(0, 2**32), st.floats(0.05, 1.0))
def test_sharpening_is_its_formula(seed: int, temperature: float) -> None:
    stream = torch.Generator().manual_seed(seed)
    targets = torch.randn(5, K, generator=stream, dtype=torch.float64).softmax(1)
    powers = targets ** (1 / temperature)
    torch.testing.assert_close(sharpened(targets, temperature), powers / powers.sum(1, keepdim=True))
    torch.testing.assert_close(sharpened(targets, 1.0), targets)
    torch.testing.assert_close(sharpened(targets, 1e-6), functional.one_hot(targets.argmax(1), K).double())


def test_sharpening_keeps_zeros_and_certainty() -> None:
    targets = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.25, 0.75]])
    torch.testing.assert_close(sharpened(targets, 0.5), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.1, 0.9]]))


def test_a_refined_label_is_part_given_part_predicted() -> None:
    found = refined(torch.tensor([2, 0]), torch.tensor([0.25, 1.0]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.375, 0.375, 0.25], [1.0, 0.0, 0.0]]))


# One update


PLAIN_SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize("number", [0, 1])
def test_one_update_by_hand(number: int, pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dividemix, "mixing_weight", lambda alpha: 0.3 if alpha == 6.0 else 1.0)
    batch = portion(number)
    assert batch.clean is not None
    assert batch.unlabelled is not None
    values: dict[str, Any] = {"mixing": 6.0, "temperature": 0.4, "unlabelled_weight": 8.0, "balance_weight": 0.9}
    method = divide_mix(*pair, **values, **PLAIN_SGD)
    untouched = copy.deepcopy(method.networks[1 - number].state_dict())
    own, peer = (copy.deepcopy(net) for net in (pair[number], pair[1 - number]))
    torch.manual_seed(5)
    step = method.train().step(batch, LAST)

    torch.manual_seed(5)
    own.train()
    peer.eval()
    views = [weak(batch.labelled.images), weak(batch.labelled.images), *[weak(batch.unlabelled.images) for _ in range(2)]]
    partners = torch.randperm(14)
    with torch.no_grad():
        mine = own(torch.cat(views[:2])).softmax(1)
        own_guess, peer_guess = own(torch.cat(views[2:])).softmax(1), peer(torch.cat(views[2:])).softmax(1)
    w = batch.clean[:, None]
    labelled = (w * one_hot(batch.labelled.labels) + (1 - w) * (mine[:4] + mine[4:]) / 2) ** 2.5
    guessed = ((own_guess[:3] + own_guess[3:] + peer_guess[:3] + peer_guess[3:]) / 4) ** 2.5
    labelled, guessed = labelled / labelled.sum(1, keepdim=True), guessed / guessed.sum(1, keepdim=True)
    images, targets = torch.cat(views), torch.cat([labelled, labelled, guessed, guessed])
    images, targets = 0.7 * images + 0.3 * images[partners], 0.7 * targets + 0.3 * targets[partners]
    logits = own(images)
    p = logits.softmax(1)
    on_labelled = -(targets[:8] * p[:8].log()).sum(1).mean()
    on_unlabelled = ((p[8:] - targets[8:]) ** 2).mean()
    penalty = (1 / K * ((1 / K) / p.mean(0)).log()).sum()
    loss = on_labelled + 8.0 * 0.5 * on_unlabelled + 0.9 * penalty
    torch.testing.assert_close(step.loss, loss.detach())
    assert step.index.tolist() == [0, 1, 2, 3, 10, 11, 12]
    assert step.scalars == {"select/kept": batch.kept}
    loss.backward()
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi * LAST.fraction))
    for before, after in zip(own.parameters(), method.networks[number].net.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - rate * before.grad)
    assert differences(untouched, method.networks[1 - number].state_dict()) == [], "the peer is not trained"


def test_all_labelled_certain_unsharpened_and_unmixed_is_cross_entropy_of_two_views(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dividemix, "mixing_weight", lambda alpha: 0.0)  # the larger share is the image's own
    batch = rows(*range(BATCH))
    method = divide_mix(*pair, temperature=1.0, balance_weight=0.0)
    torch.manual_seed(5)
    step = method.step(Portion(0, batch, torch.ones(BATCH), kept=torch.tensor(1.0)), LAST)
    torch.manual_seed(5)
    logits = copy.deepcopy(pair[0]).train()(torch.cat([weak(batch.images), weak(batch.images)]))
    expected = functional.cross_entropy(logits, torch.cat([batch.labels, batch.labels])).detach()
    torch.testing.assert_close(step.loss, expected)


def test_swapping_the_networks_swaps_everything(pair: tuple[nn.Module, nn.Module]) -> None:
    one, other = divide_mix(*pair), divide_mix(*pair[::-1])
    data = InOrder.of(tiny_data(), list(torch.arange(N).split(BATCH)))
    (clean, kept), (clean_swapped, kept_swapped) = one.divide(data, LAST), other.divide(data, LAST)
    assert torch.equal(clean, clean_swapped.flip(1))
    assert torch.equal(kept, kept_swapped.flip(1))
    assert torch.equal(one.refined_labels(), other.refined_labels())
    for number in (0, 1, 0):
        losses = []
        for method, trained in ((one, number), (other, 1 - number)):
            torch.manual_seed(derive("swap", number))
            losses.append(method.step(portion(trained), LAST).loss)
        assert torch.equal(*losses)
    assert differences(one.first.state_dict(), other.second.state_dict()) == []
    assert differences(one.second.state_dict(), other.first.state_dict()) == []
    assert differences(one.first.state_dict(), one.second.state_dict()) != []


def test_the_sum_of_both_networks_logits_predicts(pair: tuple[nn.Module, nn.Module]) -> None:
    images = tiny_data().images
    logits = [copy.deepcopy(net).eval()(plain(images)) for net in pair]
    torch.testing.assert_close(divide_mix(*pair).eval().predict(images), (logits[0] + logits[1]).softmax(1))


# Awkward divisions


@pytest.mark.parametrize("threshold", [0.0, 0.9999])
def test_an_empty_part_is_done_without(threshold: float) -> None:
    """At 0 nearly everything is labelled; near 1 hardly anything, so that the tenth of smallest losses is."""
    data = tiny_data()
    method = divide_mix(threshold=threshold, averaged=5)
    steps = finish(method, data)
    assert_finite(method, steps)
    last = {round(step.scalars["select/kept"].item() * N) for clock, step in steps if clock.epoch == EPOCHS - 1}
    assert min(last) > N / 2 if threshold == 0 else min(last) >= N / 10


@pytest.mark.parametrize("num_unlabelled", [0, 1])
def test_none_or_one_unlabelled_sample(num_unlabelled: int) -> None:
    method = divide_mix()
    kept = torch.arange(N) >= num_unlabelled
    portions = list(method.portions(tiny_data(), LAST, 0, torch.ones(N), kept))
    assert len(portions) == -(-(N - num_unlabelled) // BATCH) - (1 if num_unlabelled == 0 else 0)
    for p in portions:
        assert (p.unlabelled is None) == (num_unlabelled == 0)
        assert method.step(p, LAST).loss.isfinite()


def test_wrong_labels_are_found_and_replaced() -> None:
    """400 easy images with 30 % of their labels wrong: the belief puts most of them right."""
    stream = generator("wrong labels")
    truth = torch.randint(K, (400,), generator=stream)
    patterns = torch.randint(40, 216, (K, 1, 8, 8), generator=generator("prototypes"))
    images = (patterns[truth] + torch.randint(-40, 40, (400, 1, 8, 8), generator=stream)).to(torch.uint8)
    wrong = torch.rand(400, generator=stream) < 0.3
    data = TrainData(images, torch.where(wrong, (truth + 1 + torch.randint(K - 1, (400,), generator=stream)) % K, truth))
    method = divide_mix(data=data)
    finish(method, data, 0, 3)
    found = method.refined_labels().argmax(1)
    assert (found == truth)[wrong].float().mean() > 0.8
    assert (found == truth)[~wrong].float().mean() > 0.95


# Constants: the test that notices when one is changed by a tenth

HERE = "tests/test_methods_dividemix.py::"
BY_HAND = HERE + "test_one_update_by_hand[1]"
RAMP = HERE + "test_the_ramp_rises_over_sixteen_epochs_after_the_warm_up"
STEPS = HERE + "test_the_ramp_moves_with_every_step"
FEWEST = HERE + "test_too_few_believed_labels_are_replaced_by_the_tenth_of_smallest_loss"
DIVISION = HERE + "test_the_division_is_scikit_learns_on_scaled_losses"
SHARPENING = HERE + "test_sharpening_keeps_zeros_and_certainty"
REFINING = HERE + "test_a_refined_label_is_part_given_part_predicted"
AVERAGED = HERE + "test_losses_can_be_averaged_over_epochs"
ENTROPY = HERE + "test_the_warm_up_can_reward_entropy"
PATH = "methods/dividemix.py"

MUTATIONS = [
    Mutation(PATH, "VIEWS = 2", "VIEWS = 3", BY_HAND),
    Mutation(PATH, "FEWEST = 0.1", "FEWEST = 0.11", FEWEST),
    Mutation(PATH, "clean > threshold", "clean > 1.1 * threshold", FEWEST),
    Mutation(
        PATH,
        "(self.config.averaged, epoch + 1)",
        "(self.config.averaged, epoch + 2)",
        HERE + "test_losses_can_be_averaged_over_epochs",
    ),
    Mutation(PATH, "/ num_averaged", "/ (1.1 * num_averaged)", AVERAGED),
    Mutation(PATH, "belief = 0.5 * refined", "belief = 0.55 * refined", DIVISION),
    Mutation(PATH, "// size + 1", "// size + 1.1", STEPS),
    Mutation(PATH, "min(1.0, max(", "min(1.1, max(", RAMP),
    Mutation(PATH, "max(0.0, since", "max(0.1, since", RAMP),
    Mutation(PATH, "since / (self.config.ramp", "since / (1.1 * self.config.ramp", RAMP),
    Mutation(PATH, "max(weight, 1 - weight)", "max(weight, 1.1 - weight)", BY_HAND),
    Mutation(PATH, "loss + self.config.balance_weight *", "loss + 1.1 * self.config.balance_weight *", BY_HAND),
    Mutation(PATH, "loss + self.config.unlabelled_weight *", "loss + 1.1 * self.config.unlabelled_weight *", BY_HAND),
    Mutation(
        PATH,
        "- self.config.warmup_entropy *",
        "- 1.1 * self.config.warmup_entropy *",
        ENTROPY,
    ),
    Mutation(PATH, "(1 - clean) * probabilities", "(1.1 - clean) * probabilities", REFINING),
    Mutation(PATH, "return clean * one_hot", "return 1.1 * clean * one_hot", REFINING),
    Mutation(PATH, "targets.log() / temperature", "targets.log() / (1.1 * temperature)", SHARPENING),
    Mutation("losses/squared_error.py", ".square().sum(dim=1)", ".square().sum(dim=1) * 1.1", BY_HAND),
    Mutation("losses/squared_error.py", ".square()", ".pow(2.2)", BY_HAND),
]
