"""Which dtype sums are accumulated in."""

from .checks import acc_dtype as accumulator

__all__ = ["accumulator"]
