"""The README's examples run and find what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
PROGRAMS = [
    block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "import" in block
]
ENDINGS = {
    "linear_mse_loss": (0, ""),
    "verify.gradcheck": (0, "the gradient is 1/2"),
    "verify.memory_check": (1, "out-of-bounds store in double: program (3, 0, 0) stores to y_ptr"),
}


def test_every_program_is_known() -> None:
    assert len(PROGRAMS) == len(ENDINGS)


@pytest.mark.parametrize("uses", ENDINGS)
def test_program(uses: str, tmp_path: Path) -> None:
    (program,) = (program for program in PROGRAMS if uses in program)
    if uses == "verify.memory_check":
        pytest.importorskip("triton")
    file = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    file.write_text(program)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    status, said = ENDINGS[uses]
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
