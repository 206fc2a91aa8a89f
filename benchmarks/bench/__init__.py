"""One report: programs, baselines and techniques of others, measured in turns, as a page."""
