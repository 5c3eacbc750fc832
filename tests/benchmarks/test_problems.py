"""Small problems, their loop, the spikes of a loss, and what the methods beside ZClip do."""

import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.paper.cells import Cell, load_outcome, run_cell
from benchmarks.training.former import PATIENCE, WARMUP, FormerDefault
from benchmarks.training.loop import train
from benchmarks.training.methods import METHODS, total_norm
from benchmarks.training.problems import PROBLEMS, P, SumNet, Sums, SumTransformer, digit_net
from benchmarks.training.run import DIVERGED_AFTER
from benchmarks.training.spikes import WINDOW, SpikeRule
from zclip_optim.algorithm import NormStats, ZClipConfig, decide

SIZES = {"regression": (0.01, 50), "digits-sgd": (0.1, 32), "digits-sgd-sum": (0.1 / 32, 32)}
LEVEL = [1.0] * WINDOW


def trained(name, steps, method="none", seed=0, lr=None):
    rate, batch = SIZES.get(name, (0.01, 256))
    problem = PROBLEMS[name]
    return train(problem, METHODS[method], lr or rate, seed, problem.open(batch, seed, {}), steps)[1]


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_learned_and_its_run_fixed_by_the_seed(name):
    trace, again, other = trained(name, 150), trained(name, 20), trained(name, 20, seed=1)
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


def test_the_former_default_is_the_paper_until_its_patience_ends():
    draw = random.Random(0)
    norms = [draw.gauss(1.0, 0.1) for _ in range(200)]
    norms[100] = norms[150] = 9.0
    former, stats, config = FormerDefault(), NormStats(), ZClipConfig(**METHODS["paper"].options)
    for norm in norms:
        decision = decide(norm, stats, config)
        stats = decision.stats
        assert former.clip(norm) == pytest.approx(decision.clipped_norm, rel=1e-9)
    assert stats.clipped_steps >= 2


def test_the_former_default_lets_go_of_a_new_regime():
    former = FormerDefault()
    for norm in [1.0, 1.1] * 50:
        former.clip(norm)
    clipped = [former.clip(10.0) < 10.0 for _ in range(400)]
    assert all(clipped[:PATIENCE])
    assert not any(clipped[-100:])
    assert WARMUP == 25


def test_the_former_method_clips_and_skips():
    model = digit_net()
    stepper = METHODS["former"].start(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for norm in [1.0, 1.1] * 20 + [50.0]:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        scale = norm / total_norm(model)
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
        clipping = stepper.step()
    assert clipping.clipped
    assert total_norm(model) == pytest.approx(clipping.clipped_norm, rel=1e-4)
    next(model.parameters()).grad[0] = math.nan
    assert stepper.step().skipped


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
