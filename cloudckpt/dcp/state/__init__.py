"""What users hand over, as what is stored of it, and back.

Law: translates; fetches and stores nothing.
"""
