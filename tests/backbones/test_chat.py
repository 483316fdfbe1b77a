"""Chat templates: what they write, where they come from, and what they must not reach."""

import json

import pytest

from hippocampus.backbones.chat import ChatTemplate
from hippocampus.backbones.hub_tokenizer import scored_pieces
from hippocampus.backbones.loading import Backbone, load_backbone, save_backbone
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import DataError

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant', 'system') %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi \n"}]


def test_a_conversation_becomes_the_text_of_the_template():
    chat = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
    assert chat.render(TALK) == "<s><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    assert chat.render(TALK[:1], add_generation_prompt=False) == "<s><|system|>Be kind.<|end|>"
    assert chat.render([], tools=[{"a": "<é>"}]) == '<s>[{"a": "<é>"}]<|assistant|>'


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.json }}", "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}",
    "{{ self._TemplateReference__context.environment.compile('x') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ range(1000000) | list }}", "{{ 9 ** 9 ** 9 }}",
    "{{ 'x' * 10000000 }}", "{{ (10 ** 9) * 'x' }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{{ strftime_now.__globals__.json }}", "{{ messages[0].missing.deeper }}",
    "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages | tojson(1, 2, 3) }}"])
def test_a_template_reaches_nothing_but_its_messages(template):
    with pytest.raises(DataError) as caught:
        ChatTemplate(template, {}).render(TALK)
    assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% for a in %}", "x" * (2**20 + 1)])
def test_what_is_no_template_is_refused_when_it_is_read(template):
    with pytest.raises(DataError, match="the chat template"):
        ChatTemplate(template, {})


@pytest.fixture
def folder(backbone_of, tmp_path):
    """A checkpoint with a tokenizer that puts <s> in front."""
    save_backbone(tmp_path / "model", backbone_of("qwen3"))
    document = scored_pieces(["<unk>", "<s>", "</s>", " ", "H", "i", "Hi", " Hi"],
                             [0, 0, 0, -1, -2, -3, -4, -5],
                             {0: "<unk>", 1: "<s>", 2: "</s>"}, space=" ", add_begin=1)
    (tmp_path / "model/tokenizer.json").write_text(document)
    return tmp_path / "model"


def render(folder):
    return load_backbone(folder).chat.render(TALK[1:])


def test_a_template_is_found_where_transformers_4_and_5_keep_it(folder):
    assert load_backbone(folder).chat is None
    config = {"bos_token": {"content": "<b>"}, "eos_token": "</s>",
              "chat_template": "{{ bos_token }}old"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert render(folder) == "<b>old"
    config["chat_template"] = [{"name": "rag", "template": "rag"},
                               {"name": "default", "template": "named{{ eos_token }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert render(folder) == "named</s>"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}new")
    assert render(folder) == "<b>new"
    (folder / "tokenizer_config.json").unlink()
    assert render(folder) == "<s>new", "the tokenizer knows its first token"
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read"):
        load_backbone(folder)


def test_the_ids_that_end_a_text_come_from_the_generation_config(folder):
    assert load_backbone(folder).tokenizer.end_ids == ()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    assert load_backbone(folder).tokenizer.end_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_backbone(folder).tokenizer.end_ids == (2, 7)


def test_a_first_token_is_put_in_front_once(folder):
    tokenizer = load_backbone(folder).tokenizer
    assert tokenizer.encode("Hi").tolist() == tokenizer.encode("<s>Hi").tolist() == [1, 7]
    assert tokenizer.encode("").tolist() == [1]
    plain = Tokenizer(tokenizer.to_json())
    assert plain.encode("Hi").tolist() == [7], "training adds its own marks"


def test_a_tokenizer_of_another_model_is_refused(folder):
    document = scored_pieces([*"abcdefgh"] * 13, [0.0] * 104, {0: "a"}, space=" ", add_begin=None)
    assert Tokenizer(document).vocab_size == 8
    pieces = [f"<{i}>" for i in range(98)]
    document = scored_pieces(pieces, [0.0] * 98, {0: "<0>"}, space=" ", add_begin=None)
    (folder / "tokenizer.json").write_text(document)
    with pytest.raises(DataError, match="has 98 ids, the model 97"):
        load_backbone(folder)


def test_tokenizer_and_template_are_saved_too(folder, tmp_path):
    whole = load_backbone(folder)
    chat = ChatTemplate(TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})
    save_backbone(tmp_path / "again", Backbone(whole.model, whole.params, whole.tokenizer, chat))
    found = load_backbone(tmp_path / "again")
    assert found.tokenizer.digest == whole.tokenizer.digest
    assert (found.chat.source, found.chat.tokens) == (chat.source, chat.tokens)
