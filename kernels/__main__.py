"""Print versions and backends, check ops and files of kernels, explain the plan of a launch."""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from . import __version__, backends, verify
from .checks import DTYPES
from .ops import OPS, Shaped, op_name
from .triton.compile_only import CHIPS
from .verify.console import positive, print_table, to_json
from .verify.judge import command as judge
from .verify.ops import HEADER

BACKENDS = backends.NAMES[1:]  # all but "auto"


def info() -> dict[str, Any]:
    """Print versions, devices, the backend that serves each and why not the others, and settings that matter."""
    return {
        "gradkernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),  # the wheel's metadata may leave out what it was built for
        **{name: _version(name) for name in ("triton", "numpy")},
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "devices": [_device(name, label) for name, label in _devices()],
        "chosen backend": backends.current(),
        "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        "hugging face kernels": _version("kernels"),
        "ops": {name: list(OPS[op.of or name].public) for name, op in OPS.items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", platform.processor() or platform.machine())]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            found += [(f"{kind}:{i}", module.get_device_name(i)) for i in range(module.device_count())]
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    return found


def _device(name: str, label: str) -> dict[str, Any]:
    tensor = torch.empty(0, device=name)
    serves: dict[str, str] = {}
    for backend in BACKENDS:
        with backends.use_backend(backend):
            try:
                serves[backend] = "yes" if backends.backend_for(tensor) == backend else "no"
            except RuntimeError as error:
                serves[backend] = f"no: {str(error).partition(': ')[2]}"
    with backends.use_backend("auto"):
        return {"device": name, "name": label, "auto": backends.backend_for(tensor), "backends": serves}


def _info_command(arguments: argparse.Namespace) -> int:
    found = info()
    if arguments.json:
        print(to_json(found))
        return 0
    devices, ops = found.pop("devices"), found.pop("ops")
    if found["hugging face kernels"] is None:
        found["hugging face kernels"] = "not installed"
    print_table(("what", "value"), [(key, str(value)) for key, value in found.items() if value is not None])
    print()
    rows = [
        (
            d["device"],
            d["name"],
            d["auto"],
            *(d["backends"][name] for name in BACKENDS),
        )
        for d in devices
    ]
    print_table(("device", "name", "serves by default", *BACKENDS), rows)
    print()
    print_table(("op", "public"), [(name, ", ".join(public)) for name, public in ops.items()])
    return 0


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        sizes = (-1,)
    if min(sizes) < 0 or math.prod(sizes) >= 1 << 60:  # bytes are counted in 63 bits
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 4096x512x1, or beyond any memory")
    return sizes


def _verify_command(arguments: argparse.Namespace) -> int:
    if arguments.file is not None:
        if arguments.op or arguments.backend or arguments.device:
            raise ValueError("--op, --backend and --device are for our own ops, not for a file")
        return judge.run(arguments)
    if arguments.sarif or arguments.github or arguments.forward_only or arguments.seed:
        raise ValueError("--sarif, --github, --seed and --forward-only need a file")
    try:
        torch.empty(0, device=arguments.device)
    except (AssertionError, RuntimeError) as error:  # torch was built without it, or there is none
        raise ValueError(f"--device {arguments.device}: {str(error).partition(chr(10))[0]}") from None
    report = verify.kernels(
        arguments.op,
        shapes=arguments.shape,
        dtypes=None if arguments.dtype is None else [getattr(torch, name) for name in arguments.dtype],
        backends=arguments.backend or ("triton", "fallback"),
        device=arguments.device,
    )
    if arguments.json:
        print(report.to_json())
    else:
        print_table(HEADER, report.rows())
        for sentence in report.skipped:
            print(f"did not run: {sentence}")
        print(f"{sum(v.passed for v in report.verdicts)} of {len(report.verdicts)} cases passed")
    return 0 if report else 1


def _explain_command(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        print("explain: needs the triton package, which has no wheels for this machine or is not installed")
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # compiled, not interpreted
    from .explain import explain

    found = explain(arguments.op, arguments.shape, getattr(torch, arguments.dtype), arguments.target)
    print(to_json(asdict(found)) if arguments.json else "\n".join(found.lines()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status: 0 if all is well, 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m gradkernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gradkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    axes = ", ".join(f"{op.axes} for {op.name}" for op in OPS.values() if isinstance(op, Shaped) and op.axes)
    about = commands.add_parser("info", help="versions, devices, backends, settings")
    about.add_argument("--json", action="store_true")
    about.set_defaults(run=_info_command, parser=about)
    check = commands.add_parser(
        "verify",
        help="judge a file of kernels; without one, check every op against its NumPy reference",
    )
    check.add_argument(
        "file", nargs="?", metavar="FILE.py[::NAME]", help="the file to judge, or one name in it"
    )
    check.add_argument(
        "--op",
        action="append",
        type=op_name,
        choices=OPS,
        help="an op or one of its functions, such as mse_loss; may be repeated (default: all)",
    )
    check.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="4096x512x1",
        help=f"of the first input of a file, or of one --op ({axes}); may be repeated",
    )
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    check.add_argument("--dtype", action="append", choices=names)
    check.add_argument("--backend", action="append", choices=BACKENDS)
    check.add_argument(
        "--device", help="cuda, mps, cpu, ... (default: the accelerator that is there, else cpu)"
    )
    check.add_argument("--json", action="store_true")
    check.add_argument("--sarif", metavar="REPORT", help="write the faults of a file as SARIF")
    check.add_argument(
        "--github", action="store_true", help="print annotations of the lines, for a GitHub workflow"
    )
    check.add_argument(
        "--timeout", type=positive, default=120.0, metavar="SECONDS", help="for the whole file (default: 120)"
    )
    check.add_argument("--seed", type=int, default=0, help="of the random values that a file is judged at")
    check.add_argument("--forward-only", action="store_true", help="do not judge the gradients of a file")
    check.set_defaults(run=_verify_command, parser=check)
    why = commands.add_parser(
        "explain", help="which plan and tiles a shape gets, why, and what they compile to"
    )
    why.add_argument("op", type=op_name, choices=OPS, help="an op or one of its functions, such as mse_loss")
    why.add_argument(
        "shape", type=_shape, metavar="SIZES", help=f"such as 8192x512x1: {axes}; any for the others"
    )
    why.add_argument("--dtype", choices=names, default="float32", help="(default: float32)")
    why.add_argument("--target", choices=CHIPS, default="sm_90", help="the GPU (default: sm_90)")
    why.add_argument("--json", action="store_true")
    why.set_defaults(run=_explain_command, parser=why)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except ValueError as error:
        chosen: argparse.ArgumentParser = arguments.parser
        chosen.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
