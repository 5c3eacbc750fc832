"""DeepSpeed: clipping within an engine's step, by the norm that it computes and the scaling that it does."""

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any, TypeAlias

from zclip_optim.clipper import ZClip
from zclip_optim.gradients import choices
from zclip_optim.integrations import missing_extra
from zclip_optim.layout import ShardGroups
from zclip_optim.optimizer import ZClipOptimizer
from zclip_optim.state import from_state_dict

try:
    from deepspeed import __version__
    from deepspeed.runtime import utils
    from deepspeed.runtime.engine import DeepSpeedEngine
except ImportError as error:
    raise ImportError(missing_extra("deepspeed")) from error

Method: TypeAlias = Callable[..., Any]


def attach(engine: Any, **options: Any) -> ZClip:
    """Clip gradient-norm spikes of a DeepSpeed engine. A step that is left out is an overflow to DeepSpeed.

    Args:
        engine: what `deepspeed.initialize` or Accelerate's `prepare` returned, before `engine.load_checkpoint`, with
            ``"gradient_clipping": 0`` in its config. Its checkpoints keep the statistics in ``client_state["zclip"]``.
        **options: the keyword arguments of `ZClip`, with the same meaning, defaults and errors.

    Returns:
        The `ZClip`, whose `metrics` are those of the engine's last step.

    Raises:
        TypeError: `engine` is no engine that has an optimizer.
        ValueError: an option or a setting of the engine with which it would not be right. Nothing has changed.
        RuntimeError: DeepSpeed lacks what is needed. Later, from a step: it was taken without a decision.

    Example:
        >>> import deepspeed, torch
        >>> model, config = torch.nn.Linear(4, 1), {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0}
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        >>> clipper = attach(engine, z_thresh=3.0)
    """
    return attach_clipper(engine, ZClip(**options))


def attach_clipper(engine: Any, clipper: ZClip) -> ZClip:
    """`attach` with a `ZClip` that exists."""
    if not isinstance(engine, DeepSpeedEngine) or engine.basic_optimizer is None:
        raise TypeError(f"engine must be a DeepSpeedEngine that has an optimizer, got {type(engine).__name__}")
    try:
        reasons = _reasons_against(engine, clipper)
        places = [(owner, name, getattr(owner, name), hook) for owner, name, hook in _Hooks(engine, clipper).places()]
    except AttributeError as error:
        raise RuntimeError(f"deepspeed {__version__} does not fit: {error}; use 0.19.8 or newer zclip_optim") from error
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(reason)
    for place in places:
        _put(*place)
    engine.optimizer.zclip = clipper
    return clipper


def _reasons_against(engine: Any, clipper: ZClip) -> dict[str, Any]:
    """Why it would not be right, and whether that is so."""
    utils.combine_grad_norm_groups  # noqa: B018  # a version without it takes two norms that are NaN for a healthy one
    limit, config, inner = engine.gradient_clipping(), clipper.config, engine.basic_optimizer
    scalers = engine.torch_autocast_z0_gradscaler, getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    return {
        "this engine has a ZClip already": hasattr(engine.optimizer, "zclip"),
        "the optimizer clips already: hand over the one in this ZClipOptimizer": isinstance(inner, ZClipOptimizer),
        f'gradient_clipping={limit} clips, by default if it is not given: write "gradient_clipping": 0 in the config; '
        "max_grad_norm of ZClip is an absolute cap that hides no spike": limit,
        "a checkpoint was loaded without its statistics: attach first": engine.loaded_checkpoint_dp_world_size,
        f"scope must be 'global', got {config.scope!r}: DeepSpeed has one norm": config.scope != "global",
        "process_group must be None: DeepSpeed has groups of its own": clipper._process_groups != ShardGroups(),
        "nonfinite must be 'skip' or 'raise': DeepSpeed never takes such a step": config.nonfinite == "pass",
        "zclip=False in a param group: DeepSpeed has one norm of all groups": not all(choices(inner.param_groups)),
        "use_muon: DeepSpeed has the norm of its updates": any(group.get("use_muon") for group in inner.param_groups),
        "float16: DeepSpeed may change the loss scale between norm and scaling; use bfloat16": engine.fp16_enabled(),
        "torch_autocast with float16: DeepSpeed has the norm of scaled gradients; use bfloat16": any(scalers),
        "compute_grad_norm must not be false in zero_optimization": not engine.zero_compute_grad_norm(),
        "super_offload must be off: it steps before it has the norm": engine.super_offload(),
        "zenflow must be off: it steps without a norm of all gradients": engine.zenflow,
        "MoE layers: DeepSpeed leaves experts out of its norm, or averages theirs": engine.has_moe_layers,
        "mpu: without ZeRO, in float32, there is no norm of all its ranks": engine.optimizer is inner and engine.mpu,
    }


