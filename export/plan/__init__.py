"""From a schedule to launches: what is computed when, graphs cut by step, memory slots."""
