"""Adapters to the frameworks that people train with: one room for each, imported by name.

Law: translates between a framework's words and the Checkpointer's. A framework is imported by its own room alone, and
none is needed for another's.
"""
