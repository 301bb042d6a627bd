"""python -m mlacli."""

from mlacli.cli import main

if __name__ == "__main__":
    main()
