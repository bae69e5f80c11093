"""A process in which Triton's launcher goes over the stand-in: calls come in and results go out as JSON lines."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Worker:
    """The parent's end."""

    def __init__(self, log: Path, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = os.pathsep.join([inherited.get("PYTHONPATH", ""), str(ROOT)])
        self._errors = log.with_suffix(".stderr")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={**inherited, "PYTHONPATH": path, "GRADKERNELS_CUDA_LOG": str(log), **environment},
            )

    def call(self, name: str, *args: Any) -> Any:
        """The result of ``calls.<name>(*args)`` in the worker.

        Raises:
            AssertionError: what was raised there, with its traceback.
        """
        assert self._process.stdin
        assert self._process.stdout
        line = ""
        if self._process.poll() is None:
            self._process.stdin.write(json.dumps([name, args]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise AssertionError(f"the worker died with {code}: {self._errors.read_text()[-4000:]}")
        answer = json.loads(line)
        assert "raised" not in answer, answer["raised"]
        return answer["returned"]

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    from .standin import activate

    standin = activate()
    # Kernels are imported after the driver is there.
    if standin.tensors.type == "cuda":
        from .cuda_calls import CudaCalls as Calls
    else:
        from .calls import Calls

    worker = Calls(standin)
    for line in sys.stdin:
        name, args = json.loads(line)
        try:
            answer = {"returned": getattr(worker, name)(*args)}
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
