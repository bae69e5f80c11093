"""``make test-ttir``: a second oracle of the kernels' values, ttsem, in the place of Triton's interpreter.

Triton's interpreter runs a kernel's Python over NumPy. ttsem, a package of its own, runs the TTIR that Triton's
compiler makes of it, where types, promotions, constants, tuples and tensor maps are those of a GPU; it refuses
accesses outside of a tensor and races between programs. The tests are the first cases of those that ``make test-gpu``
begins with: values by the NumPy references, every op and optimizer, every kernel.

Makes an environment of its own in DIR, from the package index that pip is set up for: ttsem, the torch and Triton that
it is made for, and what the tests import; about 0.7 GB to download. It needs Python 3.12 or later.
"""

import argparse
import dataclasses
import gc
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from .gpu import FIRST, in_order
from .host import cuda_build

ROOT = Path(__file__).parents[1]
TTSEM, TORCH, TRITON = "0.1.0", "2.14.0", "3.8.0"
VALUES = re.compile("|".join(FIRST[:3]))
CASES = 6  # of each test
# What ttsem cannot judge: a part of the test's name, whether to run the test all the same, the reason.
EXPECTED = (
    ("32_bits", False, "it copies the whole storage of an argument, here of gigabytes"),
    ("test_a_model_of_several_programs", True, "the last of the programs that an atomic counts reads what the"
     " others wrote: it takes no order from the counter, and sees a race"),
)  # fmt: skip


# The plugin of pytest.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=CASES, help="of each test, in the process of tests.ttir")


def pytest_configure(config: pytest.Config) -> None:
    """Let ttsem run every launch of this process."""
    from triton.tools.tensor_descriptor import TensorDescriptor
    from ttsem import _fakedriver, harness, mlir, sanitize

    mlir.enable_generic_printing()  # before the first compilation, for which it would compile twice
    session = ExitStack()
    config.add_cleanup(session.close)
    session.enter_context(sanitize.session(cuda_is_cpu=False))
    _fakedriver.unstub_torch_cuda()  # there is no GPU: the tests' tensors are the CPU's
    execute, memory, write_back = harness.execute, harness.Memory, sanitize._write_back

    def execute_with_tables(record: Any, *args: Any, **options: Any) -> Any:
        class Memory(memory):
            def __init__(self) -> None:
                super().__init__()
                for base, array in pointed_at(record):
                    self.register(base, array)

            def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
                if other is None and np.dtype(dtype).kind == "f":
                    other = np.nan  # what a mask keeps out is undefined then; ttsem has 0
                return super().load(addresses, mask, other, dtype)

        # It computes by NumPy, which warns where a GPU returns inf or NaN.
        with mock.patch.object(harness, "Memory", Memory), np.errstate(all="ignore"):
            return execute(record, *args, **options)

    def write_back_descriptors(record: Any, execution: Any) -> None:
        """What was stored by a tensor map too, which ttsem 0.1.0 forgets."""
        bound = {
            name: value.base if isinstance(value, TensorDescriptor) else value
            for name, value in record.bound.items()
        }
        write_back(dataclasses.replace(record, bound=bound), execution)

    session.enter_context(mock.patch.object(harness, "execute", execute_with_tables))
    session.enter_context(mock.patch.object(sanitize, "_write_back", write_back_descriptors))


def pointed_at(record: Any) -> list[tuple[int, np.ndarray]]:
    """The storages, by address, whose addresses stand in tables of the launch.

    ttsem knows the tensors that are arguments; an optimizer's kernel finds its tensors' addresses in 64-bit ones.
    """
    tables = [array.reshape(-1).view(np.int64) for array in record.pre.values() if array.itemsize == 8]
    addresses = np.unique(np.concatenate([np.zeros(0, np.int64), *tables]))
    if not addresses.size:
        return []
    found = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.is_cpu and item.layout is torch.strided:
            storage = item.untyped_storage()
            base, size = storage.data_ptr(), storage.nbytes()
            inside = np.searchsorted(addresses, [base, base + size])
            if inside[0] < inside[1] and base not in record.bases.values():
                found[base] = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return list(found.items())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    taken: Counter[str] = Counter()
    kept, rest = [], []
    for item in in_order(items):
        name = item.nodeid.partition("[")[0]
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        launches = "triton" in [*map(str, given)] or "_kernels.py" in name
        fits = launches and VALUES.search(name) and not item.get_closest_marker("full")
        if fits and taken[name] < config.option.cases:
            taken[name] += 1
            kept.append(item)
            for part, run, reason in EXPECTED:
                if part in name:
                    item.add_marker(pytest.mark.xfail(run=run, reason=reason))  # strict by pyproject.toml
        else:
            rest.append(item)
    config.hook.pytest_deselected(items=rest)
    items[:] = kept


# The command.


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ttir", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "ttir", help="default: build/ttir")
    parser.add_argument("--python", default="python3.12", help="that the environment is made from")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest in place of its files")
    options = parser.parse_args()
    folder = options.dir.resolve()
    if shutil.which(options.python) is None:
        parser.error(
            f"there is no {options.python}, from which to make the environment; name another by --python"
        )
    python = cuda_build.install(folder, TORCH, TRITON, f"ttsem=={TTSEM}", base=options.python)
    cuda_build.build(folder)  # torch's CUDA build cannot be imported without CUDA's libraries
    environment = cuda_build.environment(folder) | {
        "GRADKERNELS_CUDA_DEVICES": "0",
        "GRADKERNELS_PLAIN_LAUNCH": "1",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "0",
    }
    plugins = ["-p", "no:cacheprovider", "-p", __spec__.name]
    command = [python, "-m", "pytest", *plugins, "-n", "2", *(options.pytest or ["tests/ops", "tests/optim"])]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
