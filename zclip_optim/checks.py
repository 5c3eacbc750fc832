"""What is refused, by a ZClipOptimizer or a ZClip, and the sentences that say what to do instead.

Clipping before an optimizer's step() takes gradients that lie in `p.grad` by then, as the step will use them, and a
step that is taken when it is called. Trainers hand out optimizers of which one or the other is not true. They are known
by the names of their classes, so that no package is imported for it, also where another optimizer holds them.
"""

import difflib
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from zclip_optim.chain import attributes_of, with_those_inside
from zclip_optim.gradients import ParamGroups, named_gradients
from zclip_optim.layout import ShardGroups, in_use, is_on_mesh
from zclip_optim.norm import gradient_norm, is_ordinary

INTERFACE = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")


class Foreign(NamedTuple):
    """A class of optimizers, by its name and the packages that have it, what they are and how to clip all the same."""

    name: str
    packages: tuple[str, ...]
    what: str
    instead: str


LATE = "may do nothing, or make or unscale the gradients first"
FIRST = "Wrap first, then prepare: "
NOT_SEEN = "keeps the gradients in buffers of its own, so their norm cannot be seen here"
ON_DEEPSPEED = "zclip_optim.integrations.deepspeed.attach(engine)"
CALLBACK = "zclip_optim.integrations.lightning.ZClipCallback"
FOREIGN = (
    Foreign(
        "AcceleratedOptimizer",
        ("accelerate",),
        f"what Accelerate's prepare returned, whose step() {LATE}",
        f"{FIRST}accelerator.prepare(model, ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "_FabricOptimizer",
        ("lightning", "lightning_fabric"),
        f"what Fabric's setup returned, whose step() {LATE}",
        f"{FIRST}fabric.setup(model, ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "LightningOptimizer",
        ("lightning", "pytorch_lightning"),
        f"Lightning's own wrapper, whose step() {LATE}",
        f"{FIRST}return ZClipOptimizer(optimizer) from configure_optimizers, or use {CALLBACK}",
    ),
    Foreign(
        "DPOptimizer",
        ("opacus",),
        f"what Opacus' make_private returned, whose step() {LATE}",
        f"{FIRST}make_private(module=model, optimizer=ZClipOptimizer(optimizer), ...)",
    ),
    Foreign(
        "_WrappedOptimizer",
        ("ray",),
        f"what Ray's prepare_optimizer returned, whose step() {LATE}",
        f"{FIRST}prepare_optimizer(ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "OptimizerWrapper",
        ("colossalai",),
        f"what ColossalAI's boost returned, whose step() {LATE}",
        f"{FIRST}booster.boost(model, ZClipOptimizer(optimizer))",
    ),
    Foreign(
        "LayerWiseDummyOptimizer",
        ("transformers",),
        "the Trainer's for layer-wise updates, which are made within backward and not in its step()",
        "Choose an optim that is not layer-wise",
    ),
    Foreign(
        "CPUOffloadOptimizer",
        ("torchao",),
        "torchao's, which copies the gradients to the host while backward runs and waits for them only in its step()",
        "Use fully_shard with CPUOffloadPolicy, or torchao's optimizers of 8 or 4 bits, which can be wrapped",
    ),
    Foreign(
        "BaseOptimizer",
        ("keras",),
        "Keras', whose apply() takes the gradients as arguments",
        "Clip in train_step, with a clipper = zclip_optim.ZClip() made once: after loss.backward() "
        "clipper.step([v.value for v in self.trainable_weights]), then self.optimizer.apply(...), unless "
        "clipper.step_was_skipped",
    ),
    Foreign(
        "DistributedOptimizer",
        ("torch",),
        "RPC's, whose parameters and gradients lie on other workers",
        "Each worker can clip by the norm of its own parameters: DistributedOptimizer(ClippedSGD, parameters, lr=0.1), "
        "with class ClippedSGD(ZClipOptimizer) whose __init__(self, params, **options) calls "
        "super().__init__(torch.optim.SGD(params, **options))",
    ),
)

