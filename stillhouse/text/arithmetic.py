"""Arithmetic in text, evaluated without running anything: model output is never given to ``eval``."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable

LONGEST = 500  # characters of an expression
LARGEST_POWER = 64.0

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(text: str) -> float | None:
    """The value of an arithmetic expression, or None where it is none.

    Numbers, + − * / // % **, signs and brackets; every number is a float, so nothing can grow without bound. Names,
    calls, attributes, comparisons, tuples, exponents beyond ±64, texts beyond 500 characters, division by zero and
    results that are not finite all give None.

    Example:
        >>> evaluate("( 84.0 / 2 )"), evaluate("__import__('os')"), evaluate("9 ** 9 ** 9"), evaluate("(3 + x)")
        (42.0, None, None, None)
    """
    if len(text) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "5and 3": Python warns of what is refused here anyway
            value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > LARGEST_POWER or left < 0):
            raise ValueError("an exponent that is too large, or a root of a negative number")
        return _BINARY[type(node.op)](left, right)
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def same_value(a: float | None, b: float | None, tolerance: float = 1e-6) -> bool:
    """Whether two values are equal to a relative (below 1: absolute) tolerance; what is no value equals nothing.

    Example:
        >>> same_value(evaluate("1 / 3"), 0.3333333), same_value(None, None)
        (True, False)
    """
    return a is not None and b is not None and abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))
