"""``python -m openreml_nn``: the command line."""

from openreml_nn.cli import main

if __name__ == "__main__":
    main()
