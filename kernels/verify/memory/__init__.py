"""The memory checker: ``check`` judges the accesses that ``interpreter`` reports, by ``regions`` and ``shadow``."""

from .check import memory_check as memory_check
