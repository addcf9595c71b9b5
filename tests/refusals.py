"""Commands that must be refused, called in this process."""

from __future__ import annotations

import pytest

import search


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must be refused and returns its one line."""
    try:
        code = search.main([str(argument) for argument in arguments])
    except SystemExit as ended:  # argparse's own refusals
        code = ended.code
    out = capsys.readouterr()
    assert code == 2, out
    assert out.err.count("\n") == 1, out.err
    assert out.err.startswith("error: ")
    assert "Traceback" not in out.err
    return out.err