CLASS_ASKED_FOR = (
    ": it takes an optimizer, made with arguments of its own. Where a class is asked for, to be called with parameters "
    "and such arguments, pass one like\n\n"
    "    class ClippedAdamW(ZClipOptimizer):\n"
    "        def __init__(self, params, **options):\n"
    "            super().__init__(torch.optim.AdamW(params, **options))"
)
UPDATES = {  # methods of known optimizers that update parameters, all or one, and are not step()
    "fused_backward",  # LOMO's and AdaLOMO's, which use the gradients up within backward
    "fused_back_pass",
    "step_param",  # of those that step one parameter as soon as it has its gradient
    "step_parameter",
    "update_step",  # bitsandbytes'
}


def check_base_optimizer(base_optimizer: Any, wrapper: type) -> None:
    """Refuse what `wrapper`, the class of a ZClipOptimizer, cannot wrap.

    Raises:
        TypeError: it is a class or no optimizer, or it is or holds an optimizer that is wrapped already or whose step()
            changes the gradients first.
        ValueError: it is differentiable.
    """
    if isinstance(base_optimizer, type):
        raise _class_given(base_optimizer)
    for optimizer in with_those_inside(base_optimizer):
        reason = _why_not(optimizer, wrapper)
        if reason:
            raise TypeError(f"base_optimizer {'is' if optimizer is base_optimizer else 'holds'} {reason}")
    kind = type(base_optimizer).__name__
    missing = [name for name in INTERFACE if not hasattr(base_optimizer, name)]
    if missing:  # not isinstance: ScheduleFreeWrapper, for one, is an optimizer without torch's base class
        raise TypeError(
            f"base_optimizer must be an optimizer, got {kind}, which has no {', '.join(missing)}"
            f"{_instead_of(base_optimizer)}"
        )
    for i, group in enumerate(base_optimizer.param_groups):
        if not isinstance(group, MutableMapping) or "params" not in group:
            raise TypeError(
                f"base_optimizer: param_groups[{i}] of {kind} is no dict with 'params', as torch's optimizers have "
                f"them, but a {type(group).__name__}. Clip in the loop, with a clipper = zclip_optim.ZClip() made "
                "once: clipper.step(model) after backward(), then the optimizer's step, unless clipper.step_was_skipped"
            )
    if any(group.get("differentiable") for group in base_optimizer.param_groups):
        raise ValueError("base_optimizer must not have differentiable=True: clipping writes to the gradients in place")


def _instead_of(thing: Any) -> str:
    """What to write, where it can be guessed what somebody meant by what is no optimizer."""
    if isinstance(thing, Mapping) and "params" in thing:
        return (
            ": it is a param group. A function that makes an optimizer of the class of others, such as torchrl's "
            "group_optimizers, is to be called first: ZClipOptimizer(group_optimizers(first, second)); or pass a list, "
            "ZClipOptimizer([first, second])"
        )
    if isinstance(thing, (Tensor, Module, Iterator)):
        or_not = "; or clip without a wrapper, clipper = zclip_optim.ZClip(), then clipper.step(model)"
        return (
            f": write ZClipOptimizer(torch.optim.AdamW(model.parameters(), lr=...)){or_not * isinstance(thing, Module)}"
        )
    return ""


def _why_not(optimizer: Any, wrapper: type) -> str | None:
    """What keeps this optimizer from being wrapped, and what to do instead; None if nothing does."""
    bases = type(optimizer).__mro__
    for foreign in FOREIGN:
        if any(cls.__name__ == foreign.name and _package(cls) in foreign.packages for cls in bases):
            return f"{foreign.what}, so that the norm of the gradients cannot be measured before. {foreign.instead}"
    if isinstance(optimizer, wrapper):
        return "a ZClipOptimizer already; wrapping it again would clip twice"
    if hasattr(type(optimizer), "skip_synchronize"):
        return (
            "Horovod's, which waits for the gradients of the other ranks in its step() only. Clip in the loop: "
            "optimizer.synchronize(), then zclip_optim.ZClip().step(model), then the step in skip_synchronize()"
        )
    for name, value in attributes_of(optimizer).items():
        if _is_active_scaler(value):
            return (
                f"an optimizer with a loss scaler of its own, {name}: its step() {LATE}. Use torch.amp.GradScaler "
                "around it: scaler.step(ZClipOptimizer(optimizer))"
            )
    return None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _is_active_scaler(value: Any) -> bool:
    """Whether it is a GradScaler, a DynamicLossScaler or another one, and switched on."""
    if not any(cls.__name__.endswith("Scaler") for cls in type(value).__mro__):
        return False
    is_enabled = getattr(value, "is_enabled", None)
    return bool(is_enabled()) if callable(is_enabled) else True


