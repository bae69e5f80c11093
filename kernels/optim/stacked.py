"""``stacked=True``: one optimizer over a batch of models, whose number is the first dimension of every parameter.

What differs from a plain step is here: which parameters and options are refused, and the options that have one value
per model; the launches are given the ``Models`` besides the bucket. Options, clipping, guard and counts hold for
one model each; the state's ``step`` is (B,). Nothing here does work that grows with the number of models, and nothing
waits for the device after construction, save where ``on_nonfinite="raise"`` must.
"""

from collections.abc import Callable
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .bucket import Models
from .plan import is_wrapper

# The options that may have one value per model; of the betas each one.
RATES = ("lr", "weight_decay", "momentum", "betas")

# Of the models with non-finite gradients an exception names so many.
NAMED = 5


class StackedStep:
    """The part of an optimizer that knows of models; without ``stacked=True`` all of it stands aside."""

    _torch_class: ClassVar[Any]  # the class of torch.optim that checks the options
    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    stacked = False
    _models: int | None = None  # how many; None without ``stacked=True``
    _active: Tensor | None = None
    _lr_scale: Tensor | None = None
    _checked: list[Any] | None = None  # the options that the last step has checked

    def _take_rates(self, shared: Any, **options: Any) -> dict[str, Any]:
        """Return the options for torch's constructor, which checks them: the worst element stands for each (B,) tensor.

        Args:
            shared: the keyword arguments that all optimizers share.
            options: those among RATES that this one was given.
        """
        self.stacked = bool(shared.get("stacked", False))
        self._given: dict[str, Any] = {}
        self._per_model: list[set[str]] = []
        if not self.stacked:
            return options
        self._given = {name: value for name, value in options.items() if any(_per_model(name, value))}
        return {name: _worst(name, value) for name, value in options.items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.

        Raises:
            ValueError: with ``stacked=True``, for a parameter that is no stack of as many models as the others, or
                an option whose shape does not fit.
            RuntimeError: for a parameter or an option on another device.
        """
        if self.stacked:
            self.defaults.update(self._given)  # torch's constructor has put the stand-ins there
            self._given = {}
        super().add_param_group(param_group)  # type: ignore[misc]
        if not self.stacked:
            return
        before = self._models
        try:
            self._check_group(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            self._models = before
            raise

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        for place, param in enumerate(group["params"]):
            name = name_of(group, index, place)
            if param.dim() == 0:
                raise ValueError(f"stacked=True needs a first dimension that counts models: {name} has none")
            if param.is_complex() or group["differentiable"]:
                what = "differentiable=True" if group["differentiable"] else "complex parameters"
                raise ValueError(f"stacked=True does not serve {what}: {name}")
            if self._models is None:
                self._models = len(param)
            if len(param) != self._models:
                raise ValueError(
                    f"{name} stacks {len(param)} models, the parameters before it {self._models}"
                )
            home = self._home()
            if param.device != home:
                raise RuntimeError(f"{name} is on {param.device}, the first parameter on {home}")
        if self._models is not None:  # without a parameter so far the first step finds out
            self._check_rates(group)
        given = {name: group[name] for name in RATES if name in group and any(_per_model(name, group[name]))}
        if given:
            own = {name: group[name] for name in ("nesterov", "dampening") if name in group}
            rates = {name: _worst(name, group[name]) for name in RATES if name in group}
            self._torch_class([torch.zeros(1)], **own, **rates)  # raises in torch's words
        self._per_model.append(set(given))

    def _check_rates(self, group: dict[str, Any]) -> None:
        """Refuse options of a shape or on a device that the kernels cannot read."""
        for name in RATES:
            for label, value in _values(name, group.get(name)):
                if isinstance(value, Tensor) and value.dim() > 0:
                    self._check_vector(label, value)

    def _check_vector(self, label: str, value: Tensor) -> None:
        if value.shape != (self._models,):
            raise ValueError(
                f"{label} has shape {tuple(value.shape)}; expected a number or ({self._models},), one for each model"
            )
        home = self._home()
        if value.device != home:
            raise RuntimeError(f"{label} is on {value.device}, the parameters on {home}")

    def _home(self) -> torch.device:
        """Return the device of the first parameter, and so of all."""
        devices = (param.device for group in self.param_groups for param in group["params"])
        return next(devices, torch.device("cpu"))

    def _note_rates(self) -> None:
        """Take the options of a loaded state for those of construction, on the parameters' device."""
        self._given, self._per_model = {}, []
        for group in self.param_groups:
            home = group["params"][0].device if group["params"] else None
            self._per_model.append(set())
            for name in RATES:
                if name in group and any(_per_model(name, group[name])):
                    self._per_model[-1].add(name)
                    moved = [value.to(home) if isinstance(value, Tensor) and value.dim() > 0 else value
                             for _, value in _values(name, group[name])]  # fmt: skip
                    group[name] = tuple(moved) if name == "betas" else moved[0]

    def _refuse_overwritten(self) -> None:
        """Refuse what a scheduler made of options per model."""
        if len(self._per_model) != len(self.param_groups):  # groups were taken out, or put in, by hand
            self._note_rates()
        for group, names in zip(self.param_groups, self._per_model, strict=True):
            self._check_rates(group)
            for name in names:
                if not any(_per_model(name, group[name])) or (name == "lr" and "max_lr" in group):
                    raise ValueError(
                        f"{name} had one value for each model when the optimizer was made, and was overwritten with "
                        "one number, as OneCycleLR does; schedule a number, and give each model its factor by lr_scale"
                    )

    def _refuse_at_step(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        """Refuse what only torch's own loop could update, and what is spread over ranks."""
        what = ""
        if hasattr(param, "_local_tensor") or hasattr(grad, "_local_tensor"):
            what = "DTensors"
        elif grad.layout != torch.strided:
            what = "sparse gradients"
        elif is_wrapper(param) or is_wrapper(grad):
            what = "tensors that keep their values in others"
        if what:
            place = next(i for i, other in enumerate(group["params"]) if other is param)
            index = next(i for i, other in enumerate(self.param_groups) if other is group)
            raise ValueError(f"stacked=True does not serve {what}: {name_of(group, index, place)}")

    # What a step reads for each model.

    @property
    def active(self) -> Tensor | None:
        """Return which models take part in the next steps: a bool tensor (B,), read at each step; None for all.

        A model that is left out keeps its parameters, state, step and counts; its ``grad_norm`` is nan.
        """
        return self._active

    @active.setter
    def active(self, value: Tensor | None) -> None:
        self._check_active(value)
        self._active = value

    @property
    def lr_scale(self) -> Tensor | None:
        """Return factors (B,) of the models' learning rates, read on the device at each step, or None."""
        return self._lr_scale

    @lr_scale.setter
    def lr_scale(self, value: Tensor | None) -> None:
        self._check_lr_scale(value)
        self._lr_scale = value

    def _check_active(self, value: Tensor | None) -> None:
        self._check_own("active", value, "bool tensor", lambda dtype: dtype == torch.bool)

    def _check_lr_scale(self, value: Tensor | None) -> None:
        self._check_own("lr_scale", value, "tensor of real numbers", lambda dtype: not dtype.is_complex)

    def _check_own(self, name: str, value: Any, kind: str, serves: Callable[[torch.dtype], bool]) -> None:
        if value is None:
            return
        if not self.stacked:
            raise ValueError(f"{name} is for stacked=True")
        if not isinstance(value, Tensor) or not serves(value.dtype):
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be None or a {kind}, found {found}")
        self._check_vector(name, value)

    def _models_of_step(self) -> Models:
        """Return what all launches of a step are given; refuse what has changed since construction."""
        given = [self._active, self._lr_scale]
        for group in self.param_groups:
            given += [group.get("lr"), group.get("weight_decay"), group.get("momentum"), group.get("betas")]
            given.append(group.get("max_lr"))
        known = self._checked
        if known is None or len(known) != len(given) or not all(map(is_, given, known)):
            self._check_active(self._active)
            self._check_lr_scale(self._lr_scale)
            self._refuse_overwritten()
            if not torch.compiler.is_compiling():  # torch 2.11's compiler refuses to write to an optimizer
                self._checked = given
        assert self._models is not None
        return Models(self._models, self._active, self._lr_scale)


def _values(name: str, option: Any) -> list[tuple[str, Any]]:
    """Return the values of an option, each with its label."""
    if name == "betas" and option is not None:
        return [(f"betas[{i}]", value) for i, value in enumerate(option)]
    return [(name, option)]


def _per_model(name: str, option: Any) -> list[bool]:
    return [isinstance(value, Tensor) and value.dim() > 0 for _, value in _values(name, option)]


def _worst(name: str, option: Any) -> Any:
    """Return the option with a number for each (B,) tensor: an element that torch refuses, if it refuses any."""
    if not any(_per_model(name, option)):
        return option
    numbers = []
    for _, value in _values(name, option):
        if not isinstance(value, Tensor):
            numbers.append(float(value))
        elif value.numel() == 0 or value.is_meta or isinstance(value, FakeTensor):
            numbers.append(0.5)  # no values to look at
        else:
            low, high = map(float, value.detach().aminmax())
            numbers.append(high if name == "betas" and low >= 0 else low)
    return tuple(numbers) if name == "betas" else numbers[0]


def name_of(group: dict[str, Any], index: int, place: int) -> str:
    """Return how an exception calls a parameter: by its name if it has one, with its shape."""
    names = group.get("param_names")
    name = f"parameter {names[place]!r}" if names else f"parameter {place} of group {index}"
    return f"{name}, shape {tuple(group['params'][place].shape)}"


def nonfinite_models(norms: Tensor) -> str:
    """Name the first models whose gradients are not finite. It waits for the device."""
    found: list[int] = norms[:, 1].sum(0).nonzero().flatten().tolist()
    if not found:  # a scaler's found_inf may be another optimizer's
        return "none on this rank"
    rest = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"models {', '.join(map(str, found[:NAMED]))}{rest}" if len(found) > 1 else f"model {found[0]}"


def spread_step(step: Any, param: Tensor) -> Tensor:
    """Return a step (B,) float32 on the parameter's device, from one of its own or from torch.optim's single one."""
    step = torch.as_tensor(step, dtype=torch.float32, device=param.device).resolve_neg()
    return step.expand(len(param)).clone() if step.dim() == 0 else step.contiguous()
