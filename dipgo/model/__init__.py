"""Pipelines as diffusers has them: find, load and fingerprint them, call their denoiser, tabulate their scheduler."""
