"""References to factories, `module:attribute` or `path/to/file.py:attribute`, by which another process finds them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from polyshard.core.errors import RegistrationError


def resolve(reference: str) -> Any:
    """Return the object that a reference names.

    Raises:
        RegistrationError: the object cannot be imported or found; the cause is chained.

    Examples:
        >>> resolve("math:sqrt")(9)
        3.0
    """
    module_name, _, attribute = reference.rpartition(":")
    if not module_name or not attribute:
        raise RegistrationError(f"{reference!r} is invalid: expected 'module:attribute' or 'file.py:attribute'")
    try:
        found: Any = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name)
    except Exception as error:
        raise RegistrationError(
            f"{reference!r}: importing {module_name!r} raised {type(error).__name__}: {error}. "
            "Make the module importable in every process of the engine (installed, or on PYTHONPATH)."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RegistrationError(f"{reference!r} does not exist: {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    return found


def reference_of(factory: Any) -> str:
    """Return the reference by which another process finds `factory`.

    Raises:
        RegistrationError: there is none (a lambda, a closure, an object created at run time).

    Examples:
        >>> reference_of(resolve)
        'polyshard.registry.reference:resolve'
    """
    module_name = getattr(factory, "__module__", None)
    qualname = getattr(factory, "__qualname__", None)
    way_out = (
        "Workers of a serving engine are new processes. Define the factory at the top level of an importable module, "
        "or pass 'module:attribute'."
    )
    if not module_name or not qualname:
        raise RegistrationError(f"{factory!r} has no module and name by which a worker could find it. {way_out}")
    if "<" in qualname:
        raise RegistrationError(f"{module_name}:{qualname} cannot be found by name in a worker. {way_out}")
    module = sys.modules.get(module_name)
    if module_name == "__main__":
        spec = getattr(module, "__spec__", None)
        if spec is not None:  # python -m package.module
            module_name = spec.name.removesuffix(".__main__") if spec.name != "__main__" else module_name
        elif not getattr(module, "__file__", None):
            raise RegistrationError(
                f"__main__:{qualname} was defined at a prompt, where workers cannot import it. {way_out}"
            )
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not factory:
        raise RegistrationError(f"{module_name}:{qualname} names a different object from the one given. {way_out}")
    return f"{module_name}:{qualname}"


def _load_module(name: str) -> ModuleType:
    if name == "__main__":
        return sys.modules["__main__"]
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    name = f"polyshard_model_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
