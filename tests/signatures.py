"""Shapes and dtypes that a function's signature declares, checked while a test calls it."""

import beartype
import jaxtyping


def checked(fn):
    """The function with its shapes and dtypes checked."""
    return jaxtyping.jaxtyped(fn, typechecker=beartype.beartype)
