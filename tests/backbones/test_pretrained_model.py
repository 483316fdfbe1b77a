"""A pretrained decoder generates and scores as a run of the project's own does."""

import json
import shutil

import numpy as np
import pytest

import hippocampus as hp
from hippocampus.backbones.loading import is_backbone
from hippocampus.data.tokenizers import id_tokenizer
from hippocampus.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def folder(folder_of, tmp_path_factory):
    """A checkpoint whose tokenizer reads the ids themselves, without anything that ends a text."""
    place = tmp_path_factory.mktemp("pretrained") / "tiny"
    shutil.copytree(folder_of("qwen3"), place)
    id_tokenizer(97).save(place / "tokenizer.json")
    config = json.loads((place / "config.json").read_text())
    del config["eos_token_id"]
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture(scope="module")
def prompts(reference_of):
    return [" ".join(map(str, row)) for row in reference_of("qwen3")["ids"][:, :12]]


def test_it_writes_what_transformers_writes_until_one_of_several_ids(folder, prompts,
                                                                     reference_of):
    assert is_backbone(folder)
    lm = hp.load(folder)
    settings = {"max_new_tokens": 10, "temperature": 0, "log_probabilities": True}
    expected = reference_of("qwen3")["generated"]
    found = lm.generate(prompts, **settings)
    assert [one.tokens for one in found] == [tuple(row) for row in expected.tolist()]
    assert [one.finish for one in found] == ["length", "length"]

    ends = [int(expected[0, 6]), int(expected[1, 2])]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = hp.load(folder).generate(prompts, **settings)
    (folder / "generation_config.json").unlink()
    for one, row in zip(found, expected.tolist(), strict=True):
        n = min(row.index(end) for end in ends if end in row)
        assert one.tokens == tuple(row[:n + 1]) and one.finish == "stop"
        assert str(row[n]) not in one.text.split()


def test_it_scores_a_text_by_its_logits(folder, reference_of):
    ids, logits = (reference_of("qwen3")[name][0] for name in ("ids", "logits"))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -log_p[np.arange(len(ids) - 1), ids[1:]].sum()
    score = hp.load(folder).score(" ".join(map(str, ids)))
    assert score.tokens == len(ids) - 1 and score.nats == pytest.approx(nats, abs=1e-3)


def test_its_config_is_the_decoder_s(folder, backbone_of):
    lm = hp.load(folder)
    assert lm.config.model == backbone_of("qwen3").model.config == lm.model.config
    assert lm.config.name == "tiny" and lm.context == 128 and lm.room("1 2") == np.inf


def test_what_a_pretrained_model_has_not_is_refused(folder, tmp_path):
    for asked in ({"weights": "raw"}, {"step": 3}):
        with pytest.raises(ConfigError, match="no steps and no raw weights"):
            hp.load(folder, **asked)
    lm = hp.load(folder)
    with pytest.raises(ConfigError, match="trained with one pass"):
        lm.generate("1", segments=2)
    with pytest.raises(ConfigError, match="segment flow"):
        lm.generate("1", skip=True)
    shutil.copytree(folder, tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer beside"):
        hp.load(tmp_path / "mute")
