"""torch.distributed.checkpoint in one process: its state-dict API and its files."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from training import make_model, parameters, train

from zclip_optim import ZClipOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed.*:FutureWarning")
OPTIONS = [
    StateDictOptions(),
    StateDictOptions(flatten_optimizer_state_dict=True),
    StateDictOptions(full_state_dict=True, cpu_offload=True),
]
OUTLIERS = (30, 45)


def build(wrap=True, seed=0):
    model = make_model(seed)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return model, ZClipOptimizer(optimizer) if wrap else optimizer


def trained(wrap=True, steps=35):
    model, optimizer = build(wrap)
    train(model, optimizer, range(steps), OUTLIERS)
    return model, optimizer


def assert_goes_on_like(model, optimizer):
    whole, reference = trained(steps=60)
    train(model, optimizer, range(35, 60), OUTLIERS)
    assert torch.equal(parameters(model), parameters(whole))
    assert optimizer.metrics == reference.metrics
    assert optimizer.metrics.clipped_steps > 0


@pytest.mark.parametrize("options", OPTIONS, ids=["nested", "flat", "full"])
def test_get_and_set_resume_bit_for_bit(options):
    model, optimizer = trained()
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    model, optimizer = build(seed=1)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    assert_goes_on_like(model, optimizer)


@pytest.mark.parametrize("options", OPTIONS, ids=["nested", "flat", "full"])
def test_save_and_load_resume_bit_for_bit(options, tmp_path):
    model, optimizer = trained()
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.save(states, checkpoint_id=tmp_path)
    model, optimizer = build(seed=1)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(states, checkpoint_id=tmp_path)
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
    )
    assert_goes_on_like(model, optimizer)


def test_initialising_the_state_for_loading_leaves_no_trace_in_the_statistics():
    model, optimizer = build()
    get_optimizer_state_dict(model, optimizer)  # steps with zero gradients
    assert len(optimizer.state) == 4
    assert optimizer.metrics.step == 0
    assert optimizer.metrics.skipped_steps == 0


@pytest.mark.parametrize("options", OPTIONS[:2], ids=["nested", "flat"])
def test_a_wrapped_checkpoint_loads_into_a_bare_optimizer(options):
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer, options=options)
    bare_model, bare = build(wrap=False)
    set_optimizer_state_dict(bare_model, bare, state, options=options)
    assert bare.state_dict()["state"][0]["step"] == 35


def test_a_wrapped_full_checkpoint_loads_into_a_wrapper_to_be_taken_off():
    """With full_state_dict torch refuses every key that the optimizer at hand does not have."""
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer, options=OPTIONS[2])
    model, bare = build(wrap=False)
    with pytest.raises(KeyError, match="zclip_version"):
        set_optimizer_state_dict(model, bare, state, options=OPTIONS[2])
    model, optimizer = build()
    set_optimizer_state_dict(model, optimizer, state, options=OPTIONS[2])
    assert optimizer.base_optimizer.state_dict()["state"][0]["step"] == 35


def test_a_bare_nested_checkpoint_loads_into_the_wrapper():
    model, bare = trained(wrap=False)
    state = get_optimizer_state_dict(model, bare)
    model, optimizer = build()
    set_optimizer_state_dict(model, optimizer, state)
    assert optimizer.metrics.step == 0
    assert optimizer.state_dict()["state"][0]["step"] == 35


def test_a_flattened_checkpoint_of_version_1_loads_in_part(tmp_path):
    """It has no count of spikes by that name, for which torch asks, unless it may load a part."""
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer, options=OPTIONS[1])
    for key in [key for key in state if key.endswith(".zclip_spike_steps")]:
        state[key.replace("spike_steps", "clipped_steps")] = state.pop(key)
        state[key.replace("spike_steps", "version")] = 1
    dcp.save(state, checkpoint_id=tmp_path)

    whole, resumed = build()
    whole.load_state_dict(model.state_dict())
    template = get_optimizer_state_dict(whole, resumed, options=OPTIONS[1])
    with pytest.raises(CheckpointException, match="zclip_spike_steps"):
        dcp.load(template, checkpoint_id=tmp_path)
    dcp.load(template, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(whole, resumed, template, options=OPTIONS[1])
    assert_goes_on_like(whole, resumed)


def test_a_bare_flattened_checkpoint_loads_before_wrapping_and_names_our_key_after_it(tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, bare = trained(wrap=False)
    state = get_optimizer_state_dict(model, bare, options=options)
    dcp.save(state, checkpoint_id=tmp_path)

    model, bare = build(wrap=False)
    set_optimizer_state_dict(model, bare, state, options=options)
    optimizer = ZClipOptimizer(bare)
    assert optimizer.state_dict()["state"][0]["step"] == 35

    model, optimizer = build()
    with pytest.raises(KeyError, match=r"param_groups\.0\.weight\.zclip_version"):
        set_optimizer_state_dict(model, optimizer, state, options=options)
    template = get_optimizer_state_dict(model, optimizer, options=options)
    with pytest.raises(CheckpointException, match=r"\.zclip"):
        dcp.load(template, checkpoint_id=tmp_path)
