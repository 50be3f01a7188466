"""The rows of the benchmark, and the programs that they compare with."""
