"""``python -m dorac``: adapters on disk converted, merged, inspected and checked."""

import sys

from dorac.commands import main

if __name__ == "__main__":
    sys.exit(main())
