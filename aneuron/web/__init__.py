"""Models in web applications: one module for each framework, imported by its name; what they share lies beside them.

Must not be here: an import. Whoever wants one framework does not need the others.
"""
