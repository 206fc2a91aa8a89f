"""Speed on a GPU: one command, ``python -m benchmarks.gpu -o DIR``, that ends in time and loses nothing.

The parent (:mod:`benchmarks.gpu.run`) hands cases to a worker process a workload and writes the report after each.
The worker (:mod:`benchmarks.gpu.worker`) draws the model on the device, checks parity, and times pairs.
"""
