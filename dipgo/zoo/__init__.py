"""Models that ship with dipgo, and the scripts that train them."""
