"""Prove: parity of a bundle with the searched model, measured speed and quality against honest baselines, reports."""
