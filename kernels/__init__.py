"""One operator, three implementations, one signature.

Empty on purpose: a folder of this name on ``sys.path`` is imported by transformers when it probes for
a package called ``kernels``, so this file imports nothing and defines no version.
"""
