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
# What proves each row of the optimizers' table for ours.
ROWS = {
    "`state_dict` moves both ways with torch.optim": "test_optim_contract::test_checkpoints_move_both_ways_in_mid_run",
    "amsgrad": "test_optim_db::test_configurations_on_the_kernels",
    "maximize": "test_optim_db::test_configurations_on_the_kernels",
    "float64 parameters": "test_optim_db::test_configurations_on_the_kernels",
    "SGD with bfloat16 parameters": "test_sgd::test_matches_torch_and_numpy",
    "sparse gradients (SGD), complex parameters": "test_optim_contract::test_sparse_gradients",
    "gradients of another dtype than the parameter": "test_optim_training::test_gradients_of_another_dtype",
    "gradients strided unlike the parameter": "test_optim_contract::test_any_strides",
    "SGD momentum for a parameter whose first gradient comes late": (
        "test_optim_contract::test_a_parameter_whose_gradients_come_and_go"
    ),
    "SGD momentum after an overflow on the first step": "test_optim_training::test_a_skipped_step_never_happened",
    "version counters, so that autograd sees the write": "test_optim_contract::test_the_version_counter_moves",
    "GradScaler without a host sync": "test_optim_training::test_the_step_on_the_kernels_reads_no_value",
    "clipping inside the step": "test_optim_training::test_max_norm_is_clip_grad_norm_then_step",
    "skips non-finite gradients without a scaler": "test_optim_training::test_skip_leaves_everything_untouched",
    "float32 master weights": "test_optim_training::test_master_weights_are_the_float32_run",
    "stochastic rounding for bfloat16": (
        "test_optim_training::test_stochastic_rounding_trains_where_plain_bfloat16_stalls"
    ),
    "FSDP2's DTensors": "test_distributed::test_same_losses_as_one_process",
    "one launch for any number of tensors": "test_adam::test_one_launch_for_any_number_of_tensors",
}


def test_every_row_of_the_optimizers_table_has_its_test() -> None:
    table = README.read_text().split("| | gradkernels | torch fused")[1].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == list(ROWS)
    for proof in ROWS.values():
        file, _, test = proof.partition("::")
        assert f"\ndef {test}(" in Path(__file__).with_name(f"{file}.py").read_text(), proof


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
