"""What the fused optimizers share: buckets, AMP, clipping, the guard against non-finite gradients, DTensor.

A step sorts the parameters that have a gradient into buckets (one device, one dtype per role, one set of
state tensors), keeps that plan for as long as nothing it rests on has changed, measures the gradients where
clipping or the guard asks for it, and hands each bucket to one launch. Nothing here waits for the device,
save where ``on_nonfinite="raise"`` must and where torch's own loop serves (sparse, complex, differentiable).
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import unwrap
from itertools import chain
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import profiler
from torch.optim.optimizer import (
    _device_dtype_check_for_fused,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .buckets import UNGUARDED, Guard
from .launching import Entry, Part, measure, norm_table, sort_into_parts, update
from .optimizer_operators import optimizer_norm, optimizer_step

ON_NONFINITE = ("ignore", "skip", "raise")
_OWN = (Tensor, torch.nn.Parameter)
LOW_PRECISION = (torch.bfloat16, torch.float16)


class _Shared:
    """What a deep copy of the optimizer shares with the original: a process group cannot be copied."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self


@dataclass
class _Plan:
    """The buckets, and everything that must be found unchanged for them to serve another step."""

    params: list[Tensor]
    missing: list[bool]
    kinds: list[Any]
    layouts: list[Any]
    stepped: list[Tensor]
    forms: list[Any]
    values: list[Any]
    tensors: list[Tensor]
    addresses: list[int]
    parts: list[Part]
    delegated: list[tuple[int, Tensor]]
    wrapped: bool
    inference: bool = False

    def gradients(
        self, params: list[Tensor], grads: list[Tensor | None], kinds: list[Any], state: dict[Tensor, Any]
    ) -> list[Tensor] | None:
        """The local gradients in the plan's order, or None if the plan no longer fits."""
        if (
            self.delegated
            or self.inference != torch.is_inference_mode_enabled()  # where else may its memory be written?
            or len(params) != len(self.params)
            or not all(map(is_, params, self.params))
            or [grad is None for grad in grads] != self.missing
            or kinds != self.kinds
            or not _same(_values(state), self.values)
            or list(map(Tensor.data_ptr, self.tensors)) != self.addresses
            or _forms(self.stepped) != self.forms
        ):
            return None
        live: Any = [grad for grad in grads if grad is not None] if True in self.missing else grads
        if self.wrapped:
            owners = [param for param, none in zip(params, self.missing, strict=True) if not none]
            live = [_local_grad(grad, param) for grad, param in zip(live, owners, strict=True)]
        return live if _layouts(live) == self.layouts else None


