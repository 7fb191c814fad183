"""``python -m sonicmoe`` and the command ``sonicmoe``."""

import sys

from sonicmoe import cli


def main() -> int:
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
