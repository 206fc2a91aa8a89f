"""A schedule run in torch: inside a diffusers pipeline, and differentiable for the search."""
