"""Moving bytes and committing them.

Law: planning is pure and returns plans, doing is async and short; no torch, no S3, no environment.
"""