class _Hooks:
    """What is called in place of methods of an engine and its optimizer; the method is the first argument."""

    def __init__(self, engine: Any, clipper: ZClip) -> None:
        self.engine, self.optimizer, self.clipper, self.is_decided = engine, engine.optimizer, clipper, False

    def places(self) -> list[tuple[Any, str, Method]]:
        """Owner and name of each method, and what is called instead."""
        engine, outer, inner = self.engine, self.optimizer, self.engine.basic_optimizer
        checkpoints = (engine, "save_checkpoint", self.save), (engine, "load_checkpoint", self.load)
        if outer is inner:  # float32 without ZeRO: the gradients lie in p.grad
            return [*checkpoints, (inner, "step", self.clip_and_step)]
        outer.clip_grad, outer.overflow  # noqa: B018
        scaling = "unscale_and_clip_grads" if hasattr(outer, "unscale_and_clip_grads") else "get_grads_for_norm"
        update = (outer, "_optimizer_step") if hasattr(outer, "_optimizer_step") else (inner, "step")
        return [*checkpoints, (outer, "step", self.step), (outer, scaling, self.scale), (*update, self.update)]

    def clip_and_step(self, step: Method, *args: Any, **kwargs: Any) -> None:
        self.clipper.step(self.optimizer.param_groups)
        self.optimizer.overflow = self.clipper.step_was_skipped
        self.update(step, *args, **kwargs)

    def step(self, step: Method, *args: Any, **kwargs: Any) -> None:
        self.is_decided, self.optimizer._global_grad_norm = False, None
        self.optimizer.clip_grad = math.inf  # scales nothing; with 0 BF16_Optimizer would not come to `scale`
        step(*args, **kwargs)
        self.optimizer.clip_grad = 0.0  # it goes into checkpoints
        if self.optimizer.overflow:
            self.clipper.decide(math.inf)
        elif not self.is_decided:
            raise RuntimeError(f"deepspeed {__version__} took a step without a decision of ZClip: nothing was clipped")
        self.optimizer.overflow = self.clipper.step_was_skipped

    def scale(self, scale: Method, *args: Any, **kwargs: Any) -> Any:
        norm = self.optimizer._global_grad_norm
        if not (self.is_decided or norm is None):  # BF16_Optimizer comes here before it has the norm, too
            factor, self.is_decided = self.clipper.decide(float(norm)), True
            if factor < 1:  # DeepSpeed multiplies by clip_grad / (norm + 1e-6)
                self.optimizer.clip_grad = (float(norm) + 1e-6) * factor
        return scale(*args, **kwargs)

    def update(self, update: Method, *args: Any, **kwargs: Any) -> None:
        if not self.clipper.step_was_skipped:
            update(*args, **kwargs)

    def save(
        self, save: Method, save_dir: str, tag: Any = None, client_state: Any = (), *args: Any, **kwargs: Any
    ) -> Any:
        if "zclip" in client_state:
            raise ValueError("client_state must not have the key 'zclip': the statistics of ZClip are kept there")
        return save(save_dir, tag, {**dict(client_state), "zclip": self.clipper.state_dict()}, *args, **kwargs)

    def load(self, load: Method, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        path, client_state = load(*args, **kwargs)
        asked = inspect.signature(load).bind(*args, **kwargs).arguments
        saved = (client_state or {}).pop("zclip", None)
        if path is not None and asked.get("load_optimizer_states", True) and not asked.get("load_module_only"):
            self.clipper._records.restore(saved and from_state_dict(saved, self.clipper.config.scope))
        return path, client_state


def _put(owner: Any, name: str, method: Method, hook: Method) -> None:
    """Have a hook called in place of a method."""

    @functools.wraps(getattr(method, "__func__", method))
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(method, *args, **kwargs)

    setattr(owner, name, types.MethodType(hooked, owner))  # with a __func__, which torch's schedulers ask for
