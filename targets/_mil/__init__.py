"""Reference evaluator: run a Core ML package without Core ML, each operator computed by torch on the CPU of any system.

`Evaluator` executes the program of a package, operator by operator. Each operator is implemented by one function in
`layers`, `arithmetic`, `shapes`, `sampling`, `recurrent` or `compressed`, registered under the operator's name in MIL,
Core ML's intermediate language. To add an operator, add a function there. Semantics follow coremltools' operator
definitions (apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html).
"""

from targets._mil.evaluator import Evaluator, Rounding

__all__ = ["Evaluator", "Rounding"]
