"""What runs in the box of generated code, and how the box is made: Python's standard library alone,
since nothing else is there.
"""
