"""Bytes and rows: object storage, readers and writers."""
