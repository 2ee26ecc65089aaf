"""The command `psim`, in this process."""

from typer.testing import CliRunner, Result

from psim.__main__ import app


def psim(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """Run the command with these arguments."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def assert_refused(result: Result, message: str) -> None:
    """Assert that an error of the user was told in one line, without a traceback."""
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, Exception), result.exception
