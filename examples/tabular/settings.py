"""What decides the numbers of a run."""

from dataclasses import dataclass

import torch


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line that says why."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, as the options of the command line name it."""

    data: str | None = None
    target: str | None = None
    features: str | None = None
    drop: str | None = None
    categories: str | None = None
    missing: str = "error"
    dates: str = "refuse"
    delimiter: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    header: str = "yes"
    na: str | None = None
    validation: float = 0.2
    batch_size: int | None = None
    epochs: int = 100
    restarts: str | None = None
    optimizer: str = "adam"
    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    max_norm: float = 5.0
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    backend: str = "auto"

    def restarts_at(self) -> list[int]:
        return [int(epoch) for epoch in self.restarts.split(",")] if self.restarts else []

    def reading(self) -> dict[str, str | None]:
        """Return what the next file of the same kind is read with."""
        return {name: getattr(self, name) for name in ("delimiter", "decimal", "encoding", "header", "na")}


def names_in(text: str, columns: list[str], table: str) -> list[str]:
    """Return the columns that a comma-separated option names; a name may hold a comma itself."""
    names = [text] if text in columns else [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in columns]:
        raise InputError(f"{table} has no column {unknown[0]!r}; its columns are {', '.join(columns)}")
    return names
