"""The tests that need torch's CUDA build, over stand-ins for CUDA's libraries: a part of ``make test-host``.

Makes an environment of its own in DIR, from the package index that pip is set up for: torch's CUDA build, the Triton
that belongs to it, the headers of CUDA's runtime, and what the tests import; none of CUDA's libraries. That is about
0.7 GB to download. Then it compiles the stand-ins and runs pytest twice: tests/host, and the tests marked gpu, of
which those that look at values count as expected failures.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRITON = {"2.11.0": "3.6.0", "2.13.0": "3.9.0"}  # by the version of torch
PACKAGES = [
    *("numpy<2.4", "filelock", "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools"),
    *("pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "expecttest"),
    *("rich", "matplotlib", "scikit-learn"),
]
# What stands for a CUDA library among the names of shared libraries and symbols.
LIBRARY = re.compile(r"lib(cu|nv|nccl)\w*\.so\.\d+")
SYMBOL = re.compile(r"__cuda|cu[A-Zdsbfp]|nccl|nvshmem|nvrtc|nvJitLink")
DRIVER = re.compile(r"cu(da)?[A-Z]")  # and the runtime


def install(folder: Path, torch: str, triton: str, *others: str, base: str = sys.executable) -> Path:
    """The Python of the environment, which is made if it is not there, from the Python ``base``.

    The ``others``, like torch and Triton, come without what they depend on.
    """
    python = folder / "venv" / "bin" / "python"
    if (folder / "installed").exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([base, "-m", "venv", folder / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    # Exactly this version of torch, not a local build of it for the CPU.
    bare = [f"torch==={torch}", f"triton=={triton}", "nvidia-cuda-runtime>=13,<14", *others]
    subprocess.run([*pip, "--no-deps", *bare], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)
    for library in folder.glob("venv/lib/python*/site-packages/nvidia/**/*.so*"):
        library.unlink()  # torch would find the real runtime first
    (folder / "installed").touch()
    return python


def symbols(library: Path) -> tuple[set[str], set[str]]:
    """(undefined, defined) dynamic symbols."""
    table = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True, check=True
    ).stdout
    undefined, defined = set(), set()
    for line in table.splitlines():
        columns = line.split()
        if len(columns) >= 8:
            (undefined if columns[6] == "UND" else defined).add(columns[7].split("@")[0])
    return undefined, defined


def build(environment: Path) -> None:
    """One library that stands for all of CUDA's, under each of the names by which torch asks for them.

    What torch's libraries need and the sources here do not define becomes a stub: it returns 0, or is refused if it
    belongs to the driver or the runtime, whose answers torch goes by.
    """
    site = next(environment.glob("venv/lib/python*/site-packages"))
    folder = environment / "lib"
    folder.mkdir(exist_ok=True)
    names, undefined, defined = {"libcuda.so.1"}, set(), set()
    for library in (site / "torch" / "lib").glob("*.so*"):
        dynamic = subprocess.run(
            ["readelf", "--dynamic", "--wide", library], capture_output=True, text=True, check=True
        ).stdout
        names |= {name for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic) if LIBRARY.fullmatch(name)}
        for found, kind in zip(symbols(library), (undefined, defined), strict=True):
            kind |= found
    includes = [
        f"-I{path}" for path in (*site.glob("nvidia/cu*/include"), site / "triton/backends/nvidia/include")
    ]
    compile_c = ["gcc", "-fPIC", "-O1", "-pthread", "-w", *includes]
    objects = []
    for source in (HERE / "libcuda.c", HERE / "libcudart.c"):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*compile_c, "-c", source, "-o", objects[-1]], check=True)
    listing = subprocess.run(["nm", "--defined-only", *objects], capture_output=True, text=True, check=True)
    written = {line.split()[-1] for line in listing.stdout.splitlines() if line.strip()}
    missing = sorted(name for name in undefined - defined - written if SYMBOL.match(name))
    stubs = folder / "stubs.c"
    answers = {name: f'standin_missing("{name}")' if DRIVER.match(name) else "0" for name in missing}
    stubs.write_text(
        "".join(f"int {name}(void) {{ return {answer}; }}\n" for name, answer in answers.items())
    )
    library = folder / "libcuda.so.1"
    subprocess.run([*compile_c, "-shared", "-o", library, *objects, stubs, "-ldl"], check=True)
    for name in names - {library.name}:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(library.name)


def environment(folder: Path) -> dict[str, str]:
    """The variables under which torch and Triton find the stand-ins."""
    libraries = folder / "lib"
    package = folder / "package"
    package.mkdir(exist_ok=True)
    link = package / "gradkernels"
    link.unlink(missing_ok=True)  # that of another checkout, if the folder is shared
    link.symlink_to(ROOT / "kernels")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **inherited,
        "LD_LIBRARY_PATH": str(libraries),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
        "PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK": "1",  # there is none
        "GRADKERNELS_CUDA_LOG": "",  # no record but those of the workers, which name their files
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/host/cuda_build.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "host", help="default: build/host")
    parser.add_argument(
        "--torch", default="2.11.0", choices=TRITON, help="with the Triton that belongs to it"
    )
    parser.add_argument("pytest", nargs="*", help="arguments of one run of pytest in place of the two")
    options = parser.parse_args()
    folder = options.dir.resolve() / f"torch-{options.torch}"
    python = install(folder, options.torch, TRITON[options.torch])
    build(folder)
    runs = [options.pytest] if options.pytest else [["tests/host"], ["tests", "-m", "gpu and not full"]]
    codes = [
        subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.host.no_values", "-n", "2", *run],
            cwd=ROOT,
            env=environment(folder),
            check=False,
        ).returncode
        for run in runs
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
