"""Whole checkpoints moved: to another place, or into another format, object to object.

Law: bounded memory, no local disk; bytes that the server can copy by itself do not pass through here.
"""
