"""The parts of examples/regression.py: settings, reading, preparing, training, model, report."""
