"""Search: which blocks of a diffusion model to skip at which timestep."""
