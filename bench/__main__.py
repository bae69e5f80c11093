"""The command ``python -m bench``; once installed it is ``python -m gradkernels.bench``."""

import argparse
import importlib
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gradkernels.ops import OPS as RECORDS
from gradkernels.verify.console import positive

from .throughput.results import claimed

OPS = (*RECORDS, "training")  # the ops, and what is made of them
COMMANDS = {"throughput": ("report", "compare", "merge"), "reports": ("aot", "host", "traffic", "tune")}
EXAMPLES = """
other commands:
  report FILE...          pictures and an HTML page from results (beside each file, or --out DIR)
  compare BEFORE AFTER    case by case, noise taken into account; exit status 1 if something became slower
  merge FILE... --out DIR the rounds of several runs as one, whose noise is that between processes
  aot                     what the compiler makes of every kernel (needs triton, no GPU)
  host                    what a call costs the host, beside torch's own
  traffic                 bytes moved and launches of every op, counted under the interpreter
  tune                    time the tiles of large products on this GPU and keep the best

examples:
  python -m bench --quick
  python -m bench linear_mse --shape 200000x512x1 --dtype bfloat16
  python -m bench adam --json before.json
  python -m bench --busy adam linear_mse --quick
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Check every op against its NumPy reference, then time it beside what one would use.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (default: all)")
    made.add_argument(
        "--dtype", action="append", metavar="NAME", help="float32, bfloat16, ...; may be repeated"
    )
    made.add_argument(
        "--shape",
        action="append",
        metavar="AxB",
        help="the sizes of the op's axes, such as 1e6x64x1, instead of the declared ones",
    )
    made.add_argument("--quick", action="store_true", help="fewer shapes and shorter timings: minutes in all")
    made.add_argument(
        "--device", help="cuda, cpu, mps, xpu (default: the accelerator that is there, else cpu)"
    )
    made.add_argument("--precision", choices=("ieee", "tf32"), help="of float32 products on CUDA")
    made.add_argument("--seconds", type=positive, metavar="S", help="of timing per implementation and case")
    made.add_argument(
        "--busy",
        action="store_true",
        help="instead: ours and plain torch in turns on a CPU whose cores all have other work",
    )
    made.add_argument("--scale", action="store_true", help="also how time grows with each size")
    made.add_argument(
        "--budget",
        type=positive,
        metavar="S",
        help="start nothing after so many seconds, nor what could end a fifth later, and end what runs until then; "
        "the most telling cases come first, what was left out is said last",
    )
    made.add_argument("--json", type=claimed, metavar="FILE")
    made.add_argument(
        "--out",
        metavar="DIR",
        help="bench.json, bench.csv and the report in a folder; {device} is this machine's name",
    )
    # The folder that throughput.session shares with a child.
    made.add_argument("--under", type=Path, help=argparse.SUPPRESS)
    return made


def declared(names: Sequence[str]) -> list[Any]:
    """Return the declarations of these ops (default: all)."""
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise ValueError(f"unknown op {unknown[0]!r}; expected {', '.join(OPS)}")
    return [importlib.import_module(f".bench_{name}", __package__).OP for name in names or OPS]


def pick_device(name: str | None) -> Any:
    """Return the device asked for, by default the accelerator or else the CPU, as the current one.

    Raises:
        ValueError, RuntimeError: it is not there.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(name) if name else accelerator or torch.device("cpu")
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise ValueError(f"--device {name}: this machine has no {device.type} device")
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)  # events, streams and waits are the current device's
    return device


def cases_of(ops: Sequence[Any], arguments: argparse.Namespace, device_type: str) -> list[Any]:
    """Return the cases that the arguments select."""
    import torch

    dtypes = [getattr(torch, name, None) for name in arguments.dtype or ()]
    for name, dtype in zip(arguments.dtype or (), dtypes, strict=True):
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"--dtype {name}: expected float32, bfloat16, ...")
    cases = []
    for op in ops:
        if arguments.shape:
            first = op.dtypes.get(device_type, op.dtypes["cpu"])[:1]
            for text in arguments.shape:
                for dtype in dtypes or first:
                    cases += op.build(op.shape(text), dtype)
        else:
            cases += [
                case for case in op.cases(device_type, arguments.quick) if not dtypes or case.dtype in dtypes
            ]
    return cases


def most_telling_first(cases: Sequence[Any]) -> list[int]:
    """Return the cases' numbers: of each variant of each op the last shape, which every dtype has, then the others."""
    last = {(case.op, case.variant): case.sizes for case in cases}
    taken: Counter[Any] = Counter()
    ranks = []
    for number, case in enumerate(cases):
        kind = (case.op, case.variant, case.sizes != last[case.op, case.variant])
        ranks.append((kind[2], taken[kind], number))
        taken[kind] += 1
    return [number for *_, number in sorted(ranks)]


