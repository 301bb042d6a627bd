"""python -m mlacli."""

import sys

if __name__ == "__main__":
    try:
        from mlacli.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()
