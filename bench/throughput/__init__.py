"""Check, time, report, compare: what ``python -m bench OP...`` is made of."""
