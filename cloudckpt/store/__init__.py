"""Bytes out: one small protocol per capability, and a room for each kind of store.

Law: one method is one request; what a request failed of is told by the error's class.
"""
