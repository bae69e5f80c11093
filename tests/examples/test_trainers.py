"""Training libraries drive the optimizers as torch's own: their clipping, their bfloat16 autocast, their resuming.

No library is needed by this package or its other tests: where one is missing its test is skipped.
"""

import json
from pathlib import Path

import pytest
import torch

from ..helpers import python

# Each program trains four epochs, and the last two again from what the library kept after the second.
BEGINNING = """
import json
import sys

import torch
from gradkernels import FusedAdamW, mse_loss
from torch.utils.data import DataLoader, TensorDataset

optimizer_class = FusedAdamW if sys.argv[1] == "ours" else torch.optim.AdamW
torch.manual_seed(0)
X = torch.randn(64, 4)
Y = X.sum(1, keepdim=True)


def flat(model):
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()]).tolist()


def model_class(base=torch.nn.Module):
    class Model(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.linear = torch.nn.Linear(4, 1)

    return Model
"""
PROGRAMS = {
    "accelerate": """
from accelerate import Accelerator


def train(epochs, keep=None, resume=None):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = model_class()().linear
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=40)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if resume:
        accelerator.load_state(resume)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(mse_loss(model(x), y))
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    if keep:
        accelerator.save_state(keep)
    return flat(model)


whole = train(4)
train(2, keep="state")
resumed = train(2, resume="state")
""",
    "transformers": """
from transformers import Trainer, TrainingArguments


class Model(model_class()):
    def forward(self, x, labels):
        return {"loss": mse_loss(self.linear(x), labels)}


def train(**resume):
    trainer = Trainer(
        model=Model(),
        args=TrainingArguments(
            "output", num_train_epochs=4, save_strategy="epoch", bf16=True, use_cpu=True, report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=[dict(x=x, labels=y) for x, y in zip(X, Y)],
        optimizer_cls_and_kwargs=(optimizer_class, {"lr": 0.05}),
    )
    assert trainer.args.max_grad_norm == 1.0  # the library clips
    trainer.train(**resume)
    assert isinstance(trainer.optimizer.optimizer, optimizer_class)
    return flat(trainer.model)


whole = train()
resumed = train(resume_from_checkpoint="output/checkpoint-16")
""",
    "lightning": """
import lightning
from lightning.pytorch.callbacks import ModelCheckpoint


class Model(model_class(lightning.LightningModule)):
    def training_step(self, batch, index):
        return mse_loss(self.linear(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = optimizer_class(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)]


def train(**resume):
    model = Model()
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", precision="bf16-mixed", gradient_clip_val=1.0, logger=False,
        callbacks=[ModelCheckpoint("kept", "{epoch}", save_top_k=-1)], enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=8), **resume)
    return flat(model)


whole = train()
resumed = train(ckpt_path="kept/epoch=1.ckpt")
""",
}
END = """
print(json.dumps({"start": flat(model_class()()), "whole": whole, "resumed": resumed}))
"""


@pytest.mark.parametrize("library", PROGRAMS)
def test_clipping_amp_and_resuming(library: str, tmp_path: Path) -> None:
    """The library's own clipping and bfloat16 autocast end at torch's weights; a resumed run, at its own to the bit."""
    pytest.importorskip(library)
    ends = {}
    for whose in ("ours", "torch"):
        (tmp_path / whose).mkdir()
        printed = python("-c", BEGINNING + PROGRAMS[library] + END, whose, cwd=tmp_path / whose)
        ends[whose] = json.loads(printed.splitlines()[-1])
        assert ends[whose]["resumed"] == ends[whose]["whole"]
    ours, plain = (torch.tensor(ends[whose]["whole"]) for whose in ("ours", "torch"))
    assert (ours - torch.tensor(ends["ours"]["start"])).abs().min() > 0.1, "it trained"
    torch.testing.assert_close(ours, plain)
