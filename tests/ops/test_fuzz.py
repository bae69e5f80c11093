"""Random sizes, strides, dtypes and values: second derivatives of the loss, and optimizers, by the tolerance policy.

Every case runs interpreted, under the memory checker. The ops' values and gradients: test_shapes.py.
"""

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, mse_loss, use_backend
from gradkernels.reference import adam, sgd
from gradkernels.verify import memory_check
from torch import Tensor
from torch.nn import functional

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from ..helpers import DTYPES, Draws, exactly, to_numpy
from ..strategies import LAYOUTS, NONZERO, SIZES, fuzz, tensors

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.unwatched,
    pytest.mark.skipif(
        isinstance(triton.language.sum, triton.runtime.JITFunction),
        reason="needs Triton's interpreter (TRITON_INTERPRET=1)",
    ),
]


def check(problem):
    """Ours interpreted and watched, against torch's and the reference's results, in as many draws as it takes.

    ``problem()`` gives the three for other random numbers at each call.
    """
    draws = Draws()
    while not draws.enough:
        ours, theirs, reference = problem()
        with use_backend("triton"), memory_check():
            found = ours()
        plain = theirs()
        assert found.keys() == plain.keys()
        for name, value in found.items():
            draws.add(name, value, plain[name], reference[name])
    draws.assert_match()


@fuzz(25)
@given(st.data())
def test_mse_twice_differentiated(data):
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    shape = data.draw(st.lists(NONZERO, min_size=1, max_size=2))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    sources = [tensors(data.draw, shape, dtype) for _ in range(3)]
    sources.append(tensors(data.draw, shape if reduction == "none" else (), dtype))

    def problem():
        input, target, direction, grad = (source() for source in sources)

        def second(loss):
            leaves = [input.detach().requires_grad_(), target.detach().requires_grad_()]
            result = loss(*leaves, reduction=reduction)
            (first,) = torch.autograd.grad(result, leaves[0], grad, create_graph=True)
            names = ("input", "target")
            return dict(zip(names, torch.autograd.grad(first, leaves, direction), strict=True))

        product = 2 * exactly(grad) * exactly(direction)
        if reduction == "mean":
            product = product / input.numel()
        return (
            lambda: second(mse_loss),
            lambda: second(functional.mse_loss),
            {"input": product, "target": -product},
        )

    check(problem)


RATES = st.sampled_from([0.0, 0.01, 0.1])
ADAM = st.fixed_dictionaries(
    {"lr": RATES, "weight_decay": RATES, "amsgrad": st.booleans(), "maximize": st.booleans()}
)
SGD = st.fixed_dictionaries(
    {"lr": RATES, "weight_decay": RATES, "momentum": st.sampled_from([0.0, 0.9]), "maximize": st.booleans()}
)


@fuzz(25)
@given(st.data())
def test_optimizers(data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    ours, theirs, options, step = data.draw(
        st.one_of(
            st.tuples(st.just(FusedSGD), st.just(torch.optim.SGD), SGD, st.just(sgd.step)),
            st.tuples(st.just(FusedAdam), st.just(torch.optim.Adam), ADAM, st.just(adam.step)),
            st.tuples(st.just(FusedAdamW), st.just(torch.optim.AdamW), ADAM, st.just(adam.step)),
        )
    )
    shapes = data.draw(st.lists(st.lists(SIZES, max_size=2), min_size=1, max_size=4))
    layouts = LAYOUTS.filter(lambda layout: layout != "expanded")
    starts = [tensors(data.draw, shape, dtype, layouts) for shape in shapes]
    feeds = [[tensors(data.draw, shape, dtype) for shape in shapes] for _ in range(2)]
    more = {"decoupled_weight_decay": True} if ours is FusedAdamW else {}

    def problem():
        values = [source() for source in starts]
        steps = [[source() for source in sources] for sources in feeds]

        def stepped(make, **flags):
            # clone() keeps the strides of what is dense: a copy may not overlap itself.
            params = [value.clone().requires_grad_() for value in values]
            optimizer = make(params, **options, **flags)
            for grads in steps:
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
            state = [
                (f"{key} {i}", value)
                for i, p in enumerate(params)
                for key, value in optimizer.state[p].items()
            ]
            found = {f"param {i}": param.detach() for i, param in enumerate(params)}
            return found | {
                name: value for name, value in state if isinstance(value, Tensor) and "step" not in name
            }

        reference = {}
        for i, value in enumerate(values):
            new, state = to_numpy(value), None
            for grads in steps:
                new, state = step(new, to_numpy(grads[i]), state, **options, **more)
            reference |= {f"param {i}": new, **{f"{key} {i}": array for key, array in (state or {}).items()}}
        return lambda: stepped(ours), lambda: stepped(theirs, foreach=False), reference

    check(problem)
