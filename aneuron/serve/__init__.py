"""`aneuron serve`: models from a file or the command line as a service of the Open Inference Protocol.

What is asked for is read in config.py, made in loading.py, served in app.py; reloading.py loads anew what serves,
security.py says who may do what. Must not be here: an import; the protocol (`aneuron.web.v2`).
"""