def run(argv: Sequence[str]) -> int:
    """Check, time, print, write; exit status 1 if a result of ours is wrong."""
    begin = time.monotonic()
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.busy and arguments.device not in (None, "cpu"):
        made.error(f"--busy is about the CPU, not --device {arguments.device}")
    import torch

    from .throughput import busy, machine, memory
    from .throughput.console import Screen
    from .throughput.session import Session, supervise

    if arguments.precision:
        torch.backends.cuda.matmul.fp32_precision = arguments.precision
    try:
        device = pick_device("cpu" if arguments.busy else arguments.device)
        ops = declared(arguments.ops)
        cases = cases_of(ops, arguments, device.type)
        described = machine.describe(device)
        if device.type == "cpu":
            described["memory"] = memory.recycle()
        jsons = [arguments.json] if arguments.json else []
        folder = Path(arguments.out.replace("{device}", machine.slug(described))) if arguments.out else None
        if folder:
            claimed(folder / "bench.csv")
            jsons.append(claimed(folder / "bench.json"))
    except (argparse.ArgumentTypeError, ValueError, RuntimeError) as error:
        made.error(str(error))
    if arguments.busy:
        return busy.run(cases, arguments.seconds or 2.0, Screen())
    if device.type != "cpu" and arguments.under is None:
        return supervise(argv, begin, arguments.budget)
    if arguments.under is not None:  # it is ended by an interrupt, which a shell's background jobs ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return measure(arguments, device, ops, cases, described, jsons, folder, Session(arguments.under, begin))


def measure(
    arguments: argparse.Namespace,
    device: Any,
    ops: Sequence[Any],
    cases: Sequence[Any],
    described: dict[str, Any],
    jsons: Sequence[Path],
    folder: Path | None,
    session: Any,
) -> int:
    """Check and time what the session lacks, print, write; exit status 1 if a result of ours is wrong."""
    import torch

    from .throughput import report, results, scale
    from .throughput.budget import Budget
    from .throughput.console import Screen
    from .throughput.runner import Runner, first_line
    from .throughput.session import LostError
    from .throughput.timing import timer_for

    screen, seconds = Screen(), arguments.seconds or (0.14 if arguments.quick else 0.7)
    sweeps = [(op, sweep) for op in ops if arguments.scale for sweep in op.sweep(device.type)]
    planned = dict.fromkeys([case.name for case in cases] + [scale.name_of(*each) for each in sweeps])
    status = 0
    why = f"the budget of {arguments.budget or 0:.0f} s was spent"

    def keep() -> dict[str, Any]:
        """Write what is known, for whatever ends the run next; return it as a document."""
        found = [session.found[name] for name in planned if name in session.found]
        document = session.head | {"cases": [record for record in found if "axis" not in record]}
        if arguments.scale:
            document["scale"] = [record for record in found if "axis" in record]
        session.save()
        for path in jsons:
            results.write_json(document, path)
        return document

    try:
        timer = timer_for(device)
        long, short = (
            Runner(device, timer, each, arguments.quick, session.within) for each in (seconds, seconds / 3)
        )
        parts = {cases[i].name: (long, partial(long.case, cases[i])) for i in most_telling_first(cases)}
        for each in sweeps:
            parts[scale.name_of(*each)] = short, partial(scale.study, *each, short, torch.float32)
        if not session.head:
            session.at("the limits of this machine")
            session.head = beginning(arguments, described, device, timer, seconds, screen)
        budget = Budget(arguments.budget, session.begin)
        with screen.progress(len(parts), len(session.found)) as advance, budget.enforced():
            for name, (runner, part) in parts.items():
                if name in session.found or not budget.admits():
                    continue
                session.at(name)
                advance(name)
                lost = session.lost.get(name, {})
                try:
                    session.found[name] = part(lost=lost)
                except Exception as error:  # of the benchmark's own; what an implementation raises is its row
                    traceback.print_exc()
                    if reason := runner.refusal():
                        session.leave(runner.running, reason)
                    session.found[name] = part(lost={**lost, "": first_line(error)})
                except LostError as error:
                    session.leave(runner.running, str(error))
                keep()
    except KeyboardInterrupt:
        if not session.head:
            raise
        status, why = 130, "it was interrupted"
    except Exception as error:
        if not session.head:
            raise
        traceback.print_exc()
        status, why = 1, first_line(error)
    session.at("")
    document = keep()
    screen.document(document)
    for path in jsons:
        screen.line(f"written: {path}")
    if folder:
        results.write_csv(document, folder / "bench.csv")
        try:  # last, so that a fault in it loses nothing
            report.draw(document, folder)
        except Exception:
            traceback.print_exc()
            status = status or 1
    if left := [name for name in planned if name not in session.found]:
        screen.line(f"not timed: {len(left)} of {len(planned)}, {why}: " + "; ".join(left))
    return status or int(not results.all_right(document))


def beginning(
    arguments: argparse.Namespace,
    described: dict[str, Any],
    device: Any,
    timer: Any,
    seconds: float,
    screen: Any,
) -> dict[str, Any]:
    """Measure the machine's limits, print and return the head of a document."""
    from .throughput import machine, results
    from .throughput.console import header

    load = machine.load_average()
    limits = machine.measure_rates(device, timer, min(seconds, 0.5))
    busy = machine.signs_of_other_work(described, limits, load)
    for line in header(described, limits):
        screen.line(line)
    for line in busy:
        screen.line(f"warning: {line}", "bad")
    settings = {"quick": arguments.quick, "seconds": seconds}
    return {
        "schema": results.SCHEMA,
        "machine": described,
        "limits": limits,
        "settings": settings,
        "busy": busy,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for folder, commands in COMMANDS.items():
        if argv and argv[0] in commands:
            return importlib.import_module(f".{folder}.{argv[0]}", __package__).main(argv[1:])
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
