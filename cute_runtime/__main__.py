import sys

from cute_runtime.cli import main

sys.exit(main())
