"""ZClip: holds the statistics; measures, decides and applies; state in and out."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zclip_optim.distributed import (
    Groups,
    Measured,
    ProcessGroups,
    as_groups,
    fsdp_groups,
    in_use,
    join_descriptions,
    measure_over_ranks,
)
from zclip_optim.gradients import collect_gradients, describe_nonfinite, gradient_norm, scale_gradients_
from zclip_optim.health import Health
from zclip_optim.metrics import ClipMetrics, combine
from zclip_optim.state import Counters, SavedState, from_flat, to_flat
from zclip_optim.zclip import Decision, NormStats, ZClipConfig, decide

ParamGroups = Sequence[dict[str, Any]]


class NonFiniteGradientError(FloatingPointError):
    """The gradient norm was NaN or infinite, and `nonfinite` or `max_consecutive_nonfinite` says to stop."""


class ZClip:
    """Adaptive gradient clipping without the optimizer wrapper, for training loops that keep their optimizer.

    Args:
        **options: the keyword arguments of `ZClipOptimizer`, with the same meaning, defaults and errors.

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

    _stats: list[NormStats]
    _stats_before: list[NormStats]
    _counters: Counters
    _last: "_Step"

    def __init__(self, *, process_group: ProcessGroups = None, **options: Any) -> None:
        self.config = ZClipConfig(**options)
        self._groups = as_groups(process_group)
        self.health = Health(self.config)
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
        return math.hypot(*self._last.norms)

    def clip_(self, param_groups: ParamGroups, *, new_step: bool = True) -> bool:
        """Clip the gradients of param groups in place; returns whether the optimizer may step.

        Args:
            param_groups: as in an optimizer.
            new_step: False for a further evaluation within the same step (a closure called again): it is clipped by the
                statistics that this step began with and changes neither them nor the metrics.
        """
        if torch.compiler.is_compiling():  # else it would be compiled anew for every value of its floats
            return bool(torch.compiler.disable(self._clip)(param_groups, new_step))  # type: ignore[no-untyped-call]
        return self._clip(param_groups, new_step)

    @torch.no_grad()
    def _clip(self, param_groups: ParamGroups, new_step: bool) -> bool:
        scopes = [param_groups] if self.config.scope == "global" else [[group] for group in param_groups]
        norms, gradients, nonfinite = self._measure(scopes)
        total = math.hypot(*norms)
        finite = math.isfinite(total)
        if new_step:
            self._stats_before = self._stats_of(len(scopes))
        # If the norm of one scope is not finite, the step is not taken and the statistics of none move.
        decisions = [
            decide(norm if finite else total, stats, self.config)
            for norm, stats in zip(norms, self._stats_before, strict=True)
        ]
        for scope_gradients, decision in zip(gradients, decisions, strict=True):
            scale_gradients_(scope_gradients, decision.clip_coef)
        if new_step:
            self._record(norms, decisions, finite)
        return finite or self._accept_nonfinite(total, param_groups, new_step, nonfinite)

    def _measure(self, scopes: Sequence[ParamGroups]) -> Measured:
        """For each scope, some param groups: the norm over all ranks, and the gradients in this process."""
        if in_use():
            return measure_over_ranks(scopes, self._groups)
        gradients = [collect_gradients(p for group in scope for p in group["params"]) for scope in scopes]
        return Measured([gradient_norm(scope) for scope in gradients], gradients)

    def _record(self, norms: list[float], decisions: list[Decision], finite: bool) -> None:
        self._stats = [decision.stats for decision in decisions]
        self._last = _Step(norms, decisions, skipped=False)
        if finite and self._counters.nonfinite_streak:
            self._counters = self._counters._replace(nonfinite_streak=0)
        self.health.check(self._stats_before, self._stats)

    def _accept_nonfinite(self, norm: float, param_groups: ParamGroups, new_step: bool, groups: Groups) -> bool:
        """Count a norm that is not finite, once per step; whether the step may be taken all the same.

        The ranks of `groups` have all come here, and join in saying where the bad elements are.
        """
        if not new_step and self._last.skipped:
            return False
        skipped = self.config.nonfinite != "pass"
        streak = self._counters.nonfinite_streak + 1
        self._counters = Counters(self._counters.skipped_steps + skipped, streak)
        self._last = self._last._replace(skipped=skipped)
        self.health.check_nonfinite(streak)
        limit = self.config.max_consecutive_nonfinite or math.inf
        if self.config.nonfinite == "raise" or (skipped and streak >= limit):
            where = describe_nonfinite(param_groups)
            where = join_descriptions(where, groups) if groups else where
            raise NonFiniteGradientError(
                f"the gradient norm is {norm}, after {self._stats[0].step} finite steps, for {streak} in a row; "
                f"gradients with NaN or infinite elements: {where or 'none in this process'}"
            )
        return not skipped

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last norm was NaN or infinite, so that the optimizer must not step."""
        return self._last.skipped

    @property
    def metrics(self) -> ClipMetrics:
        """`ClipMetrics` of the last step; with ``scope="group"`` of all param groups together."""
        groups = self.group_metrics
        return groups[0] if len(groups) == 1 else combine(groups)

    @property
    def group_metrics(self) -> list[ClipMetrics]:
        """`ClipMetrics` of the last step, one per param group; a single one unless ``scope="group"``."""
        return [self._describe(*pair) for pair in zip(self._last.norms, self._last.decisions, strict=True)]

    def _describe(self, norm: float, decision: Decision) -> ClipMetrics:
        stats = decision.stats
        return ClipMetrics(
            grad_norm=norm,
            clipped_norm=decision.clipped_norm,
            threshold=decision.threshold,
            z_score=decision.z_score,
            clip_coef=decision.clip_coef,
            mean=stats.mean,
            std=stats.var**0.5,
            clipped=decision.is_spike,
            skipped=self._last.skipped,
            step=stats.step,
            clipped_steps=stats.clipped_steps,
            skipped_steps=self._counters.skipped_steps,
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
        return {"groups": [to_flat(stats, self._counters, self.config.scope) for stats in self._stats]}

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
        self._stats, self._counters = saved or SavedState([NormStats()], Counters())
        self._stats_before = self._stats
        self._last = _Step.before_any(self._stats)

    def publish(self, param_groups: ParamGroups) -> None:
        """Write the state into param groups, from where `parse_groups` reads it after a checkpoint."""
        stats = self._stats_of(len(param_groups))
        for i, group in enumerate(param_groups):
            group.update(to_flat(stats[i if self.config.scope == "group" else 0], self._counters, self.config.scope))

    def _stats_of(self, n_scopes: int) -> list[NormStats]:
        """One `NormStats` per scope; a param group that was added later starts afresh."""
        return (self._stats + [NormStats()] * (n_scopes - len(self._stats)))[:n_scopes]


class _Step(NamedTuple):
    """What the last step was: one norm and one decision per scope."""

    norms: list[float]
    decisions: list[Decision]
    skipped: bool

    @staticmethod
    def before_any(stats: Sequence[NormStats]) -> "_Step":
        decisions = [Decision(1.0, math.nan, math.nan, math.nan, False, one) for one in stats]
        return _Step([math.nan] * len(decisions), decisions, skipped=False)


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
