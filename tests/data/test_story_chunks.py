"""Rows of several chunks hold what the stream holds, and a pass every story and question once."""

import numpy as np
import pytest
from test_story_rows import BEGIN, CONTEXT, END, questions_of, split_of, streams

from hippocampus.data.story_chunks import ChunkedStreams, StoryPass, StoryWindows

ARRAYS = ("tokens_BT", "targets_BT", "loss_weight_BT", "document_ids_BT", "positions_BT")


def pass_of(batch_size=3, n=9):
    return StoryPass(split_of(n), questions_of(n), CONTEXT, batch_size, 0, BEGIN, 0.0)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_row_is_so_many_rows_of_the_stream(chunks):
    source = streams()
    long = ChunkedStreams(source, chunks)
    for step in range(4):
        found = long.batch(step)
        parts = [source.batch(chunks * step + i) for i in range(chunks)]
        for name in ARRAYS:
            wanted = np.concatenate([getattr(part, name) for part in parts], 1)
            assert np.array_equal(getattr(found, name), wanted)
        for name in ("reset", "question", "story"):
            wanted = np.stack([getattr(part, f"{name}_B") for part in parts], 1)
            assert np.array_equal(getattr(found, f"{name}_Bn"), wanted)
    assert long.windows_per_epoch == -(-source.windows_per_epoch // chunks)


def test_a_host_reads_its_rows_alone():
    long = ChunkedStreams(streams(), 2)
    whole, part = long.batch(3), long.batch(3, slice(1, 3))
    for name in (*ARRAYS, "reset_Bn", "question_Bn", "story_Bn"):
        assert np.array_equal(getattr(whole, name)[1:3], getattr(part, name))


@pytest.mark.parametrize("batch_size", [2, 3, 12])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_pass_asks_every_question_once_and_tells_every_story_before(batch_size, chunks):
    source = pass_of(batch_size)
    told = [[] for _ in range(batch_size)]
    answers = []
    for batch in StoryWindows(source, chunks):
        assert batch.tokens_BT.shape == (batch_size, chunks * CONTEXT)
        for user in range(batch_size):
            for i in range(chunks):
                cut = slice(i * CONTEXT, (i + 1) * CONTEXT)
                row = {name: getattr(batch, name)[user, cut] for name in ARRAYS}
                real = row["document_ids_BT"] > 0
                if not real.any():
                    assert not row["loss_weight_BT"].any()
                    continue
                if batch.reset_Bn[user, i]:
                    told[user] = []
                story = batch.story_Bn[user, i]
                if not batch.question_Bn[user, i]:
                    told[user] += row["tokens_BT"][real][1:].tolist()
                    assert not row["loss_weight_BT"].any()
                    continue
                assert told[user] == split_of(9).story_ids(story).tolist()
                for document in range(1, row["document_ids_BT"].max() + 1):
                    own = (row["document_ids_BT"] == document) & (row["loss_weight_BT"] > 0)
                    answers.append((int(story), row["targets_BT"][own].tolist()))
    wanted = [(story, one.answers[0].tolist()) for story, asked in enumerate(questions_of(9))
              for one in asked]
    assert sorted(answers) == sorted(wanted) and answers[0][1][-1] == END


def test_a_pass_can_be_cut_short():
    windows = StoryWindows(pass_of(), 2)
    short = StoryWindows(pass_of(), 2, 2)
    assert len(short) == 2 < len(windows)
    for found, wanted in zip(short, windows, strict=False):
        assert np.array_equal(found.tokens_BT, wanted.tokens_BT)
    assert windows.context == 2 * CONTEXT
