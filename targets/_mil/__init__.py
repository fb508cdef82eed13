"""Run a Core ML package without Core ML: every operator of its program as torch computes it, on the CPU of any system.

`Evaluator` follows the program of a package, operator by operator. What an operator computes is one function in
`layers`, `arithmetic`, `shapes` or `compressed`, registered under its name in MIL, Core ML's intermediate language; a
new one is one function there. Semantics are those of coremltools' operator definitions
(apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html).
"""

from targets._mil.evaluator import Evaluator, Rounding

__all__ = ["Evaluator", "Rounding"]
