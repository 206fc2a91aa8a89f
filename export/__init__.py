"""Compile: a SubNet and its denoiser become a bundle of static graphs that share one weights file."""
