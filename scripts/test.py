"""Set up an environment and run every check: ``python scripts/test.py [arguments of pytest]``.

Without arguments: style (ruff), types (mypy), then all tests. With arguments: pytest with these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _environment import environment, run

CHECKS = (["-m", "ruff", "check", "."], ["-m", "mypy"], ["-m", "pytest", "-q"])

if __name__ == "__main__":
    python = environment("test")
    checks = [["-m", "pytest", *sys.argv[1:]]] if len(sys.argv) > 1 else CHECKS
    codes = []
    for check in checks:
        print(f"\n$ python {' '.join(check)}", flush=True)
        codes.append(run(python, *check))
    sys.exit(next((code for code in codes if code), 0))
