"""The rows of the benchmark, and the programs of others that they are measured against."""
