"""Seeded mutations of everything that a user's model can contain; ``tests/fuzz.py`` tries them.

Growth is by function: a mutator takes a model and a random generator, changes the model in place and says what it did
(``change.Change``). One line in the ``MUTATORS`` of its file puts it into the table; twice, and it is drawn twice as
often.
"""
