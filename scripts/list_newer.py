"""Print which installed packages differ from a lock file: python scripts/list_newer.py requirements/dev.lock"""

import re
import sys
from importlib import metadata
from pathlib import Path


def locked_versions(text: str) -> dict[str, set[str]]:
    """Return the versions that a lock names for each package; several where they depend on the Python version."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE):
        versions.setdefault(name.lower(), set()).add(version)
    return versions


def main() -> None:
    changed = 0
    for name, versions in sorted(locked_versions(Path(sys.argv[1]).read_text()).items()):
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform
        if installed not in versions:
            changed += 1
            print(f"{name} {' or '.join(sorted(versions))} -> {installed}")
    print(f"{changed} packages differ from {sys.argv[1]}")


if __name__ == "__main__":
    main()
