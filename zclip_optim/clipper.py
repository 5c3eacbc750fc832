"""ZClip: holds the statistics; measures, decides and applies; state in and out."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zclip_optim.device import DeviceState
from zclip_optim.distributed import (
    Measured,
    ProcessGroups,
    Reduced,
    as_groups,
    fsdp_groups,
    groups_that_know,
    in_use,
    join_descriptions,
    measure_over_ranks,
)
from zclip_optim.fused import hand_scale, hand_skip
from zclip_optim.gradients import (
    collect_gradients,
    describe_nonfinite,
    local_norm,
    scale_gradients_,
    stays_on_device,
)
from zclip_optim.health import Health
from zclip_optim.metrics import ClipMetrics, combine
from zclip_optim.state import Counters, SavedState, StepRecord, from_flat, to_flat
from zclip_optim.zclip import NormStats, ZClipConfig, decide

ParamGroups = Sequence[dict[str, Any]]


class NonFiniteGradientError(FloatingPointError):
    """The gradient norm was NaN or infinite, and `nonfinite` or `max_consecutive_nonfinite` says to stop."""


class ZClip:
    """Adaptive gradient clipping without the optimizer wrapper, for training loops that keep their optimizer.

    Args:
        **options: the keyword arguments of `ZClipOptimizer`, with the same meaning, defaults and errors.

    On an accelerator the statistics stay there: a step reads nothing back but, unless ``nonfinite="pass"``, one flag.
    Reading `metrics`, `step_was_skipped` or `state_dict()` waits for the device, once per step, and `step` does because
    it returns a number.

    Attributes:
        config: the validated hyperparameters.
        metrics: `ClipMetrics` of the last step.
        step_was_skipped: whether the last norm was NaN or infinite, so that the optimizer must not step.

    Example:
        >>> model, clipper = nn.Linear(2, 1), ZClip(warmup_steps=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for scale in (1.0, 1.1, 100.0):
        ...     optimizer.zero_grad()
        ...     (scale * model(torch.ones(1, 2)).sum()).backward()
        ...     norm = clipper.step(model)
        ...     if not clipper.step_was_skipped:
        ...         optimizer.step()
        >>> clipper.metrics.clipped, round(norm), round(clipper.metrics.clipped_norm, 2)
        (True, 173, 1.82)

    References:
        Kumar, Owen, Roy Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507.
    """

    def __init__(self, *, process_group: ProcessGroups = None, **options: Any) -> None:
        self.config = ZClipConfig(**options)
        self._groups = as_groups(process_group)
        self.health = Health(self.config)
        self.handed_over = False
        self._device_state: DeviceState | None = None
        self._unread = False  # the device is ahead of the records here
        self._records: list[StepRecord] = []
        self.restore(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ZClip":
        twin = memo[id(self)] = type(self).__new__(type(self))
        memo.update({id(group): group for group in self._groups or ()})  # process groups are shared
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __repr__(self) -> str:
        return repr(self.config).replace("ZClipConfig", "ZClip", 1)

    def step(self, model_or_parameters: nn.Module | Tensor | Iterable[Tensor] | Iterable[dict[str, Any]]) -> float:
        """Clip the gradients in place.

        Args:
            model_or_parameters: a module, parameters, or param groups (for ``scope="group"``).

        Returns:
            The gradient norm before clipping.

        Raises:
            NonFiniteGradientError: see `nonfinite` and `max_consecutive_nonfinite` of `ZClipOptimizer`.
        """
        self.clip_(_as_param_groups(model_or_parameters))
        return math.hypot(*(record.norm for record in self._read()))

    def clip_(self, param_groups: ParamGroups, *, new_step: bool = True, optimizer: Any = None) -> bool:
        """Clip the gradients of param groups in place.

        Args:
            param_groups: as in an optimizer.
            new_step: False for a further evaluation within the same step (a closure called again): it is clipped by the
                statistics that this step began with and changes neither them nor the metrics.
            optimizer: the one that steps next. If its kernels can scale gradients on an accelerator, and skip, that is
                left to them; then `handed_over` is True, and `fused.take_back` is due after the step.

        Returns:
            Whether the optimizer may step.

        Raises:
            NonFiniteGradientError: see `nonfinite` and `max_consecutive_nonfinite` of `ZClipOptimizer`.
        """
        if torch.compiler.is_compiling():  # else it would be compiled anew for every value of its floats
            return bool(torch.compiler.disable(self._clip)(param_groups, new_step, optimizer))  # type: ignore[no-untyped-call]
        return self._clip(param_groups, new_step, optimizer)

    def _clip(self, param_groups: ParamGroups, new_step: bool, optimizer: Any) -> bool:
        self.handed_over = False
        device = _accelerator(param_groups)
        if device is None:
            return self._clip_on_host(param_groups, new_step)
        with torch.no_grad():
            return self._clip_on_device(param_groups, new_step, device, optimizer)

    def _measure(self, param_groups: ParamGroups, device: torch.device | None) -> Measured:
        """For each scope the norm over all ranks, and the gradients in this process."""
        scopes = [param_groups] if self.config.scope == "global" else [[group] for group in param_groups]
        if in_use():
            return measure_over_ranks(scopes, self._groups, device)
        gradients = [collect_gradients(scope) for scope in scopes]
        return Measured([local_norm(scope, device) for scope in gradients], gradients)

    def _clip_on_host(self, param_groups: ParamGroups, new_step: bool) -> bool:
        norms, gradients, reduced = self._measure(param_groups, None)
        total = norms[0] if len(norms) == 1 else math.hypot(*norms)
        finite = total < math.inf
        before, after = self._records_of(len(norms)), []
        counters = before[0].counters
        if new_step and counters.nonfinite_streak and not before[0].skipped:
            counters = counters._replace(nonfinite_streak=0)
        for record, norm, scope in zip(before, norms, gradients, strict=True):
            stats = record.decision.stats if new_step else record.before
            # If the norm of one scope is not finite, the step is not taken and the statistics of none move.
            decision = decide(norm if finite else total, stats, self.config)
            if decision.clip_coef != 1:
                scale_gradients_(scope, decision.clip_coef)
            after.append(StepRecord(stats, norm, decision, False, counters))
        self._device_state = None
        if new_step:
            self._records = after
            self.health.check(before, after)
        return finite or self._accept_nonfinite(total, param_groups, new_step, reduced)

    def _accept_nonfinite(self, norm: float, param_groups: ParamGroups, new_step: bool, reduced: Reduced) -> bool:
        """Count a norm that is not finite, once per step; whether the step may be taken all the same."""
        *_, was_skipped, (skipped_steps, streak) = self._records[0]
        if not new_step and was_skipped:
            return False
        skips = self.config.nonfinite != "pass"
        counters = Counters(skipped_steps + skips, streak + 1)
        self._records = [record._replace(skipped=skips, counters=counters) for record in self._records]
        self._answer_for_nonfinite(norm, param_groups, reduced)
        return not skips

    def _answer_for_nonfinite(self, norm: float, param_groups: ParamGroups, reduced: Reduced) -> None:
        """Warn of norms that are not finite, or raise, as configured.

        The ranks over which `reduced` was summed have all come here, and join in saying where the bad elements are.
        """
        streak = self._records[0].counters.nonfinite_streak
        self.health.check_nonfinite(streak)
        if self.config.nonfinite == "raise" or (self.config.nonfinite == "skip" and streak >= self._limit):
            where, groups = describe_nonfinite(param_groups), groups_that_know(reduced)
            where = join_descriptions(where, groups) if groups else where
            steps = self._records[0].decision.stats.step
            raise NonFiniteGradientError(
                f"the gradient norm is {norm}, after {steps} finite steps, for {streak} in a row; "
                f"gradients with NaN or infinite elements: {where or 'none in this process'}"
            )

    @property
    def _limit(self) -> float:
        return self.config.max_consecutive_nonfinite or math.inf

    def _clip_on_device(self, param_groups: ParamGroups, new_step: bool, device: torch.device, optimizer: Any) -> bool:
        norms, gradients, reduced = self._measure(param_groups, device)
        coefs, failed = self._state_on(device, len(norms)).step(torch.stack(norms), self.config, new_step)
        self._unread = True
        self.handed_over = _each_has_its_own(param_groups, gradients) and hand_scale(optimizer, coefs)
        if not self.handed_over:
            for scope, coef in zip(gradients, coefs.unbind(), strict=True):
                scale_gradients_(scope, coef)
        if self.config.nonfinite == "pass" or (self._may_hand_skip() and hand_skip(optimizer, failed)):
            return True
        if not failed.item():  # the one thing that is ever read back in a step
            self._records = [record.without_streak() for record in self._records]
            return True
        self._read()
        # Whether a rank comes here with a fused optimizer depends on what it has read before: no collective then.
        alone = self.handed_over and self.config.nonfinite == "skip"
        self._answer_for_nonfinite(math.hypot(*map(float, norms)), param_groups, () if alone else reduced)
        return False

    def _may_hand_skip(self) -> bool:
        """Not if this step may have to raise; how near `max_consecutive_nonfinite` is, reading the metrics tells."""
        streak = self._records[0].counters.nonfinite_streak
        return self.handed_over and self.config.nonfinite == "skip" and streak + 1 < self._limit

    def _state_on(self, device: torch.device, n_scopes: int) -> DeviceState:
        state = self._device_state
        if state is None or state.values.device != device or state.values.shape[1] != n_scopes:
            self._records = self._records_of(n_scopes)
            state = self._device_state = DeviceState(self._records, device)
        return state

    def _read(self) -> list[StepRecord]:
        """The records of the last step; on an accelerator this waits for it, once."""
        if self._unread and self._device_state is not None:
            before, self._records = self._records, self._device_state.read()
            self._unread = self._device_state.replayed
            self.health.check(before, self._records)
            self.health.check_nonfinite(self._records[0].counters.nonfinite_streak)
        return self._records

    def _records_of(self, n_scopes: int) -> list[StepRecord]:
        """One per scope; a param group that was added later starts afresh."""
        records = self._read()
        if len(records) != n_scopes:
            new = StepRecord.before_any(NormStats(), records[0].counters)
            records = (records + [new] * (n_scopes - len(records)))[:n_scopes]
        return records

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last norm was NaN or infinite, so that the optimizer must not step."""
        return bool(self._read()[0].skipped)

    @property
    def metrics(self) -> ClipMetrics:
        """`ClipMetrics` of the last step; with ``scope="group"`` of all param groups together."""
        groups = self.group_metrics
        return groups[0] if len(groups) == 1 else combine(groups)

    @property
    def group_metrics(self) -> list[ClipMetrics]:
        """`ClipMetrics` of the last step, one per param group that it had; a single one unless ``scope="group"``."""
        return [self._describe(record) for record in self._read()]

    def _describe(self, record: StepRecord) -> ClipMetrics:
        decision, stats = record.decision, record.decision.stats
        return ClipMetrics(
            grad_norm=record.norm,
            clipped_norm=decision.clipped_norm,
            threshold=decision.threshold,
            z_score=decision.z_score,
            clip_coef=decision.clip_coef,
            mean=stats.mean,
            std=stats.var**0.5,
            clipped=decision.is_spike,
            skipped=record.skipped,
            step=stats.step,
            clipped_steps=stats.clipped_steps,
            skipped_steps=record.counters.skipped_steps,
            clip_rate=self._clip_rate(stats),
            consecutive_clipped=stats.streak,
        )

    def _clip_rate(self, stats: NormStats) -> float:
        steps = stats.step - self.config.warmup_steps
        return (
            min(1.0, stats.clipped_steps / steps) if steps > 0 else 0.0
        )  # min: it may have resumed with a longer warm-up

    def state_dict(self) -> dict[str, Any]:
        """The statistics as plain Python scalars; hyperparameters are not saved."""
        return {"groups": [self._to_flat(record) for record in self._read()]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the statistics that `state_dict` returned.

        Raises:
            ValueError: the state is malformed; names the key. Nothing has changed then.
        """
        saved = self.parse_groups(state_dict.get("groups")) if isinstance(state_dict, Mapping) else None
        if saved is None:
            raise ValueError("state_dict must be what ZClip.state_dict() returned: a dict with 'groups' of statistics")
        self.restore(saved)

    def parse_groups(self, groups: Any) -> SavedState | None:
        """The state that saved param groups carry, None if they carry none; raises ValueError if it is malformed."""
        return from_flat(groups, self.config.scope)

    def restore(self, saved: SavedState | None) -> None:
        """Take over a parsed state; None starts afresh."""
        stats, counters = saved or SavedState([NormStats()], Counters())
        self._records = [StepRecord.before_any(one, counters) for one in stats]
        if self._device_state is not None and self._device_state.values.shape[1] == len(stats):
            self._device_state.write(self._records)
        else:
            self._device_state = None
        self._unread = self._device_state is not None and self._device_state.replayed

    def publish(self, param_groups: ParamGroups) -> None:
        """Write the state into param groups, from where `parse_groups` reads it after a checkpoint."""
        records = self._records_of(len(param_groups) if self.config.scope == "group" else 1)
        for i, group in enumerate(param_groups):
            group.update(self._to_flat(records[i if self.config.scope == "group" else 0]))

    def _to_flat(self, record: StepRecord) -> dict[str, Any]:
        counters = record.counters if record.skipped else record.without_streak().counters
        return to_flat(record.decision.stats, counters, self.config.scope)


def _accelerator(param_groups: ParamGroups) -> torch.device | None:
    """The device that a step stays on, that of the first parameter; None for the CPU."""
    for group in param_groups:
        for p in group["params"]:
            return p.device if stays_on_device(p) else None
    return None


def _each_has_its_own(param_groups: ParamGroups, gradients: list[list[Tensor]]) -> bool:
    """Whether there is one scope and no gradient belongs to two parameters, which a kernel would scale twice."""
    held = sum([p.grad is not None for group in param_groups for p in group["params"]])
    return len(gradients) == 1 and len(gradients[0]) == held


def _as_param_groups(model_or_parameters: Any) -> ParamGroups:
    if isinstance(model_or_parameters, nn.Module):
        named = dict(model_or_parameters.named_parameters())
        shard_groups = fsdp_groups(model_or_parameters) if in_use() else {}
        return [{"params": list(named.values()), "param_names": list(named), "shard_groups": shard_groups}]
    items = _as_list(model_or_parameters)
    groups = items if items and all(isinstance(item, dict) for item in items) else [{"params": items}]
    groups = [{**group, "params": _as_list(group["params"])} for group in groups]
    for item in (p for group in groups for p in group["params"]):
        if not isinstance(item, Tensor):
            kind = type(item).__name__
            raise TypeError(
                f"model_or_parameters must be a module, parameters or param groups, got a {kind} among them"
            )
    return groups


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)
