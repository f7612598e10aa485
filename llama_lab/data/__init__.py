"""Text -> documents -> tokens -> shards -> batches. Only `stream` knows torch."""
