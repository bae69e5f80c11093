"""torch.optim's side of the fused optimizers: hooks, state, checkpoints, AMP, what is refused.

Three ways lead through a step, all from ``FusedStep._step``:

* ``_step_by_launches``, the usual one: fit or make a plan (plan.py), measure the gradients where clipping or the guard
  asks for it, one launch per part of the plan.
* ``_step_by_operators``, while torch.compile or make_fx traces, and over tensors without values: one operator per group
  and dtype (compiled.py) stands for the launches.
* ``_step_by_torch``, for the parameters that only torch's own loop serves: sparse, complex, differentiable, quantized.

Over 500 lines, since torch.optim's protocol is one class. Nothing here waits for the device, save where
``on_nonfinite="raise"`` must and in torch's own loop.
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import profiler
from torch.optim.optimizer import (
    _device_dtype_check_for_fused,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from ..backends import capturing
from ..fallback.multi_tensor import decide_by_tensors
from ..torch_private import operations_are_traced
from .bucket import UNGUARDED, Guard
from .compiled import optimizer_norm, optimizer_step
from .plan import (
    Entry,
    Plan,
    is_wrapper,
    local_gradient,
    local_part,
    measure_gradients,
    norm_dtype,
    shards_of,
    update_parameters,
)
from .stacked import StackedStep, nonfinite_models, spread_step

ON_NONFINITE = ("ignore", "skip", "raise")
LOW_PRECISION = (torch.bfloat16, torch.float16)


class SharedOptions(TypedDict, total=False):
    """The keyword arguments that the three optimizers share; the defaults stand in ``FusedStep._set_options``."""

    max_norm: float | None
    on_nonfinite: str
    master_weights: bool
    stochastic_rounding: bool
    seed: int
    norm_group: Any
    stacked: bool
    lr_scale: Tensor | None


class _Call(NamedTuple):
    """The arguments of one operator: a group's parameters of one dtype."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    positions: list[int]
    records: list[Tensor]  # count of skipped steps, norms
    keys: list[str]
    states: list[Tensor]


