"""The entry point of the ``lowbit`` command, also as ``python -m lowbit``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; Ctrl-C is one line from the first moment, while modules are still being imported."""
    try:
        from lowbit.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("lowbit: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
