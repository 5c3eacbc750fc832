"""Small problems, their loop, the spikes of a loss, and what the methods beside ZClip do."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.paper.cells import Cell, load_outcome, run_cell, schedule_of
from benchmarks.training.loop import train, warm_up
from benchmarks.training.methods import METHODS
from benchmarks.training.problems import (
    PROBLEMS,
    DivisionTransformer,
    P,
    Q,
    Quotients,
    SumNet,
    Sums,
    SumTransformer,
)
from benchmarks.training.run import DIVERGED_AFTER
from benchmarks.training.spikes import WINDOW, SpikeRule

SIZES = {"regression": (0.01, 50), "division": (0.003, 256), "digits-sgd": (0.1, 32), "digits-sgd-sum": (0.1 / 32, 32)}
LEVEL = [1.0] * WINDOW


STEPS = {"division": 800}  # before it is learned as well as the others


def trained(name, steps, method="none", seed=0, lr=None):
    rate, batch = SIZES.get(name, (0.01, 256))
    problem = PROBLEMS[name]
    return train(problem, METHODS[method], lr or rate, seed, problem.open(batch, seed, {}), steps)[1]


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_learned_and_its_run_fixed_by_the_seed(name):
    trace, again, other = trained(name, STEPS.get(name, 150)), trained(name, 20), trained(name, 20, seed=1)
    assert trace.losses[:20] == again.losses != other.losses
    assert trace.grad_norms[:20] == again.grad_norms
    assert np.mean(trace.losses[-10:]) < 0.7 * trace.losses[0]
    assert trace.clipped_norms == trace.grad_norms


def test_a_summed_loss_is_the_same_run_with_larger_gradients():
    mean, total = trained("digits-sgd", 30), trained("digits-sgd-sum", 30)
    assert total.losses == pytest.approx([32 * loss for loss in mean.losses], rel=1e-3)
    assert total.grad_norms == pytest.approx([32 * norm for norm in mean.grad_norms], rel=1e-3)


def test_the_first_layer_of_sums_is_a_layer_over_both_embeddings():
    torch.manual_seed(0)
    net, pairs = SumNet(), torch.randint(P, (7, 2))
    hidden = functional.relu(net.up(net.embedding[pairs].flatten(1)))
    torch.testing.assert_close(net(pairs), net.head(hidden))


def test_the_transformer_is_attention_over_three_tokens():
    torch.manual_seed(0)
    net, pairs = SumTransformer(), torch.randint(P, (7, 2))
    x = net.embedding[functional.pad(pairs, (0, 1), value=P)] + net.position
    query, key, value = (
        layer(net.attention_norm(x)).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (net.query, net.key, net.value)
    )
    mixed = functional.scaled_dot_product_attention(query, key, value)[:, :, -1].flatten(1)
    y = x[:, -1] + net.out(mixed)
    y = y + net.down(functional.relu(net.up(net.ffn_norm(y))))
    torch.testing.assert_close(net(pairs), net.head(net.norm(y)))


def test_the_division_transformer_is_two_causal_blocks_over_three_tokens():
    torch.manual_seed(0)
    net, pairs = DivisionTransformer(), torch.randint(1, Q, (7, 2))
    x = net.embedding[functional.pad(pairs, (0, 1), value=Q)] + net.position[:, 0]
    for (norm, attention), ffn in zip(net.attention, net.ffn, strict=True):
        query, key, value = attention.query_key_value(norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + ffn(x)
    torch.testing.assert_close(net(pairs), net.head(x[:, -1]))


def test_quotients_are_quotients_and_half_of_them_are_held_out():
    quotients = Quotients(512, 3, {})
    pairs, targets = quotients.train(0)
    assert torch.equal(targets * pairs[:, 1] % Q, pairs[:, 0])
    ((held_out, _),) = quotients.held_out(1)
    assert len(held_out) == Q * (Q - 1) // 2
    assert {tuple(pair) for pair in quotients.pairs.tolist()}.isdisjoint(map(tuple, held_out.tolist()))


def test_the_rate_of_division_is_warmed_up():
    rates = []

    class Stepper:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    for step in range(11):
        warm_up(Stepper, 0.5, step, 10)
        rates.append(Stepper.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.05 * (i + 1) for i in range(10)] + [0.5])


def test_inputs_three_times_as_large_stay_so_and_are_held_out_so():
    cell = Cell("digits-sgd", "none", 0.1, 100, "inputs x 3 from the middle on", 40, 32)
    batches = PROBLEMS["digits-sgd"].open(32, 100, schedule_of(cell, PROBLEMS["digits-sgd"]))
    plain = PROBLEMS["digits-sgd"].open(32, 100, {})
    for step in (19, 20, 39):
        factor = 3 if step >= 20 else 1
        assert torch.equal(batches.train(step)[0], factor * plain.train(step)[0])
    assert torch.equal(next(batches.held_out(1))[0], 3 * next(plain.held_out(1))[0])


def test_held_out_sums_are_not_trained_on():
    sums = Sums(512, 3, {})
    ((held_out, targets),) = sums.held_out(1)
    assert torch.equal(targets, held_out.sum(1) % P)
    seen = {tuple(pair) for step in range(40) for pair in sums.train(step)[0].tolist()}
    assert len(seen) > 0.99 * len(sums.pairs)
    assert seen.isdisjoint(map(tuple, held_out.tolist()))


def test_a_loss_that_stays_broken_ends_the_run():
    assert len(trained("digits-sgd", 200, lr=1e30).losses) < 200
    lost = trained("digits-sgd", 200, method="fixed", lr=1e38)
    assert not any(map(math.isfinite, lost.losses[-DIVERGED_AFTER:]))


@pytest.mark.parametrize(
    ("rule", "losses", "spikes"),
    [
        (SpikeRule(2), [*LEVEL, 2.0], []),
        (SpikeRule(2), [*LEVEL, 2.1], [50]),
        (SpikeRule(2), [9.0] * 10, []),  # nothing to compare with
        (SpikeRule(2), [*LEVEL, 3.0, 3.0, *LEVEL[:17], 3.0], [50]),  # 19 steps after the first
        (SpikeRule(2), [*LEVEL, 3.0, 3.0, *LEVEL[:18], 3.0], [50, 70]),
        (SpikeRule(10, floor=20.0), [*LEVEL, 19.0], []),
        (SpikeRule(10, floor=20.0), [*LEVEL, 21.0], [50]),
        (SpikeRule(2), [*LEVEL, math.nan, *LEVEL[:30], math.inf], [50, 81]),
    ],
)
def test_what_a_spike_is(rule, losses, spikes):
    assert rule.steps(losses) == spikes


def test_a_cell_of_a_problem_leaves_its_losses_and_norms(tmp_path):
    cell = Cell("regression", "fixed", 0.01, 0, "clean", 120, 50, (("max_norm", 0.01),))
    assert cell.name == "regression_fixed_max_norm=0.01_lr0.01_clean_steps120_batch50_seed0"
    outcome = run_cell(cell, tmp_path)
    assert load_outcome(cell, tmp_path) == outcome | {"cell": load_outcome(cell, tmp_path)["cell"]}
    steps = np.load(tmp_path / f"{cell.name}.npz")
    assert len(steps["losses"]) == 120
    assert steps["clipped_norms"].max() == pytest.approx(0.01)
    assert outcome["measure"] == outcome["log_last_loss"] == pytest.approx(math.log(steps["losses"][-24:].mean()))
    assert outcome["worst_last_loss"] == pytest.approx(steps["losses"][-24:].max())
    assert outcome["steps_above"] == (steps["losses"][48:] > 1e-3).sum() > 0
    assert outcome["clipped_share"] == 1.0


def test_a_run_that_diverged_counts_with_the_loss_of_chance(tmp_path):
    outcome = run_cell(Cell("digits-sgd", "none", 1e30, 0, "clean", 100, 32), tmp_path)
    assert outcome["diverged"]
    assert outcome["measure"] == pytest.approx(math.log(10), abs=0.01)
    bad = run_cell(Cell("digits-sgd", "fixed", 0.1, 0, "bad shard", 100, 32), tmp_path)
    clean = run_cell(Cell("digits-sgd", "fixed", 0.1, 0, "clean", 100, 32), tmp_path)
    assert clean["measure"] == clean["held_out_loss"] != bad["held_out_loss"]
    assert not clean["diverged"]
