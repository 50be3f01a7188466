"""Embeddings of many images, as Parquet files."""
