"""load_state_dict under attack: it loads, or it raises ValueError and nothing has changed."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import make_model, train

from zclip_optim import ZClip, ZClipOptimizer
from zclip_optim.algorithm import NormStats
from zclip_optim.state import VERSION, Counters, SavedState, to_flat


def make(scope="global"):
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-3}]
    optimizer = ZClipOptimizer(torch.optim.AdamW(groups, lr=1e-2), scope=scope)
    train(model, optimizer, range(30), outliers=[27])
    return optimizer


OPTIMIZERS = {scope: make(scope) for scope in ("global", "group")}
SAVED = {scope: copy.deepcopy(optimizer.state_dict()) for scope, optimizer in OPTIMIZERS.items()}
KEYS = sorted(key for key in SAVED["global"]["param_groups"][0] if key.startswith("zclip_"))
MISSING = object()

hostile_values = st.one_of(
    st.just(MISSING),
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**62),
    st.just(10**5000),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(lambda x: torch.tensor(x), st.floats()),
    st.just(torch.ones(3)),
    st.complex_numbers(),
)


def snapshot(optimizer):
    return repr((optimizer.state_dict(), optimizer.metrics, optimizer.clipper._records.state.read()[0].counters))


def attack(optimizer, saved):
    """Load; whether it was accepted. A refusal must be a ValueError that leaves everything as it was."""
    before = snapshot(optimizer)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        assert snapshot(optimizer) == before
        return str(error)
    return None


def is_sound(key, value):
    if type(value) is float and key in ("zclip_mean", "zclip_var"):
        return 0 <= value < math.inf
    if type(value) is not int or value < 0:
        return False
    if key in ("zclip_mean", "zclip_var"):
        return value <= 1e308
    return 1 <= value <= VERSION if key == "zclip_version" else key != "zclip_scope" and value < 2**63


@given(
    st.sampled_from(["global", "group"]),
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from(KEYS), hostile_values), min_size=1, max_size=4),
)
def test_any_values_under_our_keys(scope, changes):
    optimizer, saved = OPTIMIZERS[scope], copy.deepcopy(SAVED[scope])
    saved["param_groups"][0]["lr"] = 77.0
    for group, key, value in changes:
        if value is MISSING:
            saved["param_groups"][group].pop(key, None)
        else:
            saved["param_groups"][group][key] = value
    refusal = attack(optimizer, saved)
    if refusal is not None:
        assert "zclip_" in refusal
    final = {(group, key): value for group, key, value in changes}
    if any(key == "zclip_version" and value == 1 for (_, key), value in final.items() if type(value) is int):
        final = {change: value for change, value in final.items() if change[1] != "zclip_spike_steps"}  # a newer key
    scope_kept = {change: value == scope for change, value in final.items() if change[1] == "zclip_scope"}
    if any(not is_sound(key, value) and not scope_kept.get((group, key)) for (group, key), value in final.items()):
        assert refusal is not None
    optimizer.load_state_dict(copy.deepcopy(SAVED[scope]))
    assert optimizer.param_groups[0]["lr"] == 1e-2


@given(st.dictionaries(st.text(max_size=6).map("zclip_x".__add__), hostile_values.filter(lambda v: v is not MISSING)))
def test_keys_that_we_do_not_know_are_carried_along(extra):
    saved = copy.deepcopy(SAVED["global"])
    saved["param_groups"][0].update(extra)
    assert attack(OPTIMIZERS["global"], saved) is None
    OPTIMIZERS["global"].load_state_dict(copy.deepcopy(SAVED["global"]))


@pytest.mark.parametrize("version", [VERSION + 1, 99, 10**30])
def test_a_future_version_is_named(version):
    saved = copy.deepcopy(SAVED["global"])
    for group in saved["param_groups"]:
        group["zclip_version"] = version
    assert "zclip_version" in attack(OPTIMIZERS["global"], saved)


@pytest.mark.parametrize(("ours", "theirs"), [("global", "group"), ("group", "global")])
def test_statistics_of_another_scope_are_refused_by_name(ours, theirs):
    refusal = attack(OPTIMIZERS[ours], copy.deepcopy(SAVED[theirs]))
    assert f"zclip_scope in saved param_groups[0] must be {ours!r}" in refusal


@pytest.mark.parametrize("change", [lambda groups: groups.pop(), lambda groups: groups.append(dict(groups[0]))])
def test_another_number_of_groups(change):
    saved = copy.deepcopy(SAVED["global"])
    change(saved["param_groups"])
    assert "parameter groups" in attack(OPTIMIZERS["global"], saved)


@given(st.integers(1, 60))
def test_a_truncated_file_does_not_load(cut):
    buffer = io.BytesIO()
    torch.save(SAVED["global"], buffer)
    content = buffer.getvalue()
    with pytest.raises((RuntimeError, EOFError, OSError, ValueError)):
        torch.load(io.BytesIO(content[: len(content) * cut // 61]), weights_only=True)


def test_checkpoints_hold_no_code_and_no_classes():
    buffer = io.BytesIO()
    torch.save(SAVED["group"], buffer)
    buffer.seek(0)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(buffer) == []
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


@given(st.dictionaries(st.text(max_size=8), hostile_values.filter(lambda v: v is not MISSING), max_size=3))
def test_the_engine_alone_is_as_strict(state):
    clipper = ZClip()
    before = clipper.state_dict()
    with pytest.raises(ValueError, match=r"list of dicts|what ZClip"):
        clipper.load_state_dict({"groups": state})
    with pytest.raises(ValueError, match=r"what ZClip|zclip_|list of dicts"):
        clipper.load_state_dict(state)
    assert clipper.state_dict() == before


def test_statistics_as_large_as_float64_allows_are_carried():
    (flat,) = to_flat(SavedState([NormStats(1e300, 1e307, 2**62, 3, 4)], Counters()), "global")
    saved = copy.deepcopy(SAVED["global"])
    for group in saved["param_groups"]:
        group.update(flat)
    assert attack(OPTIMIZERS["global"], saved) is None
    assert OPTIMIZERS["global"].metrics.mean == 1e300
    OPTIMIZERS["global"].load_state_dict(copy.deepcopy(SAVED["global"]))
