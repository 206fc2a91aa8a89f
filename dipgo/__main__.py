"""Run the command line: ``python -m dipgo``."""

from dipgo.cli.main import main

if __name__ == "__main__":
    main()
