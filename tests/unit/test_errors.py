# SPDX-License-Identifier: MIT
"""Errors: one line, and the exit codes that units rely upon."""

from __future__ import annotations

import pytest

from microvm_host import errors


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (errors.MicrovmHostError, 1),
        (errors.PackageError, 78),
        (errors.DeclarationError, 78),
        (errors.NameInvalid, 2),
        (errors.UsageError, 2),
    ],
)
def test_exit_codes(cls: type[errors.MicrovmHostError], code: int) -> None:
    assert cls("x").exit_code == code
    assert isinstance(cls("x"), errors.MicrovmHostError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.MicrovmHostError("it failed"), "it failed"),
        (errors.MicrovmHostError("it failed", path="/a"), "/a: it failed"),
        (errors.MicrovmHostError("it failed", path="/a", line=3), "/a:3: it failed"),
        (errors.MicrovmHostError("it failed", hint="mend it"), "it failed; mend it"),
        (errors.MicrovmHostError("x", path="/a b", line=1, hint="y"), "/a b:1: x; y"),
        (errors.MicrovmHostError("x", path="/a\nb"), "'/a\\nb': x"),
        (errors.MicrovmHostError("x", path="/\x1b[2J", line=2), "'/\\x1b[2J':2: x"),
    ],
)
def test_one_line(error: errors.MicrovmHostError, text: str) -> None:
    assert str(error) == text
