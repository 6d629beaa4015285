"""The fused operators, a file each: arguments, checks, reference, bound, problem and how their kernel is launched.

Importing this package imports every file of it, which registers its operator.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
