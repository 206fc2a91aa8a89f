"""Errors, files and records: what every other package stands on. Free of torch."""
