"""PEFT's adapter layers, served fast in the models that have them.

``swap`` gives layers their fast class and takes it away, ``layers`` has those classes, ``rules`` says
which calls they leave to PEFT; ``linear``, ``dora``, ``mixed`` and ``embedding`` compute the others.
Importing this imports PEFT.
"""