class FusedStep(torch.optim.Optimizer):
    """``step`` for torch.optim's classes in one launch per bucket; see FusedSGD, FusedAdam and FusedAdamW."""

    _operator: ClassVar[str]
    _state_keys: ClassVar[tuple[str, ...]]

    def _set_options(
        self,
        *,
        max_norm: float | None,
        on_nonfinite: str,
        master_weights: bool,
        stochastic_rounding: bool,
        seed: int,
        norm_group: Any,
    ) -> None:
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"Invalid max_norm value: {max_norm}")
        if on_nonfinite not in ON_NONFINITE:
            expected = ", ".join(map(repr, ON_NONFINITE))
            raise ValueError(f"Invalid on_nonfinite value: {on_nonfinite!r}; expected one of {expected}")
        if master_weights and stochastic_rounding:
            raise ValueError("master_weights and stochastic_rounding exclude each other: pass one of them")
        self.max_norm = max_norm
        self.on_nonfinite = on_nonfinite
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self._norm_group = _Shared(norm_group)
        self._counts: dict[Tensor, dict[str, Tensor]] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._captured: list[_Plan] = []
        self._loading: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._plan: _Plan | None = None
        self._norms: Tensor | None = None
        self._row: Tensor | None = None

    # What each class adds.

    def _kind(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What in the group's options decides which tensors take part."""
        raise NotImplementedError

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """The state tensors that take part in the update of ``param``; they are made at its first step."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> Any:
        """The group's options as the launcher takes them."""
        raise NotImplementedError

    def _torch_step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Torch's own loop over sparse, complex or differentiable updates."""
        raise NotImplementedError

    def _capturable(self) -> bool:
        """Whether a CUDA graph may capture the step."""
        return all(group["capturable"] for group in self.param_groups)

    def _has_master(self, param: Tensor) -> bool:
        return self.master_weights and param.dtype in LOW_PRECISION and not _is_wrapper(_local(param))

    def _seed_of(self, param: Tensor) -> int | None:
        """The seed with which the values of ``param`` are rounded, None to round to nearest."""
        if self.stochastic_rounding and param.dtype == torch.float16:
            raise ValueError("stochastic_rounding is for bfloat16 parameters; found one of float16")
        if not self.stochastic_rounding or param.dtype != torch.bfloat16:
            return None
        return (self.seed + 2**63) % 2**64 - 2**63  # what an operator's int holds

    def _with_master(self, param: Tensor, state: dict[str, Tensor], moments: list[str]) -> dict[str, Tensor]:
        """The moments; beside a 16-bit parameter that has a master, the master too, and all in float32."""
        if self._has_master(param):
            for key in moments:
                state[key] = state[key].to(torch.float32)
            if "master_param" not in state:
                state["master_param"] = param.detach().to(torch.float32)
            moments = [*moments, "master_param"]
        return {key: state[key] for key in moments}

    # Public.

    @property
    def norm_group(self) -> Any:
        """The process group of norm and guard, besides the meshes of DTensors; or None."""
        return self._norm_group.value

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last step's gradients, unscaled and not clipped: 0-d, on their device.

        None before the first step, and where neither ``max_norm`` nor ``on_nonfinite`` asks for it.
        """
        if self._norms is None or not self._measures():
            return None
        doubles = any(p.dtype == torch.float64 for group in self.param_groups for p in group["params"])
        return self._norms[:, 0].sum().sqrt().to(torch.float64 if doubles else torch.float32)

    @property
    def steps_skipped(self) -> int:
        """How many steps the guard has skipped, or, with ``fused=True``, GradScaler. Reading it waits for the device.

        Otherwise GradScaler calls ``step`` only where it found no overflow.
        """
        return sum(int(count.item()) for count in self._skipped.values())

    def __repr__(self) -> str:
        own = ("max_norm", "on_nonfinite", "master_weights", "stochastic_rounding", "seed")
        lines = "".join(f"    {name}: {getattr(self, name)}\n" for name in own)
        return f"{super().__repr__()[:-1]}\nAll parameter groups\n{lines})"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            FloatingPointError: ``on_nonfinite="raise"`` and a gradient is not finite; nothing has changed.
        """
        if (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.compiler.is_compiling()
        ):
            if not torch.compiler.is_compiling() and unwrap(type(self).step) is not FusedStep.step:
                return self._step(closure)  # a subclass's own step, which torch has wrapped, runs the hooks
            return self._hooked_step() if closure is None else self._hooked_step(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch adds nothing, which would take longer than a small step

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                if not self._update_by_operators(compiling=True):
                    self._update_untraced()
            return loss
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(
            self.defaults["differentiable"]
        )  # a context manager would take twice as long
        try:
            self._update()
        finally:
            torch._C._set_grad_enabled(before)
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)

    # Copies and checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_norm", "on_nonfinite", "master_weights", "stochastic_rounding", "seed", "_norm_group")
        own = {name: getattr(self, name) for name in (*names, "_counts", "_skipped")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._counts = {}  # of the state that is being replaced, unless it brings its own
        super().__setstate__(state)
        if self.defaults["fused"]:  # as torch's constructor; torch's own copies lose it
            self._step_supports_amp_scaling = True
        self._forget()
        self.__dict__.setdefault("_captured", [])
        self.__dict__.setdefault("_loading", None)
        for param, values in self.state.items():
            step = values.get("step") if isinstance(values, dict) else None
            if isinstance(step, Tensor):
                values["step"] = step.to(param.device).resolve_neg()
        if self._loading is not None:
            self._keep_wide(self._loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's, as torch.optim does.

        Torch casts every state to the parameter's dtype; float32 states beside a master weight keep theirs.
        """

        def remember(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            self._loading = (
                given  # after the user's own pre hooks; __setstate__ is called before the post hooks
            )

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def _keep_wide(self, given: dict[str, Any]) -> None:
        """Undo torch's cast of the checkpoint's states beside parameters that have masters."""
        names = [name for group in given["param_groups"] for name in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for name, param in zip(names, params, strict=True):
            if self._has_master(param):
                for key, value in given["state"].get(name, {}).items():
                    if key in self._state_keys and key != "step":
                        self.state[param][key] = value.to(device=param.device, dtype=torch.float32)

    # One step.

    def _init_group(self, *args: Any, **kwargs: Any) -> bool:
        """Fill the lists with the group's parameters of one dtype that have a gradient, for the traced step.

        Dynamo knows the method of this name: it runs it as it is, and takes the tensors for inputs of the graph.

        Args:
            args: the group, the dtype, whether the records are the optimizer's own, then empty lists: parameters,
                gradients, positions in the optimizer, records (count of skipped steps, norms), state keys, and
                state tensors key by key.

        Returns:
            Whether the operators can serve the group: no DTensors and nothing for torch's loop.
        """
        group, dtype, lasting, params, grads, positions, records, keys, states = args
        everything = chain.from_iterable(other["params"] for other in self.param_groups)
        own = set(map(id, group["params"]))
        wanted = [
            (position, param, param.grad)
            for position, param in enumerate(everything)
            if id(param) in own and param.grad is not None and param.dtype == dtype
        ]
        plain = all(_local(p) is p and not self._needs_torch(group, p, grad) for _, p, grad in wanted)
        plain = plain and len(own) == len(group["params"])  # an operator may not write to one tensor twice
        if not plain:
            return False
        columns = [self._state_of(group, param) for _, param, _ in wanted]
        positions += [position for position, _, _ in wanted]
        params += [param for _, param, _ in wanted]
        grads += [grad for _, _, grad in wanted]
        keys += list(columns[0]) if columns else []
        states += [column[key] for key in keys for column in columns]
        for _, param, _ in wanted[:1]:
            if lasting:
                records += [self._skip_count(param.device), self._lasting_norms(param.device)]
            else:
                records += [param.new_zeros(1, dtype=torch.int64), param.new_zeros(1, 2, dtype=torch.float64)]
        return True

    def _update_by_operators(self, compiling: bool) -> bool:
        """The step as one operator per group and dtype: for graphs, and for tensors that hold no values.

        Returns:
            Whether the operators could serve; if not, nothing was done. A process group cannot be captured, nor
            can an exception be raised in the middle of a graph.
        """
        if self.norm_group is not None or (compiling and self.on_nonfinite == "raise"):
            return False
        scale = _resolved(getattr(self, "grad_scale", None))
        found_inf = _resolved(getattr(self, "found_inf", None))
        calls = []
        every_grad: list[Tensor] = []
        for group in self.param_groups:
            for dtype in {param.dtype: None for param in group["params"]}:
                params: list[Tensor] = []
                grads: list[Tensor] = []
                positions: list[int] = []
                records: list[Tensor] = []
                keys: list[str] = []
                states: list[Tensor] = []
                lists = (params, grads, positions, records, keys, states)
                if not self._init_group(group, dtype, compiling, *lists):
                    return False
                if params:
                    calls.append((group, dtype, params, grads, positions, records, keys, states))
                    every_grad += grads
        norms = None
        if self._measures() and calls:
            norms = calls[0][5][1]
            optimizer_norm(every_grad, scale, norms)
            if not compiling:
                self._norms = norms
        counting = found_inf is not None or self.on_nonfinite != "ignore"
        for group, _, params, grads, positions, records, keys, states in calls:
            options = list(self._options(group))
            columns = [i for i, value in enumerate(options) if isinstance(value, Tensor)]
            optimizer_step(
                self._operator,
                keys,
                params,
                grads,
                states,
                positions,
                self._seed_of(params[0]),
                [0.0 if isinstance(value, Tensor) else float(value) for value in options],
                [options[i] for i in columns],
                columns,
                scale,
                found_inf,
                norms,
                self.max_norm,
                self.on_nonfinite != "ignore",
                records[0] if counting else None,
            )
            counting = False
        return True

    @torch._disable_dynamo
    def _update_untraced(self) -> None:
        self._update()

    def _update(self) -> None:
        groups = self.param_groups
        params = list(chain.from_iterable([group["params"] for group in groups]))
        grads = [param.grad for param in params]
        kinds = [self._kind(group) for group in groups]
        capturing = _capturing()
        if capturing:
            self._refuse_capture(params)
        local = None
        if self._plan is not None and not capturing and not _tracing():
            local = self._plan.gradients(params, grads, kinds, self.state)
        if local is None:
            if _valueless(params) and self._update_by_operators(compiling=False):
                return
            with torch.inference_mode(False):  # state and records outlive an inference_mode around this step
                plan, local = self._make_plan(params, grads, kinds)
                if capturing:
                    self._captured.append(plan)  # the graph reads its tables for as long as it lives
                else:
                    self._plan = plan
                    for part in plan.parts:
                        # Here, since a graph that made the counter would zero it at each replay.
                        self._skip_count(part.bucket.params[0].device)
            plan.inference = torch.is_inference_mode_enabled()
        else:
            assert self._plan is not None
            plan = self._plan
        try:
            for part in plan.parts:
                part.bucket.grads = local if len(plan.parts) == 1 else [local[slot] for slot in part.slots]
            self._launch(plan)
        finally:
            for part in plan.parts:
                part.bucket.grads = []  # a plan that kept gradients would keep their memory

    def _launch(self, plan: _Plan) -> None:
        scale = _resolved(getattr(self, "grad_scale", None))
        found_inf = _resolved(getattr(self, "found_inf", None))
        options = [self._options(group) for group in self.param_groups]
        if scale is None and found_inf is None and not self._measures():
            update(self._operator, plan.parts, options, UNGUARDED)
            if plan.delegated:
                self._delegate(plan, UNGUARDED)
            return
        home = next((_local(param).device for param in plan.params), torch.device("cpu"))
        norms = None
        if self._measures():
            extra = [_torch_norm(param, scale) for _, param in plan.delegated]
            norms = self._norms = measure(plan.parts, scale, home, extra, self.norm_group)
            if self._row is not None:
                self._norms = self._row.copy_(norms.sum(0, keepdim=True))
            if self.on_nonfinite == "raise" and found_inf is None:
                self._raise_if_nonfinite(norms)
        guard = Guard(scale, found_inf, norms, self.max_norm, self.on_nonfinite != "ignore")
        if found_inf is not None or guard.skip_nonfinite:
            device = plan.parts[0].bucket.params[0].device if plan.parts else home
            guard = guard._replace(skipped=self._skip_count(device))
        update(self._operator, plan.parts, options, guard)
        if plan.delegated:
            self._delegate(plan, guard._replace(skipped=None) if plan.parts else guard)

    def _lasting_norms(self, device: torch.device) -> Tensor:
        """The tensor that graphs write their measurements to; from then on the eager step does so too."""
        if self._row is None:
            self._norms = self._row = torch.zeros_like(norm_table(1, device))
        return self._row

    def _measures(self) -> bool:
        return self.max_norm is not None or self.on_nonfinite != "ignore"

    def _skip_count(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._skipped[device]

    def _raise_if_nonfinite(self, norms: Tensor) -> None:
        if not norms[:, 1].sum().item():
            return
        names = []
        for g, group in enumerate(self.param_groups):
            given = group.get("param_names")
            for i, param in enumerate(group["params"]):
                if param.grad is not None and not _dense_values(param).isfinite().all():
                    names.append(
                        given[i] if given else f"parameter {i} of group {g}, shape {tuple(param.shape)}"
                    )
        where = "; ".join(names) or "none on this rank"
        raise FloatingPointError(f"non-finite gradients: {where}. Nothing was updated.")

    def _delegate(self, plan: _Plan, guard: Guard) -> None:
        """Unscale, clip and skip as the launches do, then let torch's own loop update."""
        skip = guard.found_inf is not None and bool(guard.found_inf.item())
        if guard.norms is not None:
            squares, nonfinite = guard.norms.sum(0)
            skip = skip or (guard.skip_nonfinite and bool(nonfinite.item()))
        if skip:
            if guard.skipped is not None:
                guard.skipped.add_(1)
            return
        for g, group in enumerate(self.param_groups):
            chosen = [param for owner, param in plan.delegated if owner == g]
            grads = [param.grad for param in chosen if param.grad is not None]
            if guard.grad_scale is not None:
                for grad in grads:
                    grad.div_(guard.grad_scale.to(grad.device))
            if guard.max_norm is not None:
                clip = (guard.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
                wide = [torch.promote_types(grad.dtype.to_real(), torch.float32) for grad in grads]
                grads = [grad * clip.to(grad.device, dtype) for grad, dtype in zip(grads, wide, strict=True)]
            if chosen:
                self._torch_step(group, chosen, grads)

    # Plans.

    def _make_plan(
        self, params: list[Tensor], grads: list[Tensor | None], kinds: list[Any]
    ) -> tuple[_Plan, list[Tensor]]:
        owners = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        entries: list[Entry] = []
        delegated: list[tuple[int, Tensor]] = []
        for index, (param, grad, g) in enumerate(zip(params, grads, owners, strict=True)):
            if grad is None:
                continue
            group = self.param_groups[g]
            if self._needs_torch(group, param, grad):
                delegated.append((g, param))
                continue
            state = {key: _local(value) for key, value in self._state_of(group, param).items()}
            seed = self._seed_of(param)
            entries.append(
                Entry(g, index, _local(param), _local_grad(grad, param), state, seed, _shards(param))
            )
        parts = sort_into_parts(entries)
        live = [entry.grad for entry in entries]
        stepped = [entry.param for entry in entries]
        tensors = [tensor for entry in entries for tensor in (entry.param, *entry.state.values())]
        plan = _Plan(
            params=params,
            missing=[grad is None for grad in grads],
            kinds=kinds,
            layouts=_layouts(live),
            stepped=stepped,
            forms=_forms(stepped),
            values=_values(self.state),
            tensors=tensors,
            addresses=list(map(Tensor.data_ptr, tensors)),
            parts=parts,
            delegated=delegated,
            wrapped=any(_local(param) is not param for param in params),
        )
        return plan, live

    def _needs_torch(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> bool:
        """Whether torch's own loop serves this parameter; ``fused=True`` refuses what torch's refuses."""
        plain = (
            param.is_floating_point()
            and grad.layout == torch.strided
            and not group["differentiable"]
            and not _is_wrapper(_local(param))
            and not _is_wrapper(grad)
        )
        if not plain and group["fused"]:
            _device_dtype_check_for_fused(param)
            if grad.is_sparse:
                raise RuntimeError(f"`_fused_{self._operator}` does not support sparse gradients")
        return not plain

    def _refuse_capture(self, params: list[Tensor]) -> None:
        """Refuse what a CUDA graph would replay wrongly."""
        attempt = f"Attempting CUDA graph capture of step() for an instance of {type(self).__name__} but "
        if not self._capturable():
            raise RuntimeError(attempt + "param_groups' capturable is False.")
        if self.on_nonfinite == "raise":
            raise RuntimeError(attempt + "on_nonfinite='raise' must read the gradients on the host.")
        plan = self._plan
        stepped = (
            set()
            if plan is None
            else {id(p) for p, none in zip(plan.params, plan.missing, strict=True) if not none}
        )
        for i, param in enumerate(params):
            if param.requires_grad and param.grad is None:
                raise RuntimeError(
                    attempt + f"parameter {i} has no gradient: no replay would ever update it."
                )
            if param.grad is not None and id(param) not in stepped:
                raise RuntimeError(
                    attempt + f"parameter {i} has made no step yet: run one before the capture."
                )


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))


def _values(state: dict[Any, Any]) -> list[Any]:
    try:
        return list(chain.from_iterable(map(dict.values, state.values())))
    except TypeError:  # torch lets a user keep values of the whole optimizer there too
        return list(
            chain.from_iterable(entry.values() for entry in state.values() if isinstance(entry, dict))
        )


def _layouts(tensors: list[Tensor]) -> list[Any]:
    """The dtypes, and what an address does not say either: strides and negative bits, unless none stands out."""
    dtypes: list[Any] = [tensor.dtype for tensor in tensors]
    if all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors)):
        return dtypes
    return dtypes + [(tensor.stride(), tensor.is_neg()) for tensor in tensors]


def _forms(params: list[Tensor]) -> list[Any]:
    """The sizes, and shapes and strides unless all are contiguous: ``.data`` may be another view of its memory."""
    sizes: list[Any] = list(map(Tensor.numel, params))
    if all(map(Tensor.is_contiguous, params)):
        return sizes
    return sizes + [(param.shape, param.stride()) for param in params]


def _resolved(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its negative bit, if it has one, carried out in memory."""
    return None if tensor is None else tensor.resolve_neg()


def _local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def _local_grad(grad: Any, param: Any) -> Tensor:
    """The local part of a gradient, sharded as its parameter is."""
    if not hasattr(grad, "_local_tensor"):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    local = grad._local_tensor
    return local.wait() if hasattr(local, "wait") else local


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a subclass keeps the values in other tensors (torchao's quantized weights): only torch's ops know how."""
    return (
        type(tensor) not in _OWN
        and is_traceable_wrapper_subclass(tensor)
        and not hasattr(tensor, "_local_tensor")
    )


def _shards(param: Any) -> tuple[Any, ...]:
    """The process groups over which a DTensor is sharded: summing over them counts each element once."""
    if not hasattr(param, "_local_tensor"):
        return ()
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dim) for dim, place in enumerate(param.placements) if not place.is_replicate()
    )


def _dense_values(param: Tensor) -> Tensor:
    """The gradient's stored elements, on this rank, as real numbers."""
    grad = _local(param.grad)  # type: ignore[arg-type]
    if grad.is_sparse:
        grad = grad.coalesce()._values()
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _torch_norm(param: Tensor, scale: Tensor | None) -> Tensor:
    values = _dense_values(param).double()
    if scale is not None:
        values = values / scale
    return torch.stack([values.square().sum(), (~values.isfinite()).sum()])


def _tracing() -> bool:
    """Whether make_fx, FakeTensorMode or functionalization sees each operation."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None
        for key in torch._C._TorchDispatchModeKey.__members__.values()
    )


def _valueless(params: list[Tensor]) -> bool:
    """Whether a step over these is traced, or has no values to compute with: fake and meta tensors."""
    return _tracing() or any(param.is_meta or isinstance(param, FakeTensor) for param in params)


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
