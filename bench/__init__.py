"""Throughput of every op against what one would use instead: ``python -m bench`` (``python -m gradkernels.bench``)."""
