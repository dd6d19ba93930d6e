"""The command `mem1`, also as `python -m mem1`."""

import sys


def main() -> int:
    """`mem1.cli.main` in a process of its own."""
    try:
        from mem1.cli import main as run  # not before: it loads torch, which takes seconds
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
