"""Mutants of bundles, SubNets, schedules, pickles, safetensors and recipes, and what must hold of each."""
