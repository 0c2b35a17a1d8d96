"""A virtual environment for the development scripts: made on first use, and made again when requirements change.

Needs nothing but Python. Used by ``scripts/demo.py`` and ``scripts/test.py``.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"


def environment(extras: str = "") -> Path:
    """Path of the environment's Python, with the project installed from this folder.

    Args:
        extras: Names of extras to install, such as ``"test"``.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 (this file runs before anything is installed)
        sys.exit(f"openreml_nn needs Python 3.10 or later, and this is {sys.version.split()[0]}.")
    folder = ROOT / (".venv-" + extras if extras else ".venv")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / ("python.exe" if os.name == "nt" else "python")
    stamp = folder / "requirements.sha256"
    wanted = _digest(extras)
    if stamp.exists() and python.exists() and stamp.read_text() == wanted:
        return python
    print(f"Making a virtual environment in {folder.name}; this takes a minute or two.", flush=True)
    try:
        venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    except (subprocess.CalledProcessError, SystemExit) as error:
        sys.exit(f"Python could not make a virtual environment ({error}). On Debian: apt install python3-venv.")
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    done = subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check",
                           "--constraint", CONSTRAINTS, "--editable", target], check=False)  # fmt: skip
    if done.returncode:
        sys.exit("The requirements could not be installed; pip's message is above.")
    stamp.write_text(wanted)
    return python


def _digest(extras: str) -> str:
    texts = [(ROOT / "pyproject.toml").read_bytes(), CONSTRAINTS.read_bytes(), extras.encode(), sys.version.encode()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def run(python: Path, *arguments: str) -> int:
    """Run the environment's Python in the project's folder; its exit code."""
    return subprocess.run([python, *arguments], cwd=ROOT, check=False).returncode
