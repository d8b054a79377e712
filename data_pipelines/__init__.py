"""WebDataset shards as an exact, packed, resumable stream. Knows nothing of `dit`."""
