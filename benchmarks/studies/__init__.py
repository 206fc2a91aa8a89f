"""One question each, from measurement to record."""