def refuse_unexpected(taker: str, names: Iterable[str], known: Collection[str], else_say: str | None = None) -> None:
    """Raise TypeError for keyword arguments that `taker` does not take: what was meant, if that can be guessed."""
    for name in names:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75) or [k for k in known if k.startswith(name)]
        guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else None
        hint = guess or else_say or f": it has {', '.join(known)}"
        raise TypeError(f"{taker} got an unexpected keyword argument {name!r}{hint}")


def refuse_inner_arguments(base: Any, more: Collection[Any], names: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for arguments of a ZClipOptimizer that the optimizer in it should have got, named or not."""
    if isinstance(base, type):
        raise _class_given(base, ", ".join(f"{name}=..." for name in names))
    if more:
        raise TypeError(
            f"ZClipOptimizer got {1 + len(more)} arguments without a name: it takes one, an optimizer or a list of "
            "them, ZClipOptimizer([first, second]). Options have names: z_thresh=3.0"
        )
    refuse_unexpected("ZClipOptimizer", names, known, CLASS_ASKED_FOR)


def _class_given(cls: type, inner: str = "") -> TypeError:
    return TypeError(
        f"base_optimizer must be an optimizer instance, got the class {cls.__name__}; "
        f"write ZClipOptimizer({cls.__name__}(model.parameters(), {inner or '...'}))"
    )


def refuse_unclipped_update(name: str, value: Any) -> None:
    """Refuse a method that updates parameters and is not step().

    Raises:
        AttributeError: it is one; so code that asks with `hasattr` goes on with step().
    """
    if name in UPDATES and inspect.ismethod(value):
        raise AttributeError(
            f"{name} of {type(value.__self__).__name__} updates parameters without step(), where nothing would be "
            f"clipped: use step(), or base_optimizer.{name} to go without clipping"
        )


def refuse_unknown_shards(param_groups: Iterable[Mapping[str, Any]], process_groups: ShardGroups) -> None:
    """Refuse shards of parameters if nothing is known about the other ones: the norm would be wrong.

    Raises:
        ValueError: there are parameters of FSDP1, and no process group was given; or, in a distributed run, experts
            (plain tensors with `allreduce` False, as Megatron and DeepSpeed mark them) that no mapping covers, and
            process_group is not ().
    """
    for group in param_groups if process_groups.of_all != () else ():
        # One look at the attributes of each parameter, in a pass that every step of a distributed run takes.
        marked = [
            p for p in group["params"] if (own := p.__dict__) and ("_fsdp_flattened" in own or "allreduce" in own)
        ]
        known = process_groups.of_each(group) if marked else {}
        _refuse_unknown_shards([p for p in marked if p not in known], process_groups)


def _refuse_unknown_shards(marked: list[Tensor], process_groups: ShardGroups) -> None:
    if process_groups.of_all is None and any(getattr(p, "_fsdp_flattened", False) for p in marked):
        raise ValueError(
            "these are FSDP's shards of parameters: pass process_group=model.process_group so that the norm covers "
            "all of them (process_group=() for ShardingStrategy.NO_SHARD)"
        )
    experts = [p for p in marked if getattr(p, "allreduce", None) is False and not is_on_mesh(p)]
    if experts and in_use() and dist.get_world_size() > 1:
        raise ValueError(
            f"a parameter of shape {tuple(experts[0].shape)} has allreduce=False, the mark of an expert, and "
            "process_group does not say which ranks hold the other ones: pass process_group={group: parameters}, the "
            "experts and the group of ranks over which they are distributed (process_group=() if every rank holds all "
            "of them)"
        )


def refuse_parameters_of_others(groups: ShardGroups, params: Iterable[Tensor]) -> None:
    """Refuse a mapping with parameters that are not among these: nothing would be summed over their groups.

    Raises:
        ValueError: there is such a parameter, and it requires gradients.
    """
    held = set(params) if groups.of_some else set()
    others = [p for p in groups.of_some if p.requires_grad and p not in held]
    if others:
        raise ValueError(
            f"process_group maps {len(others)} of {len(groups.of_some)} parameters, one of shape "
            f"{tuple(others[0].shape)}, that are not among those to be clipped: of another model, or replaced since? "
            "Pass the parameters that the optimizer holds"
        )


def refuse_foreign_gradients(base_optimizer: object, params: Iterable[Tensor]) -> None:
    """Refuse what keeps its gradients elsewhere than in `p.grad`, where no wrapper sees them.

    Raises:
        ValueError: an optimizer or parameters of DeepSpeed ZeRO or Megatron.
    """
    package, _, module = type(base_optimizer).__module__.partition(".")
    params = list(params)
    if (package == "deepspeed" and not module.startswith("ops.")) or any(hasattr(p, "ds_id") for p in params):
        owner, instead = "DeepSpeed ZeRO", ON_DEEPSPEED
    elif package == "megatron" or any(hasattr(p, "main_grad") for p in params):
        owner, instead = "Megatron", "zclip_optim.integrations.megatron.attach(optimizer)"
    else:
        return
    raise ValueError(f"{owner} {NOT_SEEN}: use {instead} with the optimizer unwrapped")


def most_dimensions(params: Iterable[Tensor]) -> int:
    """The dimensions of the parameter that has the most; 0 for those of lazy modules, which have none yet."""
    return max((0 if is_lazy(p) else p.dim() for p in params), default=0)


def refuse_flat_shards(params: Iterable[Tensor], dimensions: int) -> None:
    """Refuse what DeepSpeed has put into an optimizer in place of the parameters that it was made with.

    Args:
        params: of the optimizer at its first step.
        dimensions: `most_dimensions` of those that it was made with.

    Raises:
        ValueError: DeepSpeed is loaded, and there are flat parameters only where there were others.
    """
    if "deepspeed" in sys.modules and most_dimensions(params) == 1 < dimensions:
        raise ValueError(
            f"DeepSpeed has replaced the parameters by flat shards and {NOT_SEEN}. Hand deepspeed.initialize the "
            f"optimizer without ZClipOptimizer, then call {ON_DEEPSPEED}"
        )


def refuse_unmeasurable(param_groups: ParamGroups, error: Exception) -> None:
    """Name the gradient that torch cannot measure, if that is why measuring failed.

    Raises:
        TypeError: there is such a gradient.
    """
    for name, _, gradient in named_gradients(param_groups):
        if is_ordinary(gradient) and type(gradient) is Tensor:
            continue
        try:
            gradient_norm([gradient])
        except (RuntimeError, TypeError):
            raise TypeError(
                f"the norm of the gradient of {name} cannot be measured: a {type(gradient).__name__} of layout "
                f"{gradient.layout} and dtype {gradient.dtype} ({error})"
            ) from error


def refuse_meta(device: torch.device | None) -> None:
    """Refuse to read from a device where nothing has a value.

    Raises:
        RuntimeError: it is the meta device.
    """
    if device is not None and device.type == "meta":
        raise RuntimeError(
            "the parameters are on the meta device, where they and their gradients have no values. Give the model its "
            "values (to_empty, load_state_dict), then make the optimizer and wrap it: to_empty makes new parameters"
        )


def refuse_to_look(is_captured: bool) -> None:
    """Refuse to read whether a step is to be skipped while it is captured in a CUDA graph.

    Raises:
        RuntimeError: it is.
    """
    if is_captured:
        raise RuntimeError(
            "a step that is captured in a CUDA graph cannot look whether it is to be skipped: use nonfinite='pass' "
            "without z_skip, or a fused optimizer, which skips by itself (fused=True of Adam, AdamW, Adagrad, or SGD "
            "without momentum; with nonfinite='skip', scope='global' and max_consecutive_nonfinite=None)"
        )


def refuse_to_read(is_captured: bool) -> None:
    """Refuse to read statistics while a CUDA graph is captured.

    Raises:
        RuntimeError: it is.
    """
    if is_captured:
        raise RuntimeError(
            "the statistics cannot be read while a CUDA graph is captured: capture the step of a ZClipOptimizer, or "
            "ZClip.decide(), and leave what reads, as ZClip.step(), metrics and state_dict() do, for after it"
        )


def refuse_unless_count(name: str, value: Any) -> None:
    """Raise ValueError for an argument that is neither None nor an integer >= 1."""
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1):
        raise ValueError(f"{name} must be an integer >= 1 or None, got {value!r}")
