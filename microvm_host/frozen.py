# SPDX-License-Identifier: MIT
"""`@frozen`: a frozen dataclass for the way between `systemctl start` and the hypervisor.

The standard `dataclasses` imports `inspect`, which takes twice as long as starting the
interpreter (15 ms beside 7), in each helper that a start runs. The toolkit's records need four
methods of it only, and these are here. Type checkers see a standard frozen dataclass; a unit test
holds both to the same behaviour. This module must import nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar, dataclass_transform

    _T = TypeVar("_T")

    @dataclass_transform(frozen_default=True)
    def frozen(cls: type[_T]) -> type[_T]: ...

else:

    def frozen(cls):
        """Make `cls` an immutable value with the fields that it annotates.

        Gives it `__init__` (by position and name, with defaults), `__eq__`, `__hash__` and
        `__repr__`, all by field. Fields are not inherited.

        Raises:
            TypeError: from `__init__`, for a missing, unknown or twice given field.
            AttributeError: from an assignment to a field, or deleting one.
        """
        fields = tuple(cls.__annotations__)
        defaults = {name: cls.__dict__[name] for name in fields if name in cls.__dict__}

        def __init__(self, *args, **kwargs):
            if len(args) > len(fields):
                raise TypeError(f"{cls.__name__} takes {len(fields)} fields, not {len(args)}")
            given = dict(zip(fields, args, strict=False))
            for name in kwargs:
                if name in given or name not in fields:
                    raise TypeError(f"{cls.__name__}: field {name!r} is unknown or given twice")
            found = {**defaults, **given, **kwargs}
            if len(found) < len(fields):
                name = next(name for name in fields if name not in found)
                raise TypeError(f"{cls.__name__}: field {name!r} is missing")
            # At one stroke: a declaration has twenty fields, and a host may have a thousand.
            self.__dict__.update(found)

        def values(self):
            return tuple(getattr(self, name) for name in fields)

        def __eq__(self, other):
            return values(self) == values(other) if type(other) is cls else NotImplemented

        def __hash__(self):
            return hash(values(self))

        def __repr__(self):
            inner = ", ".join(f"{name}={getattr(self, name)!r}" for name in fields)
            return f"{cls.__name__}({inner})"

        def __setattr__(self, name, value):
            raise AttributeError(f"{cls.__name__} is frozen: cannot set {name!r}")

        def __delattr__(self, name):
            raise AttributeError(f"{cls.__name__} is frozen: cannot delete {name!r}")

        cls.__match_args__ = fields
        for method in (__init__, __eq__, __hash__, __repr__, __setattr__, __delattr__):
            setattr(cls, method.__name__, method)
        return cls
