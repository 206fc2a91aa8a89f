"""Schedules that others publish, read into SubNets: one file a format, :mod:`dipgo.importers.importer` for all of them.

Importing is torch-free up to the point where a model is traced, and no file can run code.
"""
