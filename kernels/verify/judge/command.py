"""The command ``python -m gradkernels verify FILE.py[::NAME]``."""

import argparse
import sys
from pathlib import Path

import torch

from . import verdict as v
from .process import judge
from .report import annotate, as_json, as_sarif, show
from .verdict import Case


def run(arguments: argparse.Namespace) -> int:
    """Judge the file and print the report; gives the exit status.

    Raises:
        ValueError: there is no such file, or no place for the report.
    """
    text, _, name = arguments.file.partition("::")
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"{text}: there is no such file")
    if arguments.sarif and not (report := Path(arguments.sarif).absolute()).parent.is_dir():
        raise ValueError(f"--sarif {arguments.sarif}: there is no such folder")
    if arguments.sarif and report.is_dir():
        raise ValueError(f"--sarif {arguments.sarif}: it is a folder")
    try:
        cases = _cases(path, name or None, arguments)
    except Exception as error:  # never a pass
        cases = [Case(path.stem, v.NOT_JUDGED, message=f"the judge failed: {type(error).__name__}: {error}")]
    if arguments.json:
        print(as_json(text, cases))
    else:
        show(text, cases)
    if arguments.sarif:
        Path(arguments.sarif).write_text(as_sarif(text, cases))
    if arguments.github:
        annotate(text, cases, sys.stderr if arguments.json else sys.stdout)
    return v.exit_status(v.of_file(cases))


def _cases(path: Path, name: str | None, arguments: argparse.Namespace) -> list[Case]:
    """Judge under the interpreter, and then on the GPU too where there is one."""
    cases: list[Case] = []
    for interpreted in (True, False) if torch.cuda.is_available() else (True,):
        cases += judge(
            path,
            name,
            timeout=arguments.timeout,
            shapes=arguments.shape or (),
            dtypes=arguments.dtype or (),
            seed=arguments.seed,
            forward_only=arguments.forward_only,
            interpreted=interpreted,
        )
    return cases
