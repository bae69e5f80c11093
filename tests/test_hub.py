"""The repository for Hugging Face's kernel hub: complete, and loadable with or without us beside it."""

import ast
import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hub

from .helpers import python

KERNELS = hub.ROOT / "kernels"

# As the client imports a variant, with torch loaded before, so that what imports NumPy afterwards is our code.
LOADED = """
import builtins, importlib.util, json, sys
import torch

folder, beside = sys.argv[1:]
name = json.load(open(f"{folder}/metadata.json"))["id"]
if beside == "beside":
    import gradkernels
else:
    sys.modules["gradkernels"] = sys.modules["kernels"] = None  # any import of either fails
genuine = builtins.__import__


def without_numpy(module, scope=None, *args):
    caller = (scope or {}).get("__name__") or ""
    assert not (module.startswith("numpy") and caller.startswith(name)), f"{caller} imports {module}"
    return genuine(module, scope, *args)


builtins.__import__ = without_numpy
spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
WORK = """
def results(package):
    x, w, y, b = (torch.arange(n * 1.0).cos().view(size).requires_grad_() for n, size in SIZES)
    loss = package.mse_loss(package.linear(x, w, b), y, weight=y.square()) + package.linear_mse_loss(x, w, y, b)
    loss.backward()
    optimizer = package.FusedAdam([x, w, y, b], max_norm=1.0)
    optimizer.step()
    with package.use_backend("fallback"):
        losses = torch.func.vmap(package.mse_loss)(x, x.cos())
    return [loss, optimizer.grad_norm, losses, x, w, y, b]

SIZES = ((350, (70, 5)), (15, (3, 5)), (210, (70, 3)), (3, (3,)))
found = results(module)
assert type(module.FusedAdam([found[3]])).__module__ == f"{name}.adam"
getattr(torch.ops, name).linear_mse_backward.default
if beside == "beside":
    assert all(torch.equal(one, other) for one, other in zip(found, results(gradkernels), strict=True))
    assert module.FusedAdam is not gradkernels.FusedAdam
else:
    assert not hasattr(torch.ops.gradkernels, "linear_mse_backward")
builtins.__import__ = genuine
with module.use_backend("reference"):
    x = found[3].detach()
    torch.testing.assert_close(module.mse_loss(x, x.cos()), torch.nn.functional.mse_loss(x, x.cos()))
print(sorted(module.__all__))
"""
# As the hub's own client loads and uses it.
CLIENT = """
import json, sys
from pathlib import Path

import kernels
import torch
from kernels import LocalLayerRepository, Mode

folder = Path(sys.argv[1])
assert {str(backend) for backend in kernels._rust.Build.open(folder).general.backends} == set(sys.argv[2].split())
variants = sorted((folder / "build").iterdir())
for variant in variants:
    written = kernels.Metadata.read_from_file(variant / "metadata.json").digest
    found = kernels._rust.Digest.hash_variant(written.algorithm, variant)
    found.files.pop("metadata.json", None)
    assert found.files == written.files, variant
module = kernels.get_local_kernel(folder)
x, y = torch.randn(9, 4), torch.randn(9, 3)
torch.testing.assert_close(module.mse_loss(x, -x), torch.nn.functional.mse_loss(x, -x))
repositories = {
    name: {"cpu": {Mode.TRAINING | Mode.TORCH_COMPILE: LocalLayerRepository(folder, layer_name=name)}}
    for name in ("Linear", "MSELoss")
}
for name in repositories:
    kernels.replace_kernel_forward_from_hub(getattr(torch.nn, name), name)

class Trained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3, bias=False))
        self.loss = torch.nn.MSELoss(reduction="sum")

    def forward(self, x, y):
        return self.loss(self.head(x), y)

plain, ours = Trained(), Trained()
with kernels.use_kernel_mapping(repositories, inherit_mapping=False):
    kernels.kernelize(ours, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
for layer, forward in ((ours.head[0], "Linear"), (ours.head[2], "Linear"), (ours.loss, "MSELoss")):
    assert layer.forward.__func__ is getattr(module.layers, forward).forward
for model in (plain, ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
    model.zero_grad()
    model(x, y).backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
print("trained")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub.write(folder)
    (folder / "build" / "torch-cpu" / "left over").touch()
    hub.write(folder)
    return folder


def child(script: str, repository: Path, *args: object) -> str:
    """What a fresh Python prints that runs ``script`` outside the checkout."""
    return python("-c", script, *args, cwd=repository, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_each_copy_is_the_package(repository: Path) -> None:
    """With what the wheel has but py.typed; the digests are those of the files."""
    package = {
        path.relative_to(KERNELS).as_posix(): path.read_bytes()
        for path in KERNELS.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "py.typed"
    }
    identifiers = set()
    variants = sorted((repository / "build").iterdir())
    assert [variant.name for variant in variants] == [f"torch-{backend}" for backend in hub.BACKENDS]
    for folder in (repository / "torch-ext" / hub.NAME, *variants):
        copy = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        metadata = copy.pop("metadata.json", None)
        assert copy == package
        if metadata is not None:
            said = json.loads(metadata)
            identifiers.add(said["id"])
            assert said["id"].isidentifier()
            assert folder.name == f"torch-{said['backend']['type']}"
            assert said["digest"]["files"] == {
                name: base64.b64encode(hashlib.sha256(content).digest()).decode()
                for name, content in copy.items()
            }
    assert len(identifiers) == len(variants)


@pytest.mark.parametrize("kept", ["notes", ".git", "build.toml", "torch-ext"])
def test_another_folder_is_left_alone(tmp_path: Path, kept: str) -> None:
    """Such as the current one: not even an earlier repository that holds more is deleted."""
    if kept in ("notes", ".git"):
        (tmp_path / "build.toml").write_text(hub.BUILD)
    (tmp_path / kept).write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match="neither empty nor an earlier repository"):
        hub.write(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / kept).read_text() == "mine"


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--folder", 2)])
def test_an_option_is_no_folder(argument: str, status: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, hub.ROOT / "hub.py", argument], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == status
    assert "usage: hub.py [-h] [FOLDER]" in done.stdout + done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.unwatched
@pytest.mark.parametrize("beside", ["alone", "beside"])
def test_a_variant_loads(repository: Path, beside: str) -> None:
    """Under its own name, operators included, and without importing NumPy before the reference is asked for."""
    said = child(LOADED + WORK, repository, repository / "build" / "torch-cpu", beside)
    assert "'layers'" in said


def test_numpy_stays_where_it_is_needed() -> None:
    """In the reference, in verify, and in the tables of the optimizers' Triton launches."""
    found = {
        path.relative_to(KERNELS).as_posix()
        for path in KERNELS.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
        if name and name.partition(".")[0] == "numpy"
    }
    assert {name for name in found if not name.startswith(("reference/", "verify/"))} == {
        "triton/multi_tensor.py",
        "triton/stacked.py",
    }


@pytest.mark.unwatched
def test_the_client_loads_it(repository: Path) -> None:
    """And puts the layers in the place of torch's."""
    try:
        importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's kernels")
    assert child(CLIENT, repository, repository, " ".join(hub.BACKENDS)).splitlines()[-1] == "trained"
