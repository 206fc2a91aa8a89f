"""The records that make up ``bundle.json``. Free of torch."""
