# SPDX-License-Identifier: MIT
"""ssh's proxy over vsock: how it is called, and what it says where nobody is reached.

That it hands its connection to ssh is seen in tests/system/test_ssh.py, by a login.
"""

from __future__ import annotations

import socket

import pytest

from microvm_host import vsock


@pytest.mark.parametrize(
    "words", [[], ["3"], ["3", "22", "1"], ["vsock/", "22"], ["unix/3", "22"], ["-1", "22"]]
)
def test_called_wrongly(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert vsock.main(["vsock.py", *words]) == 2
    assert capsys.readouterr().err == "usage: vsock.py CID|vsock/CID PORT\n"


@pytest.mark.parametrize("cid", ["0", "vsock/0", "vsock/99999999999"])
def test_nobody_is_there(cid: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vsock.main(["vsock.py", cid, "22"]) == 1
    number = cid.removeprefix("vsock/")
    assert f"cannot reach port 22 of vsock CID {number}: " in capsys.readouterr().err


def test_a_host_without_vsock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A family that no kernel has.
    monkeypatch.setattr(socket, "AF_VSOCK", 254)
    assert vsock.main(["vsock.py", "vsock/3", "22"]) == 1
    assert "cannot reach port 22 of vsock CID 3: " in capsys.readouterr().err
