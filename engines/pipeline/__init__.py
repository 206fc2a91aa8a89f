"""A bundle called like a diffusers pipeline."""
