"""Scored responses -> batches. rows: how a row is laid out; packing: which row takes what; loader: by step."""
