"""The same maths in NumPy float64, written to be read: what every backend is measured against."""
