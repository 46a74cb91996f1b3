# SPDX-License-Identifier: MIT
"""Files for cloud-init that it would pass over are refused when the package is built."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from microvm_host.build import declared, tools
from microvm_host.build.tools import Tools
from microvm_host.declaration.guest import Guest
from microvm_host.errors import DeclarationError
from microvm_host.file_stamp import Inputs
from microvm_host.paths import HostPaths

from . import test_declared_golden as cases

RIGHT = [
    b"#cloud-config\nhostname: web\n",
    b"#cloud-config\r\nhostname: web\r\n",
    b"\n\n#cloud-config\n",
    b"#!/bin/sh\ntrue\n",
    b"## template: jinja\n#cloud-config\n",
    b"#cloud-config-archive\n- {}\n",
    b"#include\nhttps://example.org\n",
    b'Content-Type: multipart/mixed; boundary="x"\nMIME-Version: 1.0\n',
    gzip.compress(b"#cloud-config\n", mtime=0),
    b"",
]
WRONG = [
    (b"hostname: web\n", 'begin it with "#cloud-config"'),
    (b"# cloud-config\nhostname: web\n", 'begin it with "#cloud-config"'),
    (b"cloud-config\n", "first line"),
    (b"users:\n  - #cloud-config\n", "first line"),
    (b"\xef\xbb\xbf#cloud-config\n", "byte order mark"),
    ("#cloud-config\n".encode("utf-16"), "byte order mark"),
]


def build(tmp_path: Path, key: str, content: bytes | None) -> None:
    data = tmp_path / "data"
    if content is not None:
        data.write_bytes(content)
    path = tmp_path / "web.toml"
    path.write_text(f'kernel = "/k"\n\n[cloudInit]\n{key} = "{data}"\n')

    def found(guest: Guest) -> Tools:
        assert guest.cloud_init is not None
        heads = tuple(tools._Look(Inputs(HostPaths())).heads(guest.cloud_init.kinds))
        given = cases.tools(guest)
        values = {name: getattr(given, name) for name in Tools.__annotations__}
        return Tools(**{**values, "heads": heads})

    declared.tree(str(path), None, found)


@pytest.mark.parametrize("key", ["userData", "vendorData"])
@pytest.mark.parametrize("content", RIGHT)
def test_right(tmp_path: Path, key: str, content: bytes) -> None:
    build(tmp_path, key, content)


@pytest.mark.parametrize("key", ["userData", "vendorData"])
@pytest.mark.parametrize(("content", "message"), WRONG)
def test_wrong(tmp_path: Path, key: str, content: bytes, message: str) -> None:
    with pytest.raises(DeclarationError) as raised:
        build(tmp_path, key, content)
    assert message in str(raised.value) and f"cloudInit.{key}" in str(raised.value)
    assert (raised.value.line, raised.value.exit_code) == (4, 78)
    # It may be secret.
    assert "hostname: web" not in str(raised.value)


def test_what_is_not_there_yet_or_no_file(tmp_path: Path) -> None:
    build(tmp_path, "userData", None)
    os.mkfifo(tmp_path / "data")
    build(tmp_path, "userData", None)
