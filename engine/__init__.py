"""Prompts in, completions out, on one host: the engine, usable without the job framework."""
