"""megatron-core: decides on the norm that Megatron's optimizers measure, and scales and steps with their own means."""

from functools import partial
from typing import Any

from zclip_optim.checkpoints import publish
from zclip_optim.clipper import ZClip
from zclip_optim.gradients import choices
from zclip_optim.integrations import missing_extra
from zclip_optim.state import from_flat

try:
    from megatron.core import __version__
    from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
except ImportError as error:
    raise ImportError(missing_extra("megatron")) from error

OF_OPTIMIZER = ("step", "get_grad_norm", "step_with_ready_grads", "param_groups")
OF_PART = ("step_with_ready_grads", "get_parameters", "optimizer", "config")
OF_CONFIG = ("clip_grad", "use_precision_aware_optimizer_no_fp8_or_ds_fp8")


def attach(optimizer: MegatronOptimizer, **options: Any) -> ZClip:
    """Clip the gradient-norm spikes of an optimizer of megatron-core, in its own `step()`.

    The norm is Megatron's, over all its ranks. A step of NaN or infinite norm, or above `z_skip`, is left out on all of
    them and `step()` returns False first. Overflows of the loss scaler are Megatron's and not counted. The statistics
    are in the param groups, and so in every checkpoint of the optimizer.

    Args:
        optimizer: what `get_megatron_optimizer` returned for an `OptimizerConfig` with ``clip_grad=0.0``.
        **options: the keyword arguments of `ZClipOptimizer`, but for `process_group` and `scope`: there is one norm.

    Returns:
        The `ZClip` that decides, with the `metrics`.

    Raises:
        TypeError: `optimizer` is none of megatron-core's.
        ValueError: an option is out of its range, `clip_grad` clips as well, or ZClip does already.
        RuntimeError: megatron-core lacks a name that is needed here; later, a part of the optimizer steps by itself.

    Example::

        optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-4, clip_grad=0.0), [model])
        clipper = attach(optimizer, z_thresh=3.0)
    """
    if not isinstance(optimizer, MegatronOptimizer):
        raise TypeError(f"attach() takes what get_megatron_optimizer returned, got {type(optimizer).__name__}")
    if options.get("process_group") is not None or options.get("scope", "global") != "global":
        raise ValueError(f"Megatron measures one norm, of all: leave out process_group and scope, got {options}")
    clipper = ZClip(**options)
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    _refuse_what_cannot_be_right(optimizer, parts)
    _Attached(optimizer, parts, clipper)
    return clipper


class _Attached:
    def __init__(self, optimizer: Any, parts: list[Any], clipper: ZClip) -> None:
        self.saved = from_flat(optimizer.param_groups, clipper.config.scope)  # it may have loaded a checkpoint
        self.optimizer, self.parts, self.clipper = optimizer, parts, clipper
        self.norm: float | None = None
        self.decided = False
        self.measure, self.take_step = optimizer.get_grad_norm, optimizer.step_with_ready_grads
        optimizer.get_grad_norm, optimizer.step_with_ready_grads = self.get_grad_norm, self.step_with_ready_grads
        for part in parts:
            if part is optimizer:
                part.step = ChainedOptimizer(parts).step  # its own measures no norm unless it clips
            else:
                part.step_with_ready_grads = partial(self.step_part, part.step_with_ready_grads)
            if part.optimizer is not None:  # as it is where nothing is trained
                part.optimizer.register_load_state_dict_pre_hook(self.parse)
                part.optimizer.register_load_state_dict_post_hook(self.restore)
        self.restore()

    def get_grad_norm(self) -> float | None:
        self.norm = self.measure()
        return self.norm

    def step_with_ready_grads(self) -> bool:
        _refuse_clip_grad(self.parts)
        norm, self.norm = self.measure() if self.norm is None else self.norm, None
        factor = self.clipper.decide(norm)
        publish(self.clipper, self.optimizer.param_groups)
        if self.clipper.step_was_skipped:
            return False
        for part in self.parts if factor != 1 else ():
            if parameters := part.get_parameters():
                decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                # The coefficient is max_norm / (total_norm + 1e-6) there.
                clip_grad_by_total_norm_fp32(parameters, factor * (norm + 1e-6), norm, decoupled)
        self.decided = True
        try:
            return bool(self.take_step())
        finally:
            self.decided = False

    def step_part(self, take_step: Any) -> bool:
        if not self.decided:
            raise RuntimeError("ZClip has not decided: call step() of what attach() was given, not of its parts")
        return bool(take_step())

    def parse(self, _: Any, state_dict: dict[str, Any]) -> None:
        self.saved = from_flat(state_dict["param_groups"], self.clipper.config.scope)

    def restore(self, *_: Any) -> None:
        self.clipper._records.restore(self.saved)
        publish(self.clipper, self.optimizer.param_groups)


def _refuse_what_cannot_be_right(optimizer: Any, parts: list[Any]) -> None:
    wanted = [(optimizer, name) for name in OF_OPTIMIZER] + [(part, name) for part in parts for name in OF_PART]
    wanted += [(part.config, name) for part in parts if hasattr(part, "config") for name in OF_CONFIG]
    missing = [f"{type(owner).__name__}.{name}" for owner, name in wanted if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(f"megatron-core {__version__} has no {missing[0]}, which is needed here: install 0.16.1")
    _refuse_clip_grad(parts)
    if any("step_with_ready_grads" in vars(each) for each in (optimizer, *parts)):
        raise ValueError("ZClip is attached to this optimizer, or to one that it holds or is held by, already")
    if not all(choices(optimizer.param_groups)):
        raise ValueError("a param group has zclip=False, but Megatron's norm is that of all: leave that key out")


def _refuse_clip_grad(parts: list[Any]) -> None:
    clips = [part.config.clip_grad for part in parts if part.config.clip_grad]
    if clips:
        raise ValueError(
            f"clip_grad={clips[0]} of the OptimizerConfig (1.0 is the default) clips before ZClip: pass clip_grad=0.0; "
            "max_grad_norm of attach() is an absolute cap"
        )
