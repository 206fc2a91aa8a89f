"""What a pipeline does in its loop, read off the pipeline itself while it runs around stand-ins."""
