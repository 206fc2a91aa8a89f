"""Tables and pages from the records in results/."""