class FusedStep(StackedStep, torch.optim.Optimizer):
    """``step`` for torch.optim's classes in one launch per bucket; see FusedSGD, FusedAdam and FusedAdamW."""

    _operator: ClassVar[str]
    _state_keys: ClassVar[tuple[str, ...]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the shared options in the signature of a class whose ``__init__`` hands them on as ``**shared``."""
        super().__init_subclass__(**kwargs)
        if "__init__" not in vars(cls):
            return
        _, *shared, _ = inspect.signature(cls._set_options).parameters.values()
        _, *own = inspect.signature(cls.__init__).parameters.values()
        parameters = [p for given in own for p in (shared if given.name == "shared" else [given])]
        cls.__signature__ = inspect.Signature(parameters)

    def _set_options(
        self,
        *,
        max_norm: float | None = None,
        on_nonfinite: str = "ignore",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        norm_group: Any = None,
        stacked: bool = False,
        lr_scale: Tensor | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:  # as Python says it of torch's constructors
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"Invalid max_norm value: {max_norm}")
        if on_nonfinite not in ON_NONFINITE:
            expected = ", ".join(map(repr, ON_NONFINITE))
            raise ValueError(f"Invalid on_nonfinite value: {on_nonfinite!r}; expected one of {expected}")
        if master_weights and stochastic_rounding:
            raise ValueError("master_weights and stochastic_rounding exclude each other: pass one of them")
        if stacked and norm_group is not None:
            raise ValueError("norm_group is not for stacked=True, where each model has a norm of its own")
        self.max_norm = max_norm
        self.on_nonfinite = on_nonfinite
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self.norm_group = norm_group
        self.lr_scale = lr_scale
        self.active = None
        self._counts: dict[Tensor, dict[str, Tensor]] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._captured: list[Plan] = []
        self._loading: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._plan: Plan | None = None
        self._norms: Tensor | None = None
        self._row: Tensor | None = None
        self._rounds: Any = None

    # What each class adds.

    def _kind(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return the options of the group that decide which tensors take part in the step."""
        raise NotImplementedError

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """Return the state tensors that take part in the update of ``param``; they are made at its first step."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> Any:
        """Return the group's options as the launcher takes them."""
        raise NotImplementedError

    def _torch_update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Run torch's own loop over sparse, complex or differentiable updates."""
        raise NotImplementedError

    def _capturable(self) -> bool:
        """Return whether a CUDA graph may capture the step."""
        return all(group["capturable"] for group in self.param_groups)

    def _has_master(self, param: Tensor) -> bool:
        return self.master_weights and param.dtype in LOW_PRECISION and not is_wrapper(local_part(param))

    def _seed_of(self, param: Tensor) -> int | None:
        """Return the seed with which the values of ``param`` are rounded, None to round to nearest."""
        if self.stochastic_rounding and param.dtype == torch.float16:
            raise ValueError("stochastic_rounding is for bfloat16 parameters; found one of float16")
        if not self.stochastic_rounding or param.dtype != torch.bfloat16:
            return None
        return (self.seed + 2**63) % 2**64 - 2**63  # what an operator's int holds

    def _with_master(self, param: Tensor, state: dict[str, Tensor], moments: list[str]) -> dict[str, Tensor]:
        """Return the moments; beside a 16-bit parameter that has a master, the master too, and all in float32."""
        if self._has_master(param):
            for key in moments:
                state[key] = state[key].to(torch.float32)
            if "master_param" not in state:
                state["master_param"] = param.detach().to(torch.float32)
            moments = [*moments, "master_param"]
        return {key: state[key] for key in moments}

    # Public.

    @property
    def grad_norm(self) -> Tensor | None:
        """Return the global norm of the last step's gradients, unscaled and not clipped: 0-d, on their device.

        With ``stacked=True`` (B,): each model's norm, nan for a model that is not active. None before the first step,
        and where neither ``max_norm`` nor ``on_nonfinite`` asks for it.
        """
        if self._norms is None or not self._measures():
            return None
        doubles = (torch.float64, torch.complex128)
        wide = any(p.dtype in doubles for group in self.param_groups for p in group["params"])
        return self._norms[:, 0].sum(0).sqrt().to(torch.float64 if wide else torch.float32)

    @property
    def steps_skipped(self) -> int | Tensor:
        """Return how many steps the guard has skipped, or, with ``fused=True``, GradScaler. It waits for the device.

        Otherwise GradScaler calls ``step`` only where it found no overflow. With ``stacked=True`` each model has its
        own count: an int64 tensor (B,) on the parameters' device, which waits for nothing.
        """
        if self.stacked:
            if self._models is None:  # there are no parameters yet
                return torch.zeros(0, dtype=torch.int64)
            return self._skip_count(self._home()).clone()
        return sum(int(count.item()) for count in self._skipped.values())

    def __repr__(self) -> str:
        own = ("max_norm", "on_nonfinite", "master_weights", "stochastic_rounding", "seed", "stacked")
        lines = "".join(f"    {name}: {getattr(self, name)}\n" for name in own)
        return f"{super().__repr__()[:-1]}\nAll parameter groups\n{lines})"

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Update every parameter that has a gradient; hooks see the arguments as the caller wrote them.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            FloatingPointError: ``on_nonfinite="raise"`` and a gradient is not finite; nothing has changed.
        """
        # A subclass's own step, which torch wrapped, runs the hooks.
        if torch.compiler.is_compiling() or (
            (profiler._is_profiler_enabled or self._has_step_hooks())
            and inspect.unwrap(type(self).step) is FusedStep.step
        ):
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    def _has_step_hooks(self) -> bool:
        """Return whether something runs before or after each step."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )

    step.hooked = True  # type: ignore[attr-defined]  # torch's wrapper would take longer than a small step

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                if not self._step_by_operators(compiling=True):
                    self._step_outside_the_graph()
            return loss
        before = torch.is_grad_enabled()
        # A context manager would take twice as long.
        torch._C._set_grad_enabled(self.defaults["differentiable"])
        try:
            self._step_by_launches()
        finally:
            torch._C._set_grad_enabled(before)
        return loss

    step.__signature__ = inspect.signature(_step)  # type: ignore[attr-defined]
    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)

    # Copies and checkpoints.

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedStep":
        memo[id(self.norm_group)] = self.norm_group  # a process group cannot be copied
        copy = memo[id(self)] = type(self).__new__(type(self))
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        return copy

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_norm", "on_nonfinite", "master_weights", "stochastic_rounding", "seed", "norm_group")
        models = ("stacked", "_models", "_active", "_lr_scale")
        own = {name: getattr(self, name) for name in (*names, *models, "_counts", "_skipped")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._counts = {}  # drop the old counts; the loaded state may bring its own
        super().__setstate__(state)
        if self.defaults["fused"]:  # as torch's constructor; torch's own copies lose it
            self._step_supports_amp_scaling = True
        self._forget()
        self.__dict__.setdefault("_captured", [])
        self.__dict__.setdefault("_loading", None)
        if self.stacked:
            self._note_rates()
        for param, values in self.state.items():
            step = values.get("step") if isinstance(values, dict) else None
            if self.stacked and step is not None:
                values["step"] = spread_step(step, param)
            elif isinstance(step, Tensor):
                dtype = step.dtype if step.is_floating_point() else torch.float32
                values["step"] = step.to(param.device, dtype).resolve_neg()
        if self._loading is not None:
            self._keep_wide(self._loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's, as torch.optim does.

        Torch casts every state to the parameter's dtype; float32 states beside a master weight keep theirs.
        """

        def remember(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            # This hook runs after the user's pre hooks, __setstate__ before the post hooks.
            self._loading = given

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
                    if key in self._state_keys and key != "step" and value is not None:
                        self.state[param][key] = value.to(device=param.device, dtype=torch.float32)

    # One step.

    def _init_group(self, *args: Any, **kwargs: Any) -> bool:
        """Fill the lists with the group's parameters of one dtype that have a gradient, for the traced step.

        Dynamo knows the method of this name: it runs it as it is, and takes the tensors for inputs of the graph.

        Args:
            args: the fields of a _Call with empty lists; the dtype; whether the records are the optimizer's own.

        Returns:
            Whether the operators can serve the group: no DTensors and nothing for torch's loop.
        """
        group, params, grads, positions, records, keys, states, dtype, lasting = args
        everything = chain.from_iterable(other["params"] for other in self.param_groups)
        own = set(map(id, group["params"]))
        wanted = [
            (position, param, param.grad)
            for position, param in enumerate(everything)
            if id(param) in own and param.grad is not None and param.dtype == dtype
        ]
        if self.stacked:
            for _, param, grad in wanted:
                self._refuse_at_step(group, param, grad)
        plain = all(local_part(p) is p and not self._needs_torch(group, p, grad) for _, p, grad in wanted)
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
                counts, norms = self._record_shapes()
                records += [
                    param.new_zeros(counts, dtype=torch.int64),
                    param.new_zeros(norms, dtype=torch.float64),
                ]
        return True

    def _step_by_operators(self, compiling: bool) -> bool:
        """Make the step by one operator per group and dtype: for graphs, and for tensors that hold no values.

        Returns:
            Whether the operators could serve; if not, nothing was done. A process group cannot be captured, nor
            can an exception be raised in the middle of a graph.
        """
        if self.norm_group is not None or (compiling and self.on_nonfinite == "raise"):
            return False
        scale, found_inf = self._scaler_tensors()
        calls: list[_Call] = []
        every_grad: list[Tensor] = []
        for group in self.param_groups:
            for dtype in {param.dtype: None for param in group["params"]}:
                call = _Call(group, [], [], [], [], [], [])
                if not self._init_group(*call, dtype, compiling):
                    return False
                if call.params:
                    calls.append(call)
                    every_grad += call.grads
        norms = None
        if self._measures() and calls:
            _, norms = calls[0].records
            active = self.active if self.stacked else None
            optimizer_norm(every_grad, scale, self._models, active, norms)
            if not compiling:
                self._norms = norms
        counting = found_inf is not None or self.on_nonfinite != "ignore"
        models = self._models_of_step() if self.stacked else None
        for group, params, grads, positions, records, keys, states in calls:
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
                *(models or (None, None, None)),
            )
            counting = False
        return True

    @torch._disable_dynamo
    def _step_outside_the_graph(self) -> None:
        self._step_by_launches()

    def _step_by_launches(self) -> None:
        groups = self.param_groups
        params = list(chain.from_iterable([group["params"] for group in groups]))
        grads = [param.grad for param in params]
        kinds = [(len(group["params"]), self._kind(group)) for group in groups]
        is_captured = capturing()
        if is_captured:
            self._refuse_capture(params)
        local = None
        if self._plan is not None and not is_captured and not operations_are_traced():
            local = self._plan.fit(params, grads, kinds, self.state)
        if local is None:
            if _valueless(params) and self._step_by_operators(compiling=False):
                return
            with torch.inference_mode(False):  # state and records outlive an inference_mode around this step
                entries, delegated = self._sort(params, grads)
                if not is_captured:  # a counter that is made inside would go back to zero at each replay
                    for device in {entry.param.device for entry in entries}:
                        self._skip_count(device)
            plan = Plan(params, grads, kinds, entries, delegated, self.state, self._models)
            local = [entry.grad for entry in entries]
            if is_captured:
                self._captured.append(plan)  # the graph reads its tables for as long as it lives
            else:
                self._plan = plan
        else:
            assert self._plan is not None
            plan = self._plan
        try:
            for part in plan.parts:
                part.bucket.grads = local if len(plan.parts) == 1 else [local[slot] for slot in part.slots]
            self._apply(plan)
            if plan.dtensors:  # autograd looks at a DTensor's own version, not at its local part's
                torch.autograd.graph.increment_version(plan.dtensors)
        finally:
            for part in plan.parts:
                part.bucket.grads = []  # a plan that kept gradients would keep their memory

    def _apply(self, plan: Plan) -> None:
        models = None
        if self.stacked:
            if self._models is None:  # there are no parameters
                return
            models = self._models_of_step()
        scale, found_inf = self._scaler_tensors()
        options = [self._options(group) for group in self.param_groups]
        if scale is None and found_inf is None and not self._measures():
            update_parameters(self._operator, plan.parts, options, UNGUARDED, models)
            if plan.delegated:
                self._step_by_torch(plan, UNGUARDED)
            return
        home = next((local_part(param).device for param in plan.params), torch.device("cpu"))
        norms = None
        if self._measures():
            extra = [(shards_of(param), _torch_norm(param, scale)) for _, param in plan.delegated]
            norms = measure_gradients(plan.parts, scale, home, models, extra, self.norm_group)
            self._record(norms)
            if self.on_nonfinite == "raise" and found_inf is None:
                self._raise_if_nonfinite(norms)
        guard = Guard(scale, found_inf, norms, self.max_norm, self.on_nonfinite != "ignore")
        if found_inf is not None or guard.skip_nonfinite:
            device = plan.parts[0].bucket.params[0].device if plan.parts else home
            guard = guard._replace(skipped=self._skip_count(device))
        update_parameters(self._operator, plan.parts, options, guard, models)
        if plan.delegated:
            self._step_by_torch(plan, guard._replace(skipped=None) if plan.parts else guard)

    def _scaler_tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """Return GradScaler's scale and found_inf, if it has set them, with a lazy negative bit resolved."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return (
            scale if scale is None else scale.resolve_neg(),
            found_inf if found_inf is None else found_inf.resolve_neg(),
        )

    def _record(self, norms: Tensor) -> None:
        """Keep the measurements for ``grad_norm``: in one tensor for all CUDA graphs and the steps beside them."""
        if self._row is None and capturing():
            self._row = norms
            if len(norms) > 1 or norms.is_inference():
                with torch.inference_mode(False):  # else steps outside could not write there
                    self._row = norms.new_empty((1, *norms.shape[1:]))
        self._norms = norms
        if self._row is not None and self._row is not norms:
            self._norms = self._row.copy_(norms.sum(0, keepdim=True))

    def _guard_of_rounds(self, device: torch.device) -> Guard:
        """Return the guard of many steps in one launch, which writes the last one's norm, and adds to the count."""
        if not self._measures():
            return UNGUARDED
        if capturing():
            self._lasting_norms(device)
        elif self._row is None:
            _, shape = self._record_shapes()
            self._norms = torch.empty(shape, dtype=norm_dtype(device), device=device)
        skips = self.on_nonfinite == "skip"
        return Guard(
            norms=self._norms,
            max_norm=self.max_norm,
            skip_nonfinite=skips,
            skipped=self._skip_count(device) if skips else None,
        )

    def _lasting_norms(self, device: torch.device) -> Tensor:
        """Return the tensor that graphs write their measurements to; from then on the eager step does so too."""
        if self._row is None:
            _, shape = self._record_shapes()
            self._norms = self._row = torch.zeros(shape, dtype=norm_dtype(device), device=device)
        return self._row

    def _record_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the counts of skipped steps and of the norms: of one model, or of all."""
        return ((1,), (1, 2)) if self._models is None else ((self._models,), (1, 2, self._models))

    def _measures(self) -> bool:
        return self.max_norm is not None or self.on_nonfinite != "ignore"

    def _skip_count(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            shape, _ = self._record_shapes()
            self._skipped[device] = torch.zeros(shape, dtype=torch.int64, device=device)
        return self._skipped[device]

    def _raise_if_nonfinite(self, norms: Tensor) -> None:
        if norms[:, 1].sum().item():
            where = nonfinite_models(norms) if self.stacked else self._nonfinite_parameters()
            raise FloatingPointError(f"non-finite gradients: {where}. Nothing was updated.")

    def _nonfinite_parameters(self) -> str:
        names = []
        for g, group in enumerate(self.param_groups):
            given = group.get("param_names")
            for i, param in enumerate(group["params"]):
                if param.grad is not None and not _dense_values(param).isfinite().all():
                    names.append(
                        given[i] if given else f"parameter {i} of group {g}, shape {tuple(param.shape)}"
                    )
        return "; ".join(names) or "none on this rank"

    def _step_by_torch(self, plan: Plan, guard: Guard) -> None:
        """Unscale, clip and skip as the fallback does, then let torch's own loop update."""
        decision = decide_by_tensors(guard)
        if decision.skip:
            return
        for g, group in enumerate(self.param_groups):
            chosen = [param for owner, param in plan.delegated if owner == g]
            grads = [param.grad for param in chosen if param.grad is not None]
            if decision.scale is not None:
                for grad in grads:
                    grad.div_(decision.scale.to(grad.device))
            if decision.clips:
                clip = decision.clip
                grads = [
                    grad * (clip.to(grad.device) if isinstance(clip, Tensor) else clip) for grad in grads
                ]
            if chosen:
                self._torch_update(group, chosen, grads)

    # Plans.

    def _sort(
        self, params: list[Tensor], grads: list[Tensor | None]
    ) -> tuple[list[Entry], list[tuple[int, Tensor]]]:
        """Return what launches update, and (group, parameter) of what torch's own loop must."""
        owners = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        entries: list[Entry] = []
        delegated: list[tuple[int, Tensor]] = []
        for index, (param, grad, g) in enumerate(zip(params, grads, owners, strict=True)):
            if grad is None:
                continue
            group = self.param_groups[g]
            if self.stacked:
                self._refuse_at_step(group, param, grad)
            if self._needs_torch(group, param, grad):
                delegated.append((g, param))
                continue
            state = {key: local_part(value) for key, value in self._state_of(group, param).items()}
            seed = self._seed_of(param)
            entries.append(
                Entry(g, index, local_part(param), local_gradient(grad, param), state, seed, shards_of(param))
            )
        return entries, delegated

    def _needs_torch(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> bool:
        """Return whether torch's own loop serves this parameter; refuse what torch refuses with ``fused=True``."""
        plain = (
            param.is_floating_point()
            and grad.layout == torch.strided
            and not group["differentiable"]
            and not is_wrapper(local_part(param))
            and not is_wrapper(grad)
        )
        if not plain and group["fused"]:
            _device_dtype_check_for_fused(param)
            if grad.is_sparse:
                raise RuntimeError(f"`_fused_{self._operator}` does not support sparse gradients")
        return not plain

    def _refuse_capture_of_rounds(self) -> None:
        """Refuse what a CUDA graph of many steps in one launch would replay wrongly."""
        attempt = self._attempted_capture()
        if self._rounds != self._made():  # what the first ones make would be made anew at each replay
            raise RuntimeError(
                attempt + "it has made no rounds yet with these parameters, options and states: "
                "run some before the capture."
            )

    def _made(self) -> list[Any]:
        """Return each parameter's options and the names of its states, by which rounds decide what to allocate."""
        return [
            (id(param), self._kind(group), *self.state.get(param, {}))
            for group in self.param_groups
            for param in group["params"]
        ]

    def _attempted_capture(self) -> str:
        """Refuse a capture by the optimizer's options; return how the other refusals begin."""
        attempt = f"Attempting CUDA graph capture of step() for an instance of {type(self).__name__} but "
        if not self._capturable():
            raise RuntimeError(attempt + "param_groups' capturable is False.")
        if self.on_nonfinite == "raise":
            raise RuntimeError(attempt + "on_nonfinite='raise' must read the gradients on the host.")
        return attempt

    def _refuse_capture(self, params: list[Tensor]) -> None:
        """Refuse what a CUDA graph would replay wrongly."""
        attempt = self._attempted_capture()
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


def _dense_values(param: Tensor) -> Tensor:
    """Return the gradient's stored elements, on this rank, as real numbers."""
    grad = local_gradient(param.grad, param)
    if grad.is_sparse:
        grad = grad.coalesce()._values()
    return torch.view_as_real(grad) if grad.is_complex() else grad


def _torch_norm(param: Tensor, scale: Tensor | None) -> Tensor:
    values = _dense_values(param).double()
    if scale is not None:
        values = values / scale
    return torch.stack([values.square().sum(), (~values.isfinite()).sum()])


def _valueless(params: list[Tensor]) -> bool:
    """Return whether a step over these is traced, or has no values to compute with: fake and meta tensors."""
    return operations_are_traced() or any(param.is_meta or isinstance(param, FakeTensor) for param in params)
