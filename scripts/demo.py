"""Set up an environment and fit a bundled model, the alpha-lattice by default: ``python scripts/demo.py [CONFIG]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, run

if __name__ == "__main__":
    config = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "configs" / "john_alpha.yaml")
    sys.exit(run(environment(), "-m", "openreml_nn", "fit", "--config", config))
