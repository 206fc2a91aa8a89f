"""The denoiser as a graph: sites, the trace, what it costs, and which values live from step to step."""
