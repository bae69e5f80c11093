"""The optimizers' own options: how they are checked, shown and kept."""

import copy
import inspect
import pickle
import re
import weakref
from typing import Any, get_type_hints

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD

from .optimizers import (
    NAMES,
    SMALL,
    make_params,
    ours_for,
    parameters,
    run,
    some_gradients,
    theirs_for,
)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_norm": -1.0}, "max_norm"),
        ({"max_norm": float("nan")}, "max_norm"),
        ({"on_nonfinite": "explode"}, "explode"),
    ],
    ids=str,
)
def test_our_options_are_checked(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ours_for(name)(make_params(SMALL), **options)


def test_our_options_are_keyword_only_and_stay_out_of_the_groups(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL), max_norm=1.0, on_nonfinite="skip")
    theirs = theirs_for(name)(make_params(SMALL))
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert ours.defaults.keys() == theirs.defaults.keys()
    with pytest.raises(TypeError):
        ours_for(name)(make_params(SMALL), *([0.1] * 8))


def test_annotations_can_be_read(name: str) -> None:
    """As command lines that are built from signatures do."""
    assert "shared" in get_type_hints(ours_for(name).__init__)


def test_the_signature_begins_as_torch_s(name: str) -> None:
    mine = list(inspect.signature(ours_for(name)).parameters.values())
    other = list(inspect.signature(theirs_for(name)).parameters.values())
    known = {parameter.name: parameter for parameter in mine}
    for parameter in other:
        assert known[parameter.name].default == parameter.default, parameter.name
        assert known[parameter.name].kind == parameter.kind, parameter.name
    positional = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in other if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_under_torch_s_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.optim.AdamW = FusedAdamW``: the way to bring it into a training script that cannot be changed."""
    expected = theirs_for(name)(make_params(SMALL), lr=0.01).defaults
    drop_ins = {each: ours_for(each) for each in NAMES}
    for each, cls in drop_ins.items():
        monkeypatch.setattr(torch.optim, each, cls)
    ours = getattr(torch.optim, name)(make_params(SMALL), lr=0.01)
    assert type(ours) is drop_ins[name]
    assert ours.defaults == expected
    run(copy.deepcopy(ours), some_gradients(ours, 2))


def test_repr_shows_our_options_after_torch_s(name: str) -> None:
    shown = repr(ours_for(name)(make_params(SMALL), max_norm=1.5, on_nonfinite="skip"))
    assert shown.startswith(repr(theirs_for(name)(make_params(SMALL)))[:-1].replace(name, f"Fused{name}"))
    assert "    max_norm: 1.5\n    on_nonfinite: skip\n" in shown
    assert shown.endswith("\n)")


def test_no_gradient_is_kept_alive_by_the_optimizer(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL), max_norm=1.0)
    run(ours, some_gradients(ours, 2))
    watched = [weakref.ref(param.grad) for param in parameters(ours)]
    ours.zero_grad()
    assert [ref() for ref in watched] == [None] * len(watched)


@pytest.mark.parametrize("ours", [FusedSGD, FusedAdam, FusedAdamW])
def test_help_shows_every_argument(ours: type[torch.optim.Optimizer]) -> None:
    """The shared options stand in one place, and in each class's signature; a subclass has its own."""

    class Mine(ours):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, speed: float) -> None:
            super().__init__(params, lr=speed)

    shown = inspect.signature(ours).parameters
    assert list(shown)[:2] == ["params", "lr"]
    assert shown["max_norm"].default is None
    assert {"on_nonfinite", "master_weights", "stochastic_rounding", "seed", "norm_group"} <= set(shown)
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in shown.values())
    assert list(inspect.signature(Mine).parameters) == ["params", "speed"]


def test_a_copy_shares_the_process_group_and_a_pickle_names_public_classes_alone(name: str) -> None:
    class Group:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a process group cannot be copied")

    group = Group()
    ours = ours_for(name)(make_params(SMALL), norm_group=group)
    again = copy.deepcopy([ours, ours])
    assert again[0] is again[1] is not ours
    assert again[0].norm_group is group
    ours.norm_group = None
    found = set(re.findall(rb"gradkernels[\w.]*", pickle.dumps(ours, protocol=2)))
    assert found == {type(ours).__module__.encode()}
