"""Scripts that made the models in dipgo/zoo. They are not installed."""
