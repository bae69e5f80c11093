"""More than 2^31 elements in one tensor: the programs at its end, run alone on memory that is hardly touched."""

import pytest

from ..conftest import GPU
from ..helpers import python

# One untouched buffer holds every operand, each a little further on: only their ends are ever read or written.
SETUP = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import torch
from gradkernels.optim.bucket import AdamOptions, Bucket, Guard, SGDOptions
from gradkernels.triton import adam, sgd
from gradkernels.triton.multi_tensor import CHUNK, grad_norm, tables_of
TAIL = 2 * CHUNK.value + 100  # from the last chunk below 2^31 to the partial one at the end
START = 2**31 - CHUNK.value
def operands(count, dtype):
    buffer = torch.empty(START + (count + 1) * 8 * CHUNK.value, dtype=dtype)
    large = [buffer[8 * CHUNK.value * i :][: START + TAIL] for i in range(count)]
    small = [torch.rand(TAIL).to(dtype) for _ in range(count)]
    for one, other in zip(large, small):
        one[START:] = other
    return large, small
def bucket_of(tensors, step, seed=None):
    param, grad, *moments = tensors
    names = ((), ("momentum_buffer",), ("exp_avg", "exp_avg_sq"))[len(moments)]
    states = {name: [moment] for name, moment in zip(names, moments)}
    if step is not None:
        states["step"] = [step]
    return Bucket([param], [grad], states, [0], [0], seed)
def only_the_end(bucket):
    # The chunks from START on: those of the norm, and those of the step, which are larger.
    tables = tables_of(bucket)
    assert len(tables.norm_chunks.array) == 2**19 + 2
    tables.norm_chunks.array = np.ascontiguousarray(tables.norm_chunks.array[-3:])
    assert tables.programs == 2**17 + 1
    tables.chunks.tensor = tables.chunks.tensor[-2:].contiguous()
    tables.programs = 2
    tables.arrivals[0] = 2**17 - 1  # so many programs before these have been there
"""
CASES = {
    "adam": """
large, small = operands(4, torch.float16)
steps = [torch.tensor(3.0), torch.tensor(3.0)]
options = [AdamOptions(0.1, 0.9, 0.99, 1e-3, 0.1, True, False)]
mine, other = bucket_of(large, steps[0]), bucket_of(small, steps[1])
only_the_end(mine)
for bucket in (mine, other):
    adam.adam_step(bucket, options, Guard())
assert steps[0] == steps[1] == 4
for one, expected in zip(large, small):
    assert torch.equal(one[START:], expected)
""",
    "sgd": """
large, small = operands(3, torch.float16)
mine, other = bucket_of(large, None), bucket_of(small, None)
only_the_end(mine)
for bucket in (mine, other):
    sgd.sgd_step(bucket, [SGDOptions(0.1, 0.9, 0.0, 0.1, True, False)], Guard())
for one, expected in zip(large, small):
    assert torch.equal(one[START:], expected)
""",
    "random rounding": """
from gradkernels.fallback.multi_tensor import draws, stochastic_bfloat16
large, small = operands(2, torch.bfloat16)
mine = bucket_of(large, step := torch.tensor(5.0), seed=7)
only_the_end(mine)
sgd.sgd_step(mine, [SGDOptions(0.5, 0.0, 0.0, 0.0, False, False)], Guard())
words = draws(START, START + TAIL, 7, 0, torch.tensor(5.0))
exact = small[0].float() - 0.5 * small[1].float()
assert step == 6
assert torch.equal(large[0][START:], stochastic_bfloat16(exact, words[0]))
assert not torch.equal(large[0][START:], exact.bfloat16())
""",
    "grad_norm": """
large, small = operands(1, torch.float16)
mine, other = bucket_of(large * 2, None), bucket_of(small * 2, None)
only_the_end(mine)
outs = torch.zeros(2, 2, dtype=torch.float64)
for bucket, out in zip((mine, other), outs):
    grad_norm(bucket, None, out)
assert outs[1, 0] > 0 and torch.equal(outs[0], outs[1])
""",
}


@pytest.mark.skipif(GPU, reason="the interpreter's address space")
def test_offsets_beyond_32_bits() -> None:
    """An offset that wraps leaves the buffer. In a process of its own, since that kills; the last name says where."""
    code = SETUP + "".join(f"print({name!r}, flush=True){body}" for name, body in CASES.items())
    assert python("-c", code).split("\n") == [*CASES, ""]
