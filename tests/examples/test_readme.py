"""The README's examples run and find what they promise; so do the lines for training libraries."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from ..helpers import python

ROOT = Path(__file__).parents[2]
PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
USE = ROOT / "docs" / "use"
TRAINER_LINES = re.findall(r"```python title=.*?\n(.*?)```", (USE / "trainers.md").read_text(), re.DOTALL)
# A training program of each library, around the page's lines; it prints the optimizer's class and its result.
TRAINERS = {
    "transformers": """
import functools
import transformers
class Model(torch.nn.Linear):
    def forward(self, x, labels):
        return {{"loss": mse_loss(super().forward(x), labels)}}
model = Model(4, 1)
dataset = [dict(x=x, labels=y) for x, y in zip(X, Y)]
transformers.TrainingArguments = functools.partial(
    transformers.TrainingArguments,
    "output", num_train_epochs=5, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
)
{snippet}
optimizer = trainer.optimizer.optimizer
""",
    "lightning": """
from torch.utils.data import DataLoader, TensorDataset
{snippet}
class Whole(Model):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        return mse_loss(self.linear(batch[0]), batch[1])
model = Whole()
trainer = lightning.Trainer(
    max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False{clip}
)
trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=8))
(optimizer,) = trainer.optimizers
""",
}
# What makes torch.optim.AdamW's program of the page's: it clips outside the step.
SWAPPED = {
    "from gradkernels import FusedAdamW\n": "",
    "FusedAdamW": "torch.optim.AdamW",
    "max_grad_norm=0.0": "max_grad_norm=1.0",
    ', "max_norm": 1.0': "",
    ", max_norm=1.0": "",
    "print(trainer.optimizer.optimizer.grad_norm)": "",
}
BEGINNING = """
import torch
from gradkernels import mse_loss
torch.manual_seed(0)
X = torch.randn(64, 4)
Y = X.sum(1, keepdim=True)
"""
END = """
print(type(optimizer).__name__, *torch.cat([param.detach().reshape(-1) for param in model.parameters()]).tolist())
"""
ENDINGS = {
    "linear_mse_loss": "[2.0, -1.0, 0.5, 3.0]",
    "stacked=True": "tensor(True)",
    "verify.gradcheck": "the gradient is 1/2",
}
# What proves each row of the optimizers' table for ours.
ROWS = {
    "`state_dict` moves both ways with torch.optim": "optim/test_contract::test_checkpoints_move_both_ways_in_mid_run",
    "amsgrad": "optim/test_db::test_configurations_on_the_kernels",
    "maximize": "optim/test_db::test_configurations_on_the_kernels",
    "float64 parameters": "optim/test_db::test_configurations_on_the_kernels",
    "SGD with bfloat16 parameters": "optim/test_sgd::test_matches_torch_and_numpy",
    "sparse gradients (SGD), complex parameters": "optim/test_rare_tensors::test_sparse_gradients",
    "gradients of another dtype than the parameter": "optim/test_low_precision::test_gradients_of_another_dtype",
    "gradients strided unlike the parameter": "optim/test_layouts::test_any_strides",
    "SGD momentum for a parameter whose first gradient comes late": (
        "optim/test_groups::test_a_parameter_whose_gradients_come_and_go"
    ),
    "SGD momentum after an overflow on the first step": "optim/test_amp::test_a_skipped_step_never_happened",
    "version counters, so that autograd sees the write": "optim/test_layouts::test_the_version_counter_moves",
    "GradScaler without a host sync": "optim/test_amp::test_the_step_on_the_kernels_reads_no_value",
    "clipping inside the step": "optim/test_clipping::test_max_norm_is_clip_grad_norm_then_step",
    "skips non-finite gradients without a scaler": "optim/test_clipping::test_skip_leaves_everything_untouched",
    "float32 master weights": "optim/test_low_precision::test_master_weights_are_the_float32_run",
    "stochastic rounding for bfloat16": (
        "optim/test_low_precision::test_stochastic_rounding_trains_where_plain_bfloat16_stalls"
    ),
    "FSDP2's DTensors": "optim/test_distributed::test_same_losses_as_one_process",
    "one launch for any number of tensors": "optim/test_adam::test_one_launch_for_any_number_of_tensors",
}


def test_the_two_commands_find_a_triton_for_each_python() -> None:
    """3.9.0 has no wheel for Python 3.10; there it is the pair that noxfile.py runs."""
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    named = [Requirement(line) for line in lines if not line.startswith("#")]
    for interpreter, *pair in (
        ("3.10", "2.12.1", "3.7.1"),
        ("3.11", "2.13.0", "3.9.0"),
        ("3.13", "2.13.0", "3.9.0"),
    ):
        found = {each.name: each for each in named if each.marker.evaluate({"python_version": interpreter})}
        for name, version in zip(("torch", "triton"), pair, strict=True):
            assert found[name].specifier.contains(version), (interpreter, name)


def test_every_row_of_the_optimizers_table_has_its_test() -> None:
    table = (USE / "optimizers.md").read_text().split("| | gradkernels | torch fused")[1].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert rows == list(ROWS)
    for proof in ROWS.values():
        file, _, test = proof.partition("::")
        assert f"\ndef {test}(" in (Path(__file__).parents[1] / f"{file}.py").read_text(), proof


def test_every_program_is_known() -> None:
    assert len(PROGRAMS) == len(ENDINGS)
    assert len(TRAINER_LINES) == len(TRAINERS)
    assert all("import" in program for program in PROGRAMS + TRAINER_LINES)


@pytest.mark.parametrize("uses", ENDINGS)
def test_program(uses: str, tmp_path: Path) -> None:
    program = next(program for program in PROGRAMS if uses in program)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ENDINGS[uses] in done.stdout + done.stderr


@pytest.mark.parametrize("library", TRAINERS)
def test_the_swap_in_a_trainer(library: str, tmp_path: Path) -> None:
    """The page's lines train a model in the library itself, to the numbers of torch.optim.AdamW and its clipping.

    Neither library is needed by this package or its tests: install it to run this.
    """
    pytest.importorskip(library)
    (snippet,) = (text for text in TRAINER_LINES if library in text)
    results = []
    for wanted, changes, clip in (
        ("FusedAdamW", {}, ""),
        ("torch.optim.AdamW", SWAPPED, ", gradient_clip_val=1.0"),
    ):
        lines = snippet
        for ours, theirs in changes.items():
            lines = lines.replace(ours, theirs)
        program = BEGINNING + TRAINERS[library].format(snippet=lines, clip=clip) + END
        name, *values = python("-c", program, cwd=tmp_path).splitlines()[-1].split()
        assert name == wanted.rpartition(".")[2]
        results.append(torch.tensor(list(map(float, values))))
    torch.testing.assert_close(*results)
