"""The adapters of a Buu against their controls, layer by layer, category by category.

`opening` puts a run beside a text, queries and another run; `study` measures; `findings` compares;
`tables` and `pictures` show.
"""
