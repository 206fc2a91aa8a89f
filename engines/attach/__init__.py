"""A bundle in the place of the denoiser inside a diffusers pipeline."""
