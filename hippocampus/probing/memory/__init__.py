"""What a memory that outlives the process knows of a story: written, saved, loaded, asked.

`subject` says what is needed of a model, `writing` feeds stories and saves memories, `asking` asks,
`study` does so under every condition, and `findings` says what the answers are worth. None of them
needs a run folder; `opening` makes them of one.
"""
