"""Throughput of every op against what one would use instead: ``python -m bench``.

Once installed it is ``python -m gradkernels.bench``.
"""
