"""ZClipOptimizer: torch's optimizer contract around a ZClip, and nothing else."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from zclip_optim.attributes import is_set, refuse_another, refuse_late_option, set_on_base
from zclip_optim.chain import Chain, given, is_list
from zclip_optim.checkpoints import PLAIN_STATE, Checkpoints, publish
from zclip_optim.checks import (
    check_base_optimizer,
    most_dimensions,
    refuse_flat_shards,
    refuse_foreign_gradients,
    refuse_inner_arguments,
    refuse_parameters_of_others,
    refuse_unclipped_update,
    refuse_unknown_shards,
)
from zclip_optim.clipper import ZClip
from zclip_optim.evaluations import STAGES, Evaluations, count_left_out
from zclip_optim.fused import ATTRIBUTES, Kernels
from zclip_optim.gradients import CHOICE, choices
from zclip_optim.hooks import make_hook_dicts, replaced, step_within_hooks
from zclip_optim.metrics import ClipMetrics, ParameterNorm
from zclip_optim.process_groups import ProcessGroups
from zclip_optim.running import uncompiled

Closure = Callable[[], Any]


class ZClipOptimizer(Optimizer):
    """Wraps any optimizer and clips gradient-norm spikes, and only those, before each of its steps.

        z_t = (g_t - mu) / (sigma + eps mu),   spike: z_t > z_thresh
        g*_t = mu + clip_factor * (z_thresh^2 / z_t) * sigma on a spike, else g_t
        mu <- alpha mu + (1 - alpha) g*_t,   sigma^2 <- alpha sigma^2 + (1 - alpha) (g*_t - mu)^2

    g_t is the L2 norm of all gradients in the param groups, but those with ``"zclip": False``, which are left alone. On
    a spike every gradient is multiplied by g*_t / g_t; on other steps no bit is changed. The statistics travel in the
    param groups of `state_dict`, so they survive every checkpoint library; hyperparameters are not saved. Schedulers,
    GradScaler and trainers take the wrapper for the optimizer that it wraps. Turn off any other clipping: it hides the
    spikes.

    SAM's `first_step()` and `second_step()` are clipped as its `step(closure)` is, the first one moves the statistics;
    other methods of a base optimizer that update parameters are refused.

    Args:
        base_optimizer: the optimizer to wrap, an instance of any class; may be trained already. Or a list of them, over
            parameters of one model: they step together, under one norm; a closure is evaluated once for all. What gives
            each rank a part of the parameters (ZeroRedundancyOptimizer) is to be wrapped itself: made by it, this would
            measure that part. RPC's DistributedOptimizer makes one on each worker, with the norm of the part there.
        alpha: smoothing factor of the running statistics, 0 <= alpha < 1.
        z_thresh: z-score above which a step is a spike, in standard deviations, > 0.
        mode: "zscore", or "percentile" to clip spikes to mu + z_thresh * sigma whatever `clip_option` is.
        clip_option: what a spike is clipped to: "adaptive_scaling" (alias "reciprocal", above), "mean" (mu) or "max"
            (mu + z_thresh * sigma).
        percentile: only for ``mode="percentile"``: sets z_thresh to this quantile of the standard normal distribution,
            0.5 < percentile < 1 (0.99 gives 2.326).
        clip_factor: multiplies the sigma term of "adaptive_scaling", > 0.
        max_grad_norm: absolute cap of the norm, in gradient-norm units, during warm-up too, > 0; None for no cap.
        warmup_steps: norms collected before adaptive clipping starts, in steps, >= 1.
        lookback: share of the steps so far that the averages look back on, until `alpha` looks back further (0.1: after
            324 steps), 0 < lookback <= 1; None: on all norms of the warm-up alike, as in the paper, which large norms
            at the start blind for hundreds of steps.
        eps: floor of sigma, in units of mu, >= 0.
        alpha_down: smoothing factor of the mean while the norm lies below it, 0 <= alpha_down <= alpha, so that the
            threshold comes down with the norm, in warm-up too; None: alpha, as in the paper.
        skip_update_on_spike: leave the running statistics as they are on a spike; no step is skipped for it.
        z_skip: z-score above which a spike's step is left out, as for a NaN, > z_thresh; only the first three spikes in
            a row can be, later ones are clipped; None: never. In a closure it is the first evaluation that counts.
        patience: consecutive spikes after which the statistics rise, twofold in 1,000 steps, until a step is no spike,
            >= 1; None: never, as in the paper: after a lasting shift every step is clipped for ever. That protects
            optimizers of Adam's kind; with those whose steps are as long as their gradients, like SGD, use 200.
        nonfinite: what a NaN or infinite norm does: "skip" the step (gradients stay for inspection), "raise"
            `NonFiniteGradientError`, or "pass" the step on unscaled. It never enters the statistics. A norm whose
            square overflows, of 1e155 or more, is one.
        max_consecutive_nonfinite: with ``nonfinite="skip"``, raise at the so many-th such step in a row, >= 1; None:
            never. A fused kernel on an accelerator skips by itself: there it raises once `metrics` were read.
        scope: "global" for one norm and one statistic, "group" for one per param group, which it stays with.
        process_group: process group, or several, over which squared norms are summed, for gradients that are shards
            held as plain tensors (FSDP1) and for pipeline stages; () for none: every rank holds all. DTensors need
            none. Or a mapping {group: parameters}, values iterables or modules, for experts held as plain tensors: the
            ranks of the group hold other ones; it is as without a group for all other parameters. A parameter may be
            under several groups, whose ranks together hold all of it.

    Attributes:
        base_optimizer: the wrapped optimizer. Its public attributes are read and set here as well.
        parts: a tuple of the wrapped optimizers, which is one unless a list was given.
        clipper: the `ZClip` that does the work.
        metrics: `ClipMetrics` of the last step: `grad_norm`, `clipped_norm`, `threshold`, `z_score`, `clip_coef`,
            `clipped`, `clip_rate` and more, and of the steps since it was read before, `interval_max_norm` and more;
            its ``as_dict()`` is ready for a logger. On an accelerator reading it waits, once per step; a step does not.
        group_metrics: `ClipMetrics` of the last step for each param group, with ``scope="group"``.
        step_was_skipped: whether the last step left the parameters alone, because the norm was NaN, infinite or above
            `z_skip`.

    Raises:
        TypeError: `base_optimizer` is not an optimizer instance, or its param groups are no dicts, or it is or holds a
            ZClipOptimizer, or one that a trainer has prepared (Accelerate, Fabric, Lightning, Opacus): wrap first.
        ValueError: an argument is out of its range; names the argument, the value and the range. Or the parameters are
            FSDP1's, or in a distributed run experts (plain, `allreduce` False), and `process_group` does not say who
            holds the others; or it maps other parameters; or DeepSpeed ZeRO or Megatron keeps gradients elsewhere.

    Warns:
        ZClipWarning: each kind once, and once more after a `load_state_dict`: many steps are clipped, spikes outlast
            `patience`, norms were clipped before, many steps are not finite, no parameter has a gradient; or the
            param groups of `base_optimizer` hold statistics that do not fit.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), z_thresh=3.0)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.metrics.clipped
        False

    References:
        Kumar, Owen, Roy Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507.
    """

    _step_supports_amp_scaling = False  # GradScaler then unscales before step(), also for a fused base optimizer

    def __init__(
        self,
        base_optimizer: Optimizer | Sequence[Optimizer],
        *more: NoReturn,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        mode: str = "zscore",
        clip_option: str = "adaptive_scaling",
        percentile: float | None = None,
        clip_factor: float = 1.0,
        max_grad_norm: float | None = None,
        warmup_steps: int = 25,
        lookback: float | None = None,
        eps: float = 1e-6,
        alpha_down: float | None = None,
        skip_update_on_spike: bool = False,
        z_skip: float | None = None,
        patience: int | None = None,
        nonfinite: str = "skip",
        max_consecutive_nonfinite: int | None = 25,
        scope: str = "global",
        process_group: ProcessGroups = None,
        **unexpected: NoReturn,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "base_optimizer", "more", "unexpected")}
        refuse_inner_arguments(base_optimizer, more, unexpected, options)
        parts: list[Any] = list(base_optimizer) if is_list(base_optimizer) else [base_optimizer]
        for part in parts:
            check_base_optimizer(part, ZClipOptimizer)
        self.clipper = ZClip(**options)  # before there is a base optimizer, which may have an attribute of that name
        self.base_optimizer: Any = Chain(parts) if is_list(base_optimizer) else base_optimizer
        for part in parts:
            refuse_foreign_gradients(part, self._params())
        refuse_unknown_shards(self.param_groups, self.clipper._process_groups)
        refuse_parameters_of_others(self.clipper._process_groups, self._params())
        # Not Optimizer.__init__, which would, through the properties below, empty the base optimizer.
        make_hook_dicts(self)
        self._has_stepped = False  # or was asked to, in this process
        self._dimensions = most_dimensions(self._params())  # until then
        self._kernels = Kernels(tuple(parts))
        self._evaluations = Evaluations(self.clipper)
        self._checkpoints = Checkpoints(self.base_optimizer, tuple(parts), self.clipper)

    @property
    def metrics(self) -> ClipMetrics:
        """`ClipMetrics` of the last step; with ``scope="group"`` of all param groups together."""
        return self.clipper.metrics

    @property
    def group_metrics(self) -> list[ClipMetrics]:
        """`ClipMetrics` of the last step, one per param group that it had; a single one unless ``scope="group"``."""
        return self.clipper.group_metrics

    def norms_by_parameter(self, limit: int | None = 10) -> list[ParameterNorm]:
        """The norms of single parameters that make up the gradient norm, of the gradients at hand.

        After a step these are the scaled ones; the shares are the same. Nothing is measured before this is called; it
        reads every gradient once and on accelerators waits for the device. In a distributed run every rank must call
        it, and gets the same list. Over the groups of `process_group` the squared norms of parameters of the same name
        are added: pipeline stages, which hold different parameters, need an optimizer made with `named_parameters()`.

        Args:
            limit: the length of the list, in parameters, >= 1; None for all of them.

        Returns:
            `ParameterNorm(name, norm, share)` of the parameters that have a gradient, those of NaN or infinite norm
            first, then the largest first. The names are those of an optimizer made with `named_parameters()`, else
            positions such as "param_groups[0]['params'][1]"; tied gradients come once.

        Raises:
            ValueError: `limit` is out of its range.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = ZClipOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1))
            >>> model(torch.ones(1, 3)).sum().backward()
            >>> for name, norm, share in optimizer.norms_by_parameter():
            ...     print(f"{name}: {norm:.3f}, {share:.0%}")
            weight: 1.732, 75%
            bias: 1.000, 25%
        """
        return self.clipper.norms_by_parameter(self.param_groups, limit)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step left the parameters alone: its gradient norm was NaN, infinite or above `z_skip`."""
        return self.clipper.step_was_skipped

    @property
    def parts(self) -> tuple[Any, ...]:
        """The wrapped optimizers; one, unless several were given."""
        return self._checkpoints.parts

    # The base optimizer replaces these objects when it loads a checkpoint, and trainers assign them: never aliases.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of the base optimizer."""
        groups: list[dict[str, Any]] = self.base_optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The per-parameter state of the base optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The default hyperparameters of the base optimizer; empty if it has none."""
        defaults: dict[str, Any] = getattr(self.base_optimizer, "defaults", {})
        return defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def step(self, closure: Closure | None = None, *args: Any, **kwargs: Any) -> Any:
        """Clip the gradients if their norm is a spike, then let the base optimizer step.

        Args:
            closure: reevaluates the model, calls backward and returns the loss. The gradients of each evaluation are
                clipped; the first one moves the statistics.
            *args, **kwargs: what the base optimizer's step takes beside a closure, such as SophiaH's ``hessian``, and
                hands on as it is; of several optimizers each gets them.

        Returns:
            What the base optimizer's step returns; for a skipped step the loss, or None without a closure.

        Raises:
            NonFiniteGradientError: the norm is NaN or infinite, with ``nonfinite="raise"`` or for the
                `max_consecutive_nonfinite`-th time in a row; names the parameters.
            TypeError: the base optimizer's step does not take the arguments. Nothing has changed then.
        """
        if not self._has_stepped:
            uncompiled(self._look_at_first_step)()  # torch 2.9 cannot compile that it sets an attribute of an optimizer
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return step_within_hooks(self, self._step_with, given(closure, args), kwargs)
        return self._step_with(closure, *args, **kwargs) if kwargs or args or closure is not None else self._step()

    # Keeps torch from wrapping step() in its hooks: the global ones fire in the base optimizer's step, once per step.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self) -> Any:
        base, kernels = self.base_optimizer, self._kernels
        try:
            if self.clipper._clip(base.param_groups, kernels=kernels):
                return base.step()
        finally:
            kernels.take_back()
        return uncompiled(count_left_out)(base)

    def _step_with(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        if closure is None and not args and not kwargs:
            return self._step()
        try:
            return self._evaluations.step(self.base_optimizer, self._kernels, *given(closure, args), **kwargs)
        finally:
            self._kernels.take_back()

    def _look_at_first_step(self) -> None:
        """What may have been done to the parameters since they were wrapped."""
        refuse_flat_shards(self._params(), self._dimensions)
        refuse_parameters_of_others(self.clipper._process_groups, self._params())
        self._has_stepped = True

    def _take_stage(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if not self._has_stepped:
            self._look_at_first_step()
        return self._evaluations.take(self.base_optimizer, name, *args, **kwargs)

    def _params(self) -> Iterator[torch.Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # Accelerate looks for the argument by its name
        """Reset the gradients, as the base optimizer does.

        Args:
            set_to_none: drop the gradients instead of filling them with zeros; None: the base optimizer's default.
        """
        if set_to_none is None:
            self.base_optimizer.zero_grad()
        else:
            self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base optimizer; with ``scope="group"`` it starts with a warm-up of its own.

        Args:
            param_group: a dict with "params", as in torch; ``"zclip": False`` leaves it alone.

        Raises:
            ValueError: its ``zclip`` is neither True nor False. Nothing has changed then.
        """
        choices([param_group])
        self.base_optimizer.add_param_group(param_group)
        publish(self.clipper, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The state to save in a checkpoint. On accelerators this waits for the device.

        Returns:
            The base optimizer's state dict, with ZClip's statistics as plain numbers ``zclip_*`` in every param group;
            if it saves nothing of its param groups, as some containers do, in an entry ``zclip`` of their own.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = self._checkpoints.save()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = replaced(state_dict, post_hook(self, state_dict))
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of a bare base optimizer; with the latter the statistics start afresh.

        Args:
            state_dict: what `state_dict` returned. Hyperparameters of ZClip are not restored: those given at
                construction stay, and ``zclip`` of each param group. Each kind of `ZClipWarning` can be given again.

        Raises:
            ValueError: what ZClip saved in it is malformed; names the key. Nothing has changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = replaced(state_dict, pre_hook(self, state_dict))
        self._checkpoints.load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getattr__(self, name: str) -> Any:
        """Public names that only the base optimizer has, such as ScheduleFree's train() and eval()."""
        if hasattr(type(self), name):
            return object.__getattribute__(self, name)  # a property of ours failed: let its own AttributeError surface
        if name.startswith("_") or name == "base_optimizer" or name in ATTRIBUTES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(self.base_optimizer, name)
        if name in STAGES and callable(value):
            return functools.partial(self._take_stage, name)
        refuse_unclipped_update(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """A public attribute that the base optimizer has and this has not, such as SAM's `rho`, is set there."""
        if not (name.startswith("_") or hasattr(type(self), name) or name in ATTRIBUTES):
            if is_set(self, name):
                refuse_another(name)
            elif is_set(self, "base_optimizer"):
                if set_on_base(self.base_optimizer, name, value):
                    return
                refuse_late_option(self.clipper, name, value)
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, as torch does it, and a patched step(), which would step this; with a plain one's entries."""
        own = {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}
        base = self.base_optimizer
        return {**own, **{name: getattr(base, name) for name in PLAIN_STATE if hasattr(base, name)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy; or entries of a plain optimizer, as people give them to reset one."""
        if "base_optimizer" not in state:
            self._checkpoints.put_into_base(state)
            return
        self.__dict__.update({k: v for k, v in state.items() if k not in PLAIN_STATE})
        make_hook_dicts(self)

    def __repr__(self) -> str:
        lines = repr(self.base_optimizer).splitlines()
        hidden = ("zclip_", f"{CHOICE}: True")  # the statistics are as of the last checkpoint
        base = "\n".join(line for line in lines if not line.lstrip().startswith(hidden))
        return f"{type(self).__name__} (\n{self.clipper!r}\n{base}\n)"
