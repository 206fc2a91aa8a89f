"""Memory, streams and graphs on a GPU, without torch: what the runners for GPUs share."""
