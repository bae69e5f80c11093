"""The shortest whole training with gradkernels: scikit-learn's diabetes table, mini-batches, a loss per ten epochs.

    python examples/minimal.py

examples/regression.py does the same for any table, with checkpoints, records, pictures and predictions.
"""

import torch
from gradkernels import FusedAdam, linear_mse_loss
from sklearn.datasets import load_diabetes

EPOCHS, BATCH = 60, 64


def main() -> float:
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True, scaled=False))
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    held_out, train = order[:88], order[88:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()

    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = FusedAdam([w, b], lr=0.05, max_norm=5.0, on_nonfinite="raise")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(1, EPOCHS + 1):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            optimizer.zero_grad()
            linear_mse_loss(x[batch], w, y[batch], b).backward()
            optimizer.step()
        schedule.step()
        if epoch % 10 == 0:
            with torch.no_grad():
                losses = [linear_mse_loss(x[rows], w, y[rows], b).item() for rows in (train, held_out)]
            print("epoch {:2}: train loss {:.4f}, validation loss {:.4f}".format(epoch, *losses))
    return losses[0]  # in variances of the target


if __name__ == "__main__":
    main()
