"""Write the pages of results from the records beside this file: ``python -m benchmarks.results [--check]``."""

from benchmarks.pages.results import main

if __name__ == "__main__":
    main()
