"""Check a fresh installation: pip's own check of versions, and an import of every direct dependency.

    python tools/check_installation.py

pip resolves what each package declares; that they work beside each other only an import tells (a pyarrow of NumPy 2's
time beside NumPy 1, say).
"""

import importlib
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires

# LAVIS's own requirement, a wheel whose platform tag newer pips no longer list; it imports all the same.
TOLERATED = re.compile(r"decord \S+ is not supported on this platform")


def direct_dependencies(distribution: str) -> list[str]:
    """Return the names of a distribution's requirements, extras left out."""
    lines = [line for line in requires(distribution) or [] if "extra ==" not in line]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]


def modules_of(distribution: str) -> list[str]:
    """Return the top-level modules that a distribution installs and that can be imported by that name."""
    wanted = distribution.lower().replace("_", "-")
    return sorted(
        module
        for module, owners in packages_distributions().items()
        if wanted in {owner.lower().replace("_", "-") for owner in owners} and module.isidentifier()
    )


def faults() -> list[str]:
    """Return one line per fault of this environment."""
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    lines = [] if check.returncode == 0 else (check.stdout + check.stderr).splitlines()
    found = [line for line in lines if line.strip() and not TOLERATED.fullmatch(line.strip())]
    for name in direct_dependencies("lavis-dcd"):
        # LAVIS also installs packages named app, docs, projects and tests, which are not what it is for
        modules = ["lavis"] if name == "salesforce-lavis" else modules_of(name)
        if not modules:
            found.append(f"{name}: installs no module")
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # whatever a broken package raises when it is imported
                found.append(f"{name}: import {module}: {type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    if lines := faults():
        sys.exit("\n".join(lines))
    print(f"{len(direct_dependencies('lavis-dcd'))} direct dependencies import, and pip finds their versions in order")
