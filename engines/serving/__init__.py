"""Serve bundles with the Triton Inference Server: its model repository, the model in it, and the server itself."""
