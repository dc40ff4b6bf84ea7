"""Renew requirements/dev.lock and requirements/runtime.lock: every package that an installation needs, one version, with hashes.

    make lock

The locks hold for every platform and every Python that pyproject.toml allows. torch is in neither: which of its builds is right
depends on the machine, so `make` installs it by itself; what torch needs is listed in requirements/build.in.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = 'torch ; python_version < "3"\n'  # an override that is never true takes a package out


def lock(target: str, *arguments: str) -> None:
    """Write one lock file from pyproject.toml, requirements/build.in and further arguments of `uv pip compile`."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "overrides.txt"
        overrides.write_text(WITHOUT_TORCH)
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "requirements/build.in", "--quiet"]
        command += ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--upgrade"]
        command += ["--custom-compile-command", "make lock", "--overrides", str(overrides), *arguments, "-o", target]
        subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    lock("requirements/dev.lock", "--extra", "dev")
    lock("requirements/runtime.lock", "--constraints", "requirements/dev.lock")


if __name__ == "__main__":
    main()
