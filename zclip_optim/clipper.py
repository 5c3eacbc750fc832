"""ZClip: measure, decide, apply; state in and out."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zclip_optim.algorithm import Scalar, ZClipConfig
from zclip_optim.checks import refuse_unexpected, refuse_unless_count
from zclip_optim.fused import Kernels, KernelScaler
from zclip_optim.gradients import Gradients, ParamGroups, ReportedNorm, Scaler
from zclip_optim.health import must_stop, nonfinite_error
from zclip_optim.intervals import METRICS
from zclip_optim.measure import gradients_of, measure
from zclip_optim.metrics import ClipMetrics, ParameterNorm, combine, ranked
from zclip_optim.param_groups import as_param_groups
from zclip_optim.process_groups import Parameters, ProcessGroups, as_groups
from zclip_optim.records import Records
from zclip_optim.running import DeviceState, uncompiled
from zclip_optim.state import SavedState, from_state_dict, to_flat


class ZClip:
    """Adaptive gradient clipping without the optimizer wrapper, for training loops that keep their optimizer.

    One for each network that is trained by itself, as those of a GAN are.

    Args:
        **options: the keyword arguments of `ZClipOptimizer`, with the same meaning, defaults and errors.

    Who comes from the package `zclip` 1.0.0 of PyPI replaces its import by ``from zclip_optim import ZClip``, keeps
    ``clipper.step(model)``, and leaves out the step where `step_was_skipped`; the argument names are the same. With
    ``max_grad_norm=1.0`` and ``clip_factor=1`` the run is the same. What differs:

    - `max_grad_norm` is None, not 1.0, which is fixed clipping of every model whose norms exceed 1;
    - `clip_factor` multiplies the sigma term, not the whole threshold: with mu = 10, sigma = 0.1 and 0.5 a norm of 10.3
      became 5.1, while 10.2 passed;
    - `eps` is relative to mu: with norms near 1e-7 a tenfold spike was never seen;
    - norms are in float32 or wider, not in the dtype of the first parameter: float16 overflows at 512;
    - NaN, infinity and 0 never enter the statistics, which one NaN disabled for ever;
    - the statistics can be saved, and norms are those of all ranks on any mesh.

    On an accelerator the statistics stay there: a step reads nothing back but one flag, if steps may be skipped.
    Reading `metrics`, `step_was_skipped` or `state_dict()` waits for the device, once per step, and `step` does because
    it returns a number. There the warnings come when something is read.

    Attributes:
        config: the validated hyperparameters.

    Example:
        >>> model, clipper = torch.nn.Linear(2, 1), ZClip(warmup_steps=2)
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
        known = [field.name for field in dataclasses.fields(ZClipConfig)]
        refuse_unexpected("ZClip", [name for name in options if name not in known], [*known, "process_group"])
        self.config = ZClipConfig(**options)
        self._process_groups = as_groups(process_group)
        self._records = Records(self.config)
        self._health = self._records.health

    def __deepcopy__(self, memo: dict[int, Any]) -> "ZClip":
        twin = memo[id(self)] = type(self).__new__(type(self))
        memo.update({id(group): group for group in self._process_groups.in_order})  # process groups are shared
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __repr__(self) -> str:
        return repr(self.config).replace("ZClipConfig", "ZClip", 1)

    def step(self, model_or_parameters: Parameters) -> float:
        """Clip the gradients in place.

        Args:
            model_or_parameters: a module, parameters, or param groups (for ``scope="group"``).

        Returns:
            The gradient norm before clipping.

        Raises:
            NonFiniteGradientError: see `nonfinite` and `max_consecutive_nonfinite` of `ZClipOptimizer`.
            ValueError: `process_group` maps parameters that are not among these.
        """
        param_groups = as_param_groups(model_or_parameters, self._process_groups)
        self._health.check_given(model_or_parameters, param_groups)
        self._clip(param_groups)
        return math.hypot(*(record.norm for record in self._records.read()))

    def decide(self, norm: float | Tensor) -> Any:
        """Take a step for gradients that somebody else has measured and will scale, such as a sharded engine.

        Args:
            norm: of all gradients on all ranks, and the same on each of them: a number or a tensor of one element. Or a
                DTensor, as `torch.linalg.vector_norm` gives it: every rank of its mesh gets the whole one.

        Returns:
            The factor to scale the gradients with: 1.0 on most steps; on an accelerator a tensor of one element, for
            which nothing was read. If `step_was_skipped`, which reads, the step must be left out instead.

        Raises:
            NonFiniteGradientError: see `nonfinite` and `max_consecutive_nonfinite` of `ZClipOptimizer`.
            TypeError: `norm` is something else.
            ValueError: it is below 0; or ``scope="group"``, for which one norm is not enough.

        Example:
            >>> clipper = ZClip(max_grad_norm=1.0)
            >>> clipper.decide(4.0), clipper.metrics.grad_norm
            (0.25, 4.0)
        """
        if self.config.scope != "global":
            raise ValueError(
                f"decide() takes the norm of all gradients: scope must be 'global', not {self.config.scope!r}"
            )
        reported = ReportedNorm(norm)
        self._step(reported.norms(), reported, new_step=True)
        return reported.factor

    def _clip(self, param_groups: ParamGroups, *, new_step: bool = True, kernels: Kernels | None = None) -> bool:
        """Clip the gradients of param groups in place; whether the optimizer may step.

        Args:
            param_groups: as in an optimizer.
            new_step: False for a further evaluation within the same step (a closure called again): it is clipped by the
                statistics that this step began with and changes neither them nor the metrics.
            kernels: of the optimizer that steps next, to which is left what they can do on an accelerator.
        """
        if torch.compiler.is_compiling():  # else it would be compiled anew for every value of its floats
            return bool(uncompiled(self._clip_now)(param_groups, new_step, kernels))
        return self._clip_now(param_groups, new_step, kernels)

    def _clip_now(self, param_groups: ParamGroups, new_step: bool, kernels: Kernels | None) -> bool:
        gradients, norms = measure(param_groups, self.config.scope, self._process_groups)
        if (self._health.missing or not any(gradients.local)) and new_step:
            self._health.count_missing(gradients.are_missing(norms))
        self._records.follow(param_groups)
        scaler = gradients if kernels is None or gradients.device is None else KernelScaler(gradients, kernels)
        return self._step(norms, scaler, new_step, gradients)

    def _step(self, norms: Any, scaler: Scaler, new_step: bool, gradients: Gradients | None = None) -> bool:
        """Decide on norms and have it carried out; whether the optimizer may step. `gradients` serve the warnings."""
        state = self._records.on(scaler.device)
        if isinstance(state, DeviceState):
            may_step = self._apply_on_device(*state.step(norms, self.config, new_step), scaler, state)
        else:
            coefs, skip = state.step(norms, self.config, new_step)
            if coefs != state.unscaled:
                scaler.scale_(coefs)
            self._health.check(state.records, gradients)
            may_step = not skip
        if not may_step:
            self._raise_if_told_to(norms, scaler)
        return may_step

    def _apply_on_device(self, coefs: Tensor, skip: Tensor, scaler: Scaler, state: DeviceState) -> bool:
        scaler.scale_(coefs)
        is_left = not self.config.can_skip or (self._may_skip_unseen(state) and scaler.leaves_out(skip))
        return is_left or not state.must_skip(skip)

    def _may_skip_unseen(self, state: DeviceState) -> bool:
        """Not if this step may have to raise; how near `max_consecutive_nonfinite` is, reading the metrics tells."""
        policy, limit = self.config.nonfinite, self.config.max_consecutive_nonfinite or math.inf
        return policy == "pass" or (policy == "skip" and state.last_read[0].nonfinite_streak + 1 < limit)

    def _raise_if_told_to(self, norms: Iterable[Scalar], scaler: Scaler) -> None:
        record = self._records.read()[0]
        if must_stop(record, self.config):
            # Whether a rank gets here with kernels of its own depends on what it has read before: no collective then.
            where = scaler.describe_nonfinite(ask_others=not (scaler.acts_later and self.config.nonfinite == "skip"))
            raise nonfinite_error(math.hypot(*map(float, norms)), record, where)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the optimizer must not step: the last norm was NaN or infinite, or a spike above `z_skip`."""
        return bool(self._records.read()[0].skipped)

    @property
    def metrics(self) -> ClipMetrics:
        """`ClipMetrics` of the last step; with ``scope="group"`` of all param groups together."""
        return combine(self.group_metrics)

    @property
    def group_metrics(self) -> list[ClipMetrics]:
        """`ClipMetrics` of the last step, one per param group that it had; a single one unless ``scope="group"``."""
        return self._metrics_for(METRICS)

    def _metrics_for(self, reader: str) -> list[ClipMetrics]:
        """The metrics of each scope, with the interval of this reader, which ends here."""
        pairs = self._records.read_for(reader)
        return [ClipMetrics.of(record, self.config.warmup_steps, interval) for record, interval in pairs]

    def norms_by_parameter(self, model_or_parameters: Parameters, limit: int | None = 10) -> list[ParameterNorm]:
        """As `ZClipOptimizer.norms_by_parameter`, of what `step` takes; those of a module have its names."""
        refuse_unless_count("limit", limit)
        param_groups = as_param_groups(model_or_parameters, self._process_groups)
        gradients = gradients_of(param_groups, self.config.scope, self._process_groups)
        return ranked(gradients.norms_by_parameter(), limit)

    def state_dict(self) -> dict[str, Any]:
        """The statistics as plain Python scalars; hyperparameters are not saved."""
        return {"groups": to_flat(SavedState.of(self._records.read()), self.config.scope)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the statistics that `state_dict` returned. Each kind of `ZClipWarning` can then be given again.

        Raises:
            ValueError: the state is malformed; names the key. Nothing has changed then.
        """
        self._records.restore(from_state_dict(state_dict, self.config.scope))
