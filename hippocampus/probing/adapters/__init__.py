"""The adapters of a Buu: what they do, whether they are in order, and what they are worth.

`monitors` (gates, slots) and `health` are calls of a `LanguageModel` too; `controls` are the models
that adapters are compared with. For the suite `opening` puts a run beside a text, queries and
another run; `study` measures; `findings` compares; `tables` and `pictures` show.
"""
