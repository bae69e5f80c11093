"""A scalar reverse-mode engine: an oracle for the references that shares no formula with them.

Each operation records, for each of its operands, the derivative of its result by that operand. ``backward``
walks the graph from the result to the leaves, every node after all the nodes that use it, and adds up what
arrives over every path:

    adjoint(operand) += adjoint(node) * d node / d operand
"""

from __future__ import annotations

Number = int | float


class Value:
    """One number in a graph of ``+ - * / **``, and the gradient that ``backward`` leaves on it.

    Args:
        data: the number.

    Attributes:
        data: the number, as a float.
        grad: the sum of the gradients of all ``backward`` calls so far; set it to 0.0 to start afresh.

    Example:
        >>> a = Value(3)
        >>> square = a * a
        >>> square.backward()
        >>> square.data, a.grad
        (9.0, 6.0)
    """

    __slots__ = ("_operands", "data", "grad")

    def __init__(self, data: Number, _operands: tuple[tuple[Value, float], ...] = ()) -> None:
        self.data = float(data)
        self.grad = 0.0
        self._operands = _operands  # (operand, derivative of this value by that operand)

    def __repr__(self) -> str:
        return f"Value({self.data}, grad={self.grad})"

    def __add__(self, other: Value | Number) -> Value:
        other = _value(other)
        return Value(self.data + other.data, ((self, 1.0), (other, 1.0)))

    def __sub__(self, other: Value | Number) -> Value:
        other = _value(other)
        return Value(self.data - other.data, ((self, 1.0), (other, -1.0)))

    def __mul__(self, other: Value | Number) -> Value:
        other = _value(other)
        return Value(self.data * other.data, ((self, other.data), (other, self.data)))

    def __truediv__(self, other: Value | Number) -> Value:
        other = _value(other)
        quotient = self.data / other.data
        return Value(quotient, ((self, 1.0 / other.data), (other, -quotient / other.data)))

    def __pow__(self, exponent: Number) -> Value:
        if not isinstance(exponent, Number):
            raise TypeError(f"exponent must be a number, not {type(exponent).__name__}")
        derivative = exponent * self.data ** (exponent - 1) if exponent else 0.0
        return Value(self.data**exponent, ((self, derivative),))

    def __neg__(self) -> Value:
        return Value(-self.data, ((self, -1.0),))

    def __radd__(self, other: Number) -> Value:
        return self + other

    def __rsub__(self, other: Number) -> Value:
        return _value(other) - self

    def __rmul__(self, other: Number) -> Value:
        return self * other

    def __rtruediv__(self, other: Number) -> Value:
        return _value(other) / self

    def backward(self) -> None:
        """Add ``d self / d node`` to ``node.grad`` for every node that this value was computed from."""
        adjoints = {self: 1.0}
        for node in _users_first(self):
            adjoint = adjoints[node]
            node.grad += adjoint
            for operand, derivative in node._operands:
                adjoints[operand] = adjoints.get(operand, 0.0) + adjoint * derivative


def _value(number: Value | Number) -> Value:
    return number if isinstance(number, Value) else Value(number)


def _users_first(result: Value) -> list[Value]:
    """Return the nodes below ``result``, each before its operands (no recursion: sums make long chains)."""
    order: list[Value] = []
    seen: set[Value] = set()
    stack = [(result, False)]
    while stack:
        node, operands_done = stack.pop()
        if operands_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((operand, False) for operand, _ in node._operands)
    return order[::-1]
