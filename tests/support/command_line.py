"""`polyshard ...` in this process, which has imported torch already."""

from dataclasses import dataclass

import pytest

from polyshard.cli import main


@dataclass(frozen=True)
class Done:
    """As of `subprocess.run`."""

    returncode: int
    stdout: str
    stderr: str


def polyshard(capfd: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """Run the command line to its exit."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["polyshard", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    out = capfd.readouterr()
    return Done(int(ended.value.code or 0), out.out, out.err)
